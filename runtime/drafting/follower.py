"""A drafter on the text of one generation: told of it, asked, and blamed when it fails."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

from forerun.errors import DrafterError, ForerunError
from forerun.runtime.drafting.combine import configure
from forerun.runtime.drafting.drafter import Drafter, Outcome
from forerun.runtime.drafting.tree import TokenTree
from forerun.runtime.prefix import PrefixCache
from forerun.runtime.types import SamplingParams


class Follower:
    """Keeps a drafter in line with the text of one generation.

    Args:
        drafter: guesses.
        cache: of the model, whose features the drafter may need.
        params: how the model's tokens are drawn, for drafters that draw theirs alike.

    Attributes:
        drafter: as given.
        known: committed ids that the drafter knows of; 0 before it has taken up the text.
    """

    def __init__(self, drafter: Drafter, cache: PrefixCache, params: SamplingParams) -> None:
        self.drafter = drafter
        self.known = 0
        self._runner, self._params = cache.runner, params
        self._skipped = 0

    @contextlib.contextmanager
    def asking(self) -> Iterator[None]:
        """Around every call of the drafter.

        Raises:
            DrafterError: it failed; an error that is typed already stays as it is.
        """
        try:
            with blamed(self.drafter):
                yield
        except BaseException:
            self.known = 0
            raise

    def begin(self, tokens: Sequence[int]) -> None:
        """Let the drafter take up the text, if it has not."""
        if self.known:
            return
        drafter = self.drafter
        with self.asking():
            configure(drafter, self._params, self._skipped)
            drafter.begin(tokens, self._runner.features() if drafter.needs_features else None)
        self.known = len(tokens)

    def observe(self, outcome: Outcome) -> None:
        """Tell the drafter of a round."""
        # Before the call, or a failure would leave more text behind than is thought of.
        self.known += len(outcome.new_tokens)
        with self.asking():
            self.drafter.observe(outcome)

    def restart(self, skipped: int) -> None:
        """See `Rounds.restart`."""
        self.known, self._skipped = 0, skipped

    def finish(self, length: int) -> None:
        """See `Rounds.finish`."""
        if self.known > length:
            with self.asking():
                self.drafter.rewind(length)
        self.known = 0


@contextlib.contextmanager
def blamed(drafter: Drafter) -> Iterator[None]:
    """Turn whatever a drafter raises into a typed error, and make it forget what it knew.

    Raises:
        DrafterError: it failed; an error that is typed already stays as it is.
    """
    try:
        yield
    except BaseException as error:
        # Its state may be anything now. Failing again here would only hide the first error.
        with contextlib.suppress(Exception):
            drafter.rewind(0)
        if isinstance(error, ForerunError) or not isinstance(error, Exception):
            raise
        raise DrafterError(
            f"the drafter {drafter.name} failed ({type(error).__name__}: {error}); "
            "drafter none goes on without it"
        ) from error


def check_tokens(tree: TokenTree, vocab: int) -> None:
    """Refuse ids that the model does not have.

    Raises:
        ValueError: the tree holds one.
    """
    if len(tree) and not 0 <= min(tree.tokens) <= max(tree.tokens) < vocab:
        raise ValueError(f"it proposed {tree.tokens}; ids go from 0 to {vocab - 1}")
