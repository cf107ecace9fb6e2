"""How one generation drafts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from forerun.errors import OptionError
from forerun.runtime.drafting.accept import ACCEPT_RULES
from forerun.runtime.drafting.drafter import Drafter
from forerun.runtime.drafting.fixed import DraftPolicy
from forerun.runtime.drafting.schedules import SCHEDULES


class PlainCosts(Protocol):
    """What steps of the model cost; only those of one row are asked for here."""

    def step(self, n: int, depth: int) -> float:
        """Seconds of a step of `n` rows behind `depth` tokens."""
        ...


@dataclass(frozen=True)
class DraftPlan:
    """How one generation drafts.

    Attributes:
        drafter: guesses.
        policy: decides how much.
        accept: name of the accept rule.
        schedule: name of the schedule.
        trees: whether the model may verify trees.
        device: where the drafter runs.
        costs: of the model's steps if they are known; the speed-up is told against them.

    Raises:
        OptionError: there is no such rule or schedule.
    """

    drafter: Drafter
    policy: DraftPolicy
    accept: str = "match"
    schedule: str = "serial"
    trees: bool = False
    device: str = "cpu"
    costs: PlainCosts | None = None

    def __post_init__(self) -> None:
        check_name("accept", self.accept, ACCEPT_RULES)
        check_name("schedule", self.schedule, SCHEDULES)


def check_name(option: str, name: object, table: Mapping[str, object]) -> None:
    """Refuse a name that is not in a table.

    Raises:
        OptionError: it is not.
    """
    if name not in table:
        raise OptionError(f"{option} {name!r} is not known; it can be {', '.join(table)}")
