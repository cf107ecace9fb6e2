"""What drafting did during one generation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from forerun.runtime.drafting.tree import TokenTree


@dataclass
class DraftTally:
    """Adds up the rounds of a generation.

    Attributes:
        proposed: drafted tokens that were verified.
        accepted: drafted tokens that were kept.
        overruled: accepted tokens that the model had not chosen; only with a lossy rule.
        draft_seconds: time spent in the drafter.
        verify_seconds: time of the steps that verified.
        acceptance: drafter to depth (1 is right behind the anchor) to [proposed, accepted].
        rounds: (tokens in the KV cache before it, tokens it gave) of every round.
    """

    proposed: int = 0
    accepted: int = 0
    overruled: int = 0
    draft_seconds: float = 0.0
    verify_seconds: float = 0.0
    acceptance: dict[str, dict[int, list[int]]] = field(default_factory=dict)
    rounds: list[tuple[int, int]] = field(default_factory=list)

    def add_round(self, tree: TokenTree, path: Sequence[int], depth: int) -> None:
        """Count a verified round that began with `depth` tokens in the KV cache."""
        self.proposed += len(tree)
        self.accepted += len(path)
        self.rounds.append((depth, len(path) + 1))
        if not len(tree):
            return
        kept = set(path)
        for node, level in enumerate(tree.depths().tolist()):
            of_source = self.acceptance.setdefault(tree.sources[node], {})
            counts = of_source.setdefault(level, [0, 0])
            counts[0] += 1
            counts[1] += node in kept
