"""How much time drafting may still lose: what keeps it from making any text slower."""

from __future__ import annotations

_STAKE = 1.5
_MOST = 8.0
_INTEREST = 0.005
_LEAST_STAKE = 0.5
_FIRST_PAUSE, _LONGEST = 8, 1024
# A pause need not be longer than what makes the loss before it this small a share.
_LOSS_RATE = 0.012


class Account:
    """An account in plain steps: rounds that gain pay in, rounds that lose draw.

    A draft may be tried while the account can bear that all of it is wrong. When it is empty,
    drafting pauses and then gets a new stake. Each pause is twice as long as the one before, unless
    drafting gained between, up to where the loss since the last pause is about a per cent. Gains
    are kept up to a cap, so that a long good stretch cannot pay for a long bad one. A text on
    which every draft is wrong loses a few steps at the start, later two per cent at most.

    Attributes:
        credit: steps that may be lost now.
    """

    def __init__(self) -> None:
        self.credit = _STAKE
        self._stake = _STAKE
        self._pause = _FIRST_PAUSE
        self._left = 0
        self._gained = 0.0

    @property
    def paused(self) -> bool:
        """Whether drafting pauses."""
        return self._left > 0

    def settle(self, tokens: int, steps: float) -> None:
        """Book a round.

        Args:
            tokens: that it gave.
            steps: time it took, in plain steps.
        """
        if self._left:
            self._left -= 1
            if not self._left:
                self.credit, self._gained = max(self.credit, self._stake), 0.0
            return
        gained = tokens - steps
        self._gained += gained
        self.credit = min(self.credit + gained + _INTEREST * tokens, _MOST)

    def pause(self, trial: float) -> None:
        """Stop drafting for a while.

        Args:
            trial: steps that a single wrong draft loses; the next stake is enough for two.
        """
        if self._gained > 0:
            self._pause = _FIRST_PAUSE
        enough = int(max(-self._gained, 0.0) / _LOSS_RATE)
        self._left = max(min(self._pause, enough), _FIRST_PAUSE)
        self._pause = min(2 * self._pause, _LONGEST)
        self._stake = max(_LEAST_STAKE, 2 * trial)
