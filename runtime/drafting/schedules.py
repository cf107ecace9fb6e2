"""The schedules by name: who waits for whom, the drafter or the target."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from forerun.errors import OptionError
from forerun.runtime.drafting.accept import AcceptRule
from forerun.runtime.drafting.async_rounds import AsyncRounds, Overlap
from forerun.runtime.drafting.drafter import Drafter
from forerun.runtime.drafting.fixed import DraftPolicy
from forerun.runtime.drafting.rounds import DraftRounds, Rounds
from forerun.runtime.prefix import PrefixCache
from forerun.runtime.types import SamplingParams


class MakeRounds(Protocol):
    """Builds the rounds of one generation; arguments as in `DraftRounds`.

    Raises:
        UnsupportedError: the drafter cannot follow this schedule.
    """

    def __call__(
        self,
        cache: PrefixCache,
        drafter: Drafter,
        policy: DraftPolicy,
        rule: AcceptRule,
        *,
        params: SamplingParams | None = None,
        trees: bool = True,
        cancelled: Callable[[], bool] = lambda: False,
    ) -> Rounds:
        """Build them."""
        ...


@dataclass(frozen=True)
class ScheduleRow:
    """One schedule that can be asked for.

    Attributes:
        name: what it is called in options and statistics.
        summary: one line for help texts.
        overlap: how it runs ahead; None if drafter and target take turns.
    """

    name: str
    summary: str
    overlap: Overlap | None = None

    @property
    def make(self) -> MakeRounds:
        """What builds its rounds."""
        if self.overlap is None:
            return DraftRounds
        return functools.partial(_overlapped, overlap=self.overlap)


SCHEDULES: dict[str, ScheduleRow] = {
    row.name: row
    for row in (
        ScheduleRow("serial", "draft, then verify"),
        ScheduleRow("pearl", "draft the next block during each verification", Overlap()),
        ScheduleRow("duo", "as pearl, with several short chains in doubt", Overlap(forks=True)),
        ScheduleRow(
            "optimistic",
            "as pearl, but after a miss the target waits for a new block",
            Overlap(redrafts=True),
        ),
    )
}


def find_schedule(name: str) -> ScheduleRow:
    """The schedule of this name.

    Raises:
        OptionError: there is none.
    """
    if name not in SCHEDULES:
        raise OptionError(f"the schedule is {name!r}; it must be one of {', '.join(SCHEDULES)}")
    return SCHEDULES[name]


def _overlapped(
    cache: PrefixCache,
    drafter: Drafter,
    policy: DraftPolicy,
    rule: AcceptRule,
    *,
    overlap: Overlap,
    params: SamplingParams | None = None,
    trees: bool = True,
    cancelled: Callable[[], bool] = lambda: False,
) -> Rounds:
    """Blocks are chains, which every target can verify, so `trees` makes no difference."""
    return AsyncRounds(cache, drafter, policy, rule, overlap, params=params, cancelled=cancelled)
