"""How many drafts a target would accept."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

import numpy as np


@dataclass
class Acceptance:
    """Counts of accepted drafts on greedy answers.

    Attributes:
        steps: drafts per round.
        tried: int64 [steps], drafts whose predecessors were all accepted.
        accepted: int64 [steps], how many of these were accepted.
        rounds: rounds of drafting and verification.
        tokens: tokens that these rounds gave.
    """

    steps: int
    rounds: int = 0
    tokens: int = 0
    tried: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    accepted: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))

    def __post_init__(self) -> None:
        self.tried = np.zeros(self.steps, np.int64)
        self.accepted = np.zeros(self.steps, np.int64)

    def add(self, right: np.ndarray, valid: np.ndarray) -> None:
        """Count one answer.

        Args:
            right: bool [T, steps], draft s behind token t would be accepted, were those before.
            valid: bool [T, steps], the answer reaches that far.
        """
        right = right & valid
        chain = np.cumprod(right, 1).astype(bool)
        before = np.concatenate([np.ones((len(right), 1), bool), chain[:, :-1]], 1)
        self.tried += (before & valid).sum(0)
        self.accepted += chain.sum(0)
        place = 0
        while place < len(right):
            gained = int(chain[place].sum()) + 1
            self.rounds, self.tokens, place = self.rounds + 1, self.tokens + gained, place + gained

    def rates(self) -> list[float]:
        """Acceptance by step, given that all drafts before were accepted."""
        return [float(x) for x in self.accepted / np.maximum(self.tried, 1)]

    def per_round(self) -> float:
        """Tokens per round, the target's own included."""
        return self.tokens / max(self.rounds, 1)


class Scores:
    """Acceptance over all answers and by category."""

    def __init__(self, steps: int) -> None:
        self.total = Acceptance(steps)
        self.by_category: dict[str, Acceptance] = defaultdict(lambda: Acceptance(steps))

    def add(self, category: str, right: np.ndarray, valid: np.ndarray) -> None:
        """Count one answer, see `Acceptance.add`."""
        self.total.add(right, valid)
        self.by_category[category].add(right, valid)

    def facts(self) -> dict[str, Any]:
        """What a drafter's card says."""
        rates = {str(i + 1): round(r, 4) for i, r in enumerate(self.total.rates())}
        kinds = {
            name: {"1": round(a.rates()[0], 4), "tokens_per_round": round(a.per_round(), 3)}
            for name, a in sorted(self.by_category.items())
        }
        return rates | {
            "tokens_per_round": round(self.total.per_round(), 3),
            "by_category": kinds,
        }
