"""What a drafter would have got right, token by token, and what schedules make of that.

A draft that is right so far has the recorded text before it. So the drafter's guess at each token,
asked behind the recorded text, tells for every schedule how its rounds go, without running it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING

from forerun.apps.bench.replay import wait_until
from forerun.errors import OptionError
from forerun.runtime.drafting.ahead import MOST_BRANCHES, Branch, branch_count

if TYPE_CHECKING:
    from forerun.apps.bench.replay import Recording
    from forerun.runtime.drafting.ahead import AheadDrafter

FIRSTS = MOST_BRANCHES
_BURST = 4


@dataclass(frozen=True)
class Guesses:
    """A drafter's guesses at one answer, each asked behind the right text.

    Attributes:
        ranks: for each token of the answer behind the first: which of the drafter's best tokens
            it was, 0 for the best one, `FIRSTS` for none of them.
        sure: the drafter's estimates for its best tokens there, best first.
    """

    ranks: tuple[int, ...]
    sure: tuple[tuple[float, ...], ...]

    def right(self, at: int) -> bool:
        """Whether the best guess at a token is the token."""
        return self.ranks[at] == 0

    def branches(self, at: int, most: int) -> int:
        """How many first tokens a fork there follows up.

        The rule asks for the second token behind the best guess; where that guess is wrong, the
        one behind the right token stands for it.
        """
        after = self.sure[min(at + 1, len(self.sure) - 1)]
        first = [Branch((n,), (value,)) for n, value in enumerate(self.sure[at])]
        first[0] = Branch((0, 0), (self.sure[at][0], after[0]))
        return branch_count(first, most)


@dataclass(frozen=True)
class Study:
    """What a drafter gets right, apart from any schedule: its guesses at each recording."""

    guesses: tuple[Guesses, ...]

    def first(self, branches: int) -> float:
        """Share of the tokens that are among so many of the drafter's best ones."""
        every = [rank for guesses in self.guesses for rank in guesses.ranks]
        return sum(rank < branches for rank in every) / len(every)


@dataclass(frozen=True)
class DraftCost:
    """What drafting takes beside a target of one speed.

    A processor that has just waited for the target is slow at first: its caches are cold and its
    clock is low.

    Attributes:
        first: seconds of the first draft step after a wait.
        later: seconds of each further one.
    """

    first: float
    later: float

    def steps(self, count: float) -> float:
        """Seconds of so many steps, on average over rounds if it is no whole number."""
        return self.first + (count - 1) * self.later if count > 0 else 0.0


def study(drafter: AheadDrafter, recordings: Sequence[Recording]) -> Study:
    """Let the drafter guess every token behind the right text.

    Raises:
        OptionError: no recording is long enough.
    """
    studied: list[Guesses] = []
    for recording in recordings:
        rest = recording.answer[1:]
        drafter.begin(recording.prompt + recording.answer[:1], None)
        ranks: list[int] = []
        sure: list[tuple[float, ...]] = []
        for at, token in enumerate(rest):
            ids, values = drafter.next_tokens(rest[:at], FIRSTS)
            ranks.append(list(ids).index(token) if token in ids else FIRSTS)
            sure.append(tuple(values) or (0.0,))
        studied.append(Guesses(tuple(ranks), tuple(sure)))
        drafter.rewind(0)
    if max((len(guesses.ranks) for guesses in studied), default=0) < 2 * _BURST:
        raise OptionError(
            f"no recording has an answer of {2 * _BURST + 1} tokens; make longer ones"
        )
    return Study(tuple(studied))


def time_drafts(drafter: AheadDrafter, recordings: Sequence[Recording], wait: float) -> DraftCost:
    """Time the drafter's steps in bursts, each after a wait of the target's time."""
    times: tuple[list[float], list[float]] = ([], [])
    for recording in sorted(recordings, key=lambda r: -len(r.answer))[:2]:
        rest = recording.answer[1:]
        drafter.begin(recording.prompt + recording.answer[:1], None)
        drafter.next_tokens((), 1)
        for at in range(1, len(rest) + 1):
            is_later = (at - 1) % _BURST > 0
            if not is_later:
                wait_until(time.perf_counter() + wait)
            started = time.perf_counter()
            drafter.next_tokens(rest[:at], 1)
            times[is_later].append(time.perf_counter() - started)
        drafter.rewind(0)
    return DraftCost(*(median(part) for part in times))


@dataclass(frozen=True)
class Rounds:
    """How a schedule would go.

    Attributes:
        rounds: target steps.
        redrafts: drafts for which the target waits.
    """

    rounds: int
    redrafts: int = 0


def serial_rounds(guesses: Guesses, gamma: int) -> Rounds:
    """Draft `gamma` tokens, verify them, and so on."""
    at = rounds = 0
    while at < len(guesses.ranks):
        at += _run(guesses, at, gamma) + 1
        rounds += 1
    return Rounds(rounds, rounds)


def pearl_rounds(guesses: Guesses, gamma: int) -> Rounds:
    """Draft the next block during each verification; there is none after a miss."""
    return _ahead_rounds(guesses, 0, lambda at: (1, gamma))


def duo_rounds(guesses: Guesses, gamma: int) -> Rounds:
    """The same with several shorter blocks where the first token is doubtful."""

    def fork(at: int) -> tuple[int, int]:
        count = guesses.branches(at, max(min(MOST_BRANCHES, gamma // 2), 1))
        return count, gamma // count

    return _ahead_rounds(guesses, 0, fork)


def optimistic_rounds(guesses: Guesses, gamma: int) -> Rounds:
    """As pearl, but the target waits for a block after a miss."""
    return _ahead_rounds(guesses, gamma, lambda at: (1, gamma + 1))


def _ahead_rounds(
    guesses: Guesses, miss_length: int, plan: Callable[[int], tuple[int, int]]
) -> Rounds:
    """Rounds whose block was drafted ahead, or after a miss.

    Args:
        guesses: of the drafter.
        miss_length: tokens of a block after a miss.
        plan: how many branches, and tokens of each, are drafted ahead from a token on.
    """
    at = rounds = redrafts = block = 0
    hit = False
    while at < len(guesses.ranks):
        if not hit:
            block = miss_length
            redrafts += miss_length > 0
        block = min(block, len(guesses.ranks) - at - 1)
        run = _run(guesses, at, block)
        branches, length = plan(at + run)
        hit = run == block and guesses.ranks[at + run] < branches
        block = length - 1
        at += run + 1
        rounds += 1
    return Rounds(rounds, redrafts)


def _run(guesses: Guesses, at: int, most: int) -> int:
    """How many guesses in a row are right; the last token of an answer is never drafted."""
    most = min(most, len(guesses.ranks) - at - 1)
    count = 0
    while count < most and guesses.right(at + count):
        count += 1
    return count


REPLAYS: dict[str, Callable[[Guesses, int], Rounds]] = {
    "serial": serial_rounds,
    "pearl": pearl_rounds,
    "duo": duo_rounds,
    "optimistic": optimistic_rounds,
}
