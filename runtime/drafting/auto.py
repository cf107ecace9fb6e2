"""Choosing among drafters, round by round: the one that gives the most tokens per second."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from forerun.errors import OptionError
from forerun.runtime.drafting.combine import configure
from forerun.runtime.drafting.tree import TokenTree

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np

    from forerun.runtime.drafting.drafter import Drafter, KeepGoing, Outcome
    from forerun.runtime.drafting.guide import Guide
    from forerun.runtime.types import SamplingParams

_GAIN = 0.1
_HOPE, _NEW_HOPE = 1.15, 1.08
_MARGIN = 1.02
_FIRST_REST, _LAST_REST = 8, 128


@dataclass
class Record:
    """What came of asking a drafter that costs time.

    Its speed-up is a ratio of two fading sums, so that it is that of all its rounds together. It
    starts with a little hope; when it turns out not to pay it rests, for longer each time, and is
    then tried again with less hope.
    """

    tokens: float = _HOPE
    steps: float = 1.0
    rest: int = 0
    next_rest: int = _FIRST_REST

    @property
    def speedup(self) -> float:
        """Tokens of its rounds / plain steps they took."""
        return self.tokens / self.steps

    def ready(self) -> bool:
        """Whether it may be asked now; counts the rounds of its rest."""
        if self.rest:
            self.rest -= 1
            if not self.rest:
                self.tokens, self.steps = _NEW_HOPE, 1.0
        return not self.rest

    def note(self, tokens: int, steps: float) -> None:
        """Book a round for which it drafted."""
        self.tokens += _GAIN * (tokens - self.tokens)
        self.steps += _GAIN * (steps - self.steps)
        if self.speedup < _MARGIN:
            self.rest = self.next_rest
            self.next_rest = min(2 * self.next_rest, _LAST_REST)
        elif self.speedup > _HOPE:
            self.next_rest = _FIRST_REST


class AutoDrafter:
    """Several drafters as one: free ones first, a costly one where it promises more.

    A drafter without a model is always asked, since that costs next to nothing, and its proposal
    is taken if its calibrated value beats plain decoding. One with a model costs a draft step just
    to see what it thinks, so it is asked by what its latest rounds gave.

    Args:
        free: drafters without a model, best first; the first that proposes anything worth it
            wins, the one with the larger rate if there are several.
        costly: drafters with a model, in order of preference.

    Raises:
        OptionError: there is no drafter at all.
    """

    name = "auto"

    def __init__(self, free: Sequence[Drafter], costly: Sequence[Drafter] = ()) -> None:
        if not free and not costly:
            raise OptionError("auto needs at least one drafter to choose from")
        self._free, self._costly = tuple(free), tuple(costly)
        self._guide: Guide | None = None
        self._length = 0
        self._records = {drafter.name: Record() for drafter in costly}
        self._asked: Drafter | None = None
        self._seconds = 0.0

    @property
    def parts(self) -> tuple[Drafter, ...]:
        """All its drafters."""
        return self._free + self._costly

    @property
    def needs_features(self) -> bool:
        """Whether one of them does."""
        return any(drafter.needs_features for drafter in self.parts)

    @property
    def proposes_trees(self) -> bool:
        """Whether one of them does."""
        return any(drafter.proposes_trees for drafter in self.parts)

    def follow(self, guide: Guide) -> None:
        """Choose by these costs and this acceptance; without them the first proposal is taken."""
        self._guide = guide

    def speedups(self) -> dict[str, float]:
        """Latest speed-up of each costly drafter's rounds."""
        return {name: record.speedup for name, record in self._records.items()}

    def configure(self, params: SamplingParams, skipped: int = 0) -> None:
        """Tell them how the target draws; see `combine.configure`."""
        for drafter in self.parts:
            configure(drafter, params, skipped)

    def begin(self, ids: Sequence[int], features: np.ndarray | None) -> None:
        """See `Drafter.begin`."""
        self._length, self._asked = len(ids), None
        for drafter in self.parts:
            drafter.begin(ids, features if drafter.needs_features else None)

    def propose(self, budget: int, keep_going: KeepGoing | None = None) -> TokenTree:
        """The proposal of the drafter that promises the most tokens per second."""
        self._asked, self._seconds = None, 0.0
        if budget <= 0:
            return TokenTree.EMPTY
        best, speedup = self._best_free(budget, keep_going)
        for drafter in self._costly:
            record = self._records[drafter.name]
            if record.ready() and record.speedup > max(speedup, _MARGIN):
                started = time.perf_counter()
                tree = drafter.propose(budget, keep_going)
                self._seconds = time.perf_counter() - started
                self._asked = drafter
                if tree.tokens:
                    return tree
                break
        return best

    def observe(self, outcome: Outcome) -> None:
        """Tell all of them, and book what came of the one that was asked."""
        depth = self._length - 1
        self._length += len(outcome.new_tokens)
        for drafter in self.parts:
            started = time.perf_counter()
            drafter.observe(outcome)
            if drafter is self._asked:
                self._seconds += time.perf_counter() - started
        if self._asked is not None and self._guide is not None:
            curve = self._guide.costs.curve(depth)
            steps = curve[min(len(outcome.row_tokens), len(curve) - 1)] + self._seconds
            tokens = len(outcome.new_tokens)
            self._records[self._asked.name].note(tokens, steps / curve[1])
        self._asked = None

    def rewind(self, length: int) -> None:
        """See `Drafter.rewind`."""
        self._length = min(self._length, length)
        for drafter in self.parts:
            drafter.rewind(length)

    def close(self) -> None:
        """Close all of them."""
        for drafter in self.parts:
            drafter.close()

    def _best_free(self, budget: int, keep_going: KeepGoing | None) -> tuple[TokenTree, float]:
        """The best proposal that costs nothing, and the speed-up to expect of it."""
        best, speedup = TokenTree.EMPTY, 1.0
        for drafter in self._free:
            tree = drafter.propose(budget, keep_going)
            if not tree.tokens:
                continue
            if self._guide is None:
                return tree, speedup
            depth = self._length - 1
            _, values = self._guide.ranked(tree)
            count, rate = self._guide.best(values, 0.0, depth)
            expected = rate * self._guide.plain(depth)
            if not best.tokens or (count and expected > speedup):
                best, speedup = tree, max(expected, speedup)
        return best, speedup
