"""What is counted while a schedule runs on a simulated target."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from forerun.runtime.drafting.async_rounds import AheadCounts
from forerun.runtime.drafting.fixed import FixedPolicy
from forerun.runtime.drafting.tree import TokenTree


@dataclass
class Counts:
    """What came of the verified drafts.

    Attributes:
        drafted: tokens that were verified.
        right: those that were accepted.
        wrong: drafts that went wrong at some token.
        rounds: target steps.
        verify: seconds of them.
    """

    drafted: int = 0
    right: int = 0
    wrong: int = 0
    rounds: int = 0
    verify: float = 0.0


@dataclass(frozen=True)
class CountingPolicy(FixedPolicy):
    """Drafts the same number of tokens in every round, and counts what came of it."""

    counts: Counts = field(default_factory=Counts)

    def observe(
        self,
        tree: TokenTree,
        path: Sequence[int],
        draft_seconds: float,
        verify_seconds: float,
        depth: int,
        new_tokens: Sequence[int] = (),
    ) -> None:
        """Count a round."""
        counts = self.counts
        counts.drafted += len(tree)
        counts.right += len(path)
        counts.wrong += len(path) < len(tree)
        counts.rounds += 1
        counts.verify += verify_seconds


@dataclass
class Run:
    """One schedule over all recordings; the first token of each answer is left out.

    Attributes:
        schedule: its name.
        gamma: draft length.
        counts: what came of the verified drafts.
        ahead: what was drafted ahead; all 0 if nothing was.
        seconds: of all.
        drafting: seconds in the drafter.
        tokens: said.
    """

    schedule: str
    gamma: int
    counts: Counts
    ahead: AheadCounts = field(default_factory=AheadCounts)
    seconds: float = 0.0
    drafting: float = 0.0
    tokens: int = 0

    @property
    def step_seconds(self) -> float:
        """Mean time of a draft step."""
        steps = self.counts.drafted if self.schedule == "serial" else self.ahead.steps
        return self.drafting / max(steps, 1)

    @property
    def steps(self) -> float:
        """Draft steps beside a verification. A draft is cut short where the target is done."""
        return self.ahead.steps_beside / max(self.ahead.drafts, 1)

    @property
    def length(self) -> int:
        """Tokens of the longest branch drafted ahead, on average."""
        return max(round(self.ahead.lengths / max(self.ahead.drafts, 1)), 1)

    @property
    def alpha(self) -> float:
        """Drafted tokens that were right / those that were tried.

        The first tokens of what was drafted ahead count too, unless there were several of them.
        """
        counts, ahead = self.counts, self.ahead
        right, wrong = counts.right, counts.wrong
        if self.schedule != "duo":
            right, wrong = right + ahead.hits, wrong + ahead.tries - ahead.hits
        return right / (right + wrong) if right + wrong else 0.0
