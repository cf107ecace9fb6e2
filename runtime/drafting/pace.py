"""How many draft steps fit into one verification, from the last rounds."""

from __future__ import annotations

from collections import deque
from statistics import median

# Steps vary, and one that ends after the verification makes the target wait.
MARGIN = 0.85
_ROUNDS = 15
_FIRST_LENGTH = 2
_MOST = 32


class Pace:
    """Medians of the last rounds, so that one slow round changes nothing."""

    def __init__(self) -> None:
        self._verify: deque[float] = deque(maxlen=_ROUNDS)
        self._step: deque[float] = deque(maxlen=_ROUNDS)
        self._is_first = True

    def note(self, verify_seconds: float, draft_seconds: float, steps: int) -> None:
        """Take note of a round; of the first one not, in which the drafter reads the prompt."""
        if steps and not self._is_first:
            self._verify.append(verify_seconds)
            self._step.append(draft_seconds / steps)
        self._is_first = False

    def length(self) -> int:
        """Tokens to draft during a verification; two as long as nothing is known."""
        if not self._step:
            return _FIRST_LENGTH
        step = median(self._step)
        if step <= 0:
            return _MOST
        return min(max(int(MARGIN * median(self._verify) / step), _FIRST_LENGTH), _MOST)
