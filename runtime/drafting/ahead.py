"""Drafting behind tokens that are not verified yet: what it takes, and how blocks are made."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from forerun.runtime.drafting.drafter import Drafter, KeepGoing

MOST_BRANCHES = 8


@runtime_checkable
class AheadDrafter(Drafter, Protocol):
    """A drafter that can go on behind its own guesses, which overlapped schedules need.

    It is never told which guess the next one follows: it compares the ids with what it ran last,
    and keeps the common part. In overlapped rounds `observe` gets no arrays.
    """

    def next_tokens(
        self, ahead: Sequence[int], count: int
    ) -> tuple[Sequence[int], Sequence[float]]:
        """The likeliest tokens behind the committed ids and `ahead`.

        Runs on the thread of the drafter's device, never at the same time as another method.

        Args:
            ahead: unverified ids behind the committed ones. One more than in the call before is
                one draft step; a change further back costs as many rows.
            count: most tokens to give.

        Returns:
            Ids, best first, and the drafter's estimate that each is right, 0 to 1. None at all
            where it cannot draft, as at a full context.
        """
        ...


@dataclass(frozen=True)
class Branch:
    """A chain drafted behind unverified text.

    Attributes:
        tokens: its ids; the first one stands for the target's next token.
        confidences: the drafter's estimate for each.
    """

    tokens: tuple[int, ...]
    confidences: tuple[float, ...]

    def __len__(self) -> int:
        return len(self.tokens)


class BlockDraft:
    """Drafts one round's branches, step by step, behind one unverified text.

    Args:
        drafter: guesses.
        ahead: the unverified ids.
        go_on: asked before each step but the first, with the value of the branch so far.

    Attributes:
        branches: what is drafted, best first token first; valid whenever it is looked at.
        steps: draft steps that were run.
        seconds: time they took.
    """

    def __init__(self, drafter: AheadDrafter, ahead: Sequence[int], go_on: KeepGoing) -> None:
        self.branches: list[Branch] = []
        self.steps = 0
        self.seconds = 0.0
        self._drafter, self._ahead, self._go_on = drafter, list(ahead), go_on

    def chain(self, length: int) -> None:
        """Draft one chain of at most `length` tokens."""
        if self._open(1):
            self._extend(0, length)

    def forked(self, budget: int, most: int = MOST_BRANCHES) -> None:
        """Draft `budget` tokens as one chain, or as several short ones if its start is doubtful.

        The best chain is drafted last, so that the drafter's cache most often holds the one that
        is taken up.
        """
        most = max(min(most, budget // 2), 1)
        if not self._open(most):
            return
        self._extend(0, min(2, budget))
        count = branch_count(self.branches, most)
        del self.branches[count:]
        for number in range(count - 1, -1, -1):
            self._extend(number, budget // count)

    def _open(self, count: int) -> bool:
        """Start up to `count` branches, each with another first token."""
        tokens, values = self._step(self._ahead, count)
        pairs = zip(tokens, values, strict=True)
        self.branches = [Branch((int(token),), (float(value),)) for token, value in pairs]
        return bool(self.branches)

    def _extend(self, number: int, length: int) -> None:
        branch = self.branches[number]
        while len(branch) < length and self._go_on(math.prod(branch.confidences)):
            tokens, values = self._step([*self._ahead, *branch.tokens], 1)
            if not len(tokens):
                return
            branch = Branch(
                (*branch.tokens, int(tokens[0])), (*branch.confidences, float(values[0]))
            )
            self.branches[number] = branch

    def _step(self, ahead: list[int], count: int) -> tuple[Sequence[int], Sequence[float]]:
        started = time.perf_counter()
        found = self._drafter.next_tokens(ahead, count)
        self.seconds += time.perf_counter() - started
        self.steps += 1
        return found


def branch_count(branches: Sequence[Branch], most: int) -> int:
    """How many first tokens to follow up: DuoDecoding's k.

    A further first token is worth more than the third token of the best chain if its probability
    is larger than that of the chain's first two.

    Args:
        branches: best first token first; the best one is two tokens long if it can be.
        most: largest answer.
    """
    if not branches or len(branches[0]) < 2:
        return min(len(branches), 1)
    bound = branches[0].confidences[0] * branches[0].confidences[1]
    count = 1
    while count < min(most, len(branches)) and branches[count].confidences[0] > bound:
        count += 1
    return count
