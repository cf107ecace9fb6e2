"""What the policy and the choice among drafters both go by: step costs and acceptance."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from forerun.runtime.drafting.calibration import Calibration
from forerun.runtime.drafting.costs import LiveCosts, StepCosts

if TYPE_CHECKING:
    import random
    from collections.abc import Sequence

    from forerun.runtime.drafting.tree import TokenTree


@dataclass
class Guide:
    """Costs and acceptance as measured so far; one per target, shared and updated by its users.

    Attributes:
        costs: of the target's steps.
        calibration: acceptance of each drafter.
    """

    costs: LiveCosts
    calibration: Calibration = field(default_factory=Calibration)

    @classmethod
    def of(cls, table: StepCosts) -> Guide:
        """A guide that knows the costs and nothing else."""
        return cls(LiveCosts(table))

    def plain(self, depth: int) -> float:
        """Seconds of a round that gives one token."""
        return self.costs.curve(depth)[1]

    def ranked(
        self, tree: TokenTree, noise: random.Random | None = None
    ) -> tuple[list[int], list[float]]:
        """Nodes by value, best first and parents before children, and their values."""
        values = self.calibration.values(tree, noise)
        order = list(range(len(values)))
        if any(a < b for a, b in itertools.pairwise(values)):
            # Stable, and no node is worth more than its parent, so parents stay in front.
            order.sort(key=lambda node: -values[node])
            values = [values[node] for node in order]
        return order, values

    def best(
        self, values: Sequence[float], draft_seconds: float, depth: int, most: int | None = None
    ) -> tuple[int, float]:
        """How many nodes to verify, and the tokens per second to expect of the round.

        The n that maximises (1 + sum of the n largest values) / (draft time + T(n + 1)).

        Args:
            values: of the nodes, falling.
            draft_seconds: time the draft took.
            depth: cached tokens.
            most: largest n.
        """
        curve = self.costs.curve(depth)
        last = min(len(values), len(curve) - 2)
        if most is not None and most < last:
            last = most
        tokens, count = 1.0, 0
        best = 1.0 / (draft_seconds + curve[1])
        for n in range(last):
            tokens += values[n]
            rate = tokens / (draft_seconds + curve[n + 2])
            if rate > best:
                best, count = rate, n + 1
        return count, best
