"""The policies by name, and how a drafter gets one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from forerun.errors import OptionError
from forerun.runtime.drafting.fixed import DEFAULT_BUDGET, DraftPolicy, FixedPolicy
from forerun.runtime.drafting.guide import Guide
from forerun.runtime.drafting.measured import MeasuredPolicy, ThompsonPolicy
from forerun.runtime.drafting.variants import ConfidencePolicy, OptTreePolicy

if TYPE_CHECKING:
    from forerun.runtime.drafting.costs import StepCosts
    from forerun.runtime.drafting.drafter import Drafter

DEFAULT_POLICY = "measured"
_MOST = 64


@dataclass(frozen=True)
class PolicyRow:
    """One policy.

    Attributes:
        name: what it is called; ``fixed:N`` is the row ``fixed`` with its number.
        make: builds it from costs and, for those that take one, a number of nodes.
        summary: one line for help texts.
    """

    name: str
    make: Callable[[Guide, int], DraftPolicy]
    summary: str


POLICIES: dict[str, PolicyRow] = {
    row.name: row
    for row in (
        PolicyRow(
            "measured",
            lambda guide, n: MeasuredPolicy(guide),
            "as many tokens as measured costs and acceptance make worth it",
        ),
        PolicyRow("fixed", lambda guide, n: FixedPolicy(n), "always N tokens"),
        PolicyRow(
            "opt-tree",
            lambda guide, n: OptTreePolicy(guide),
            "a level more while it adds enough expected tokens (OPT-Tree)",
        ),
        PolicyRow(
            "confidence",
            lambda guide, n: ConfidencePolicy(guide),
            "the tokens with the largest products of confidences (EAGLE-2)",
        ),
        PolicyRow(
            "thompson",
            lambda guide, n: ThompsonPolicy(guide),
            "as measured, with acceptances drawn from their Beta laws (EESD)",
        ),
    )
}


def check_policy(name: str) -> tuple[str, int]:
    """Read the name of a policy: its row, and its number of tokens.

    Args:
        name: one of `POLICIES`; ``fixed:N`` sets the number of tokens, 0 to 64.

    Raises:
        OptionError: there is no such policy, or it takes no number, or none like this.
    """
    kind, colon, number = name.partition(":")
    if kind not in POLICIES or (colon and kind != "fixed"):
        raise OptionError(
            f"the policy is {name!r}; it must be one of {', '.join(POLICIES)} or fixed:N"
        )
    if colon and not (number.isascii() and number.isdigit() and int(number) <= _MOST):
        raise OptionError(f"the policy is {name!r}; fixed:N needs a number from 0 to {_MOST}")
    return kind, int(number) if colon else DEFAULT_BUDGET


def make_policy(name: str, guide: Guide) -> DraftPolicy:
    """Build a policy.

    Args:
        name: as in `check_policy`.
        guide: costs and acceptance of the target.

    Raises:
        OptionError: as `check_policy`.
    """
    kind, nodes = check_policy(name)
    return POLICIES[kind].make(guide, nodes)


def policy_maker(costs: StepCosts, name: str = DEFAULT_POLICY) -> Callable[[Drafter], DraftPolicy]:
    """What gives each drafter of a target its policy, for `choice.Drafters`.

    Each drafter gets a guide of its own, which an `AutoDrafter` shares with its policy.

    Raises:
        OptionError: as `make_policy`, at once.
    """
    check_policy(name)

    def make(drafter: Drafter) -> DraftPolicy:
        guide = Guide.of(costs)
        # An AutoDrafter, or what wraps one, chooses by the same figures as the policy.
        share = getattr(drafter, "follow", None)
        if share is not None:
            share(guide)
        return make_policy(name, guide)

    return make
