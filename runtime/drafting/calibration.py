"""How often drafted tokens really are right, by drafter, depth and the drafter's confidence."""

from __future__ import annotations

from bisect import bisect_right
from typing import TYPE_CHECKING

import numpy as np

from forerun.runtime.drafting.hits import checked

if TYPE_CHECKING:
    import random
    from collections.abc import Iterable, Sequence

    from forerun.runtime.drafting.tree import TokenTree

_EDGES = (0.1, 0.2, 0.35, 0.5, 0.65, 0.8, 0.9, 0.97)
_DEPTHS = 4
_WIDTH = len(_EDGES) + 1
_LOW, _HIGH = 0.01, 0.99
_UNKNOWN = 0.7


class Calibration:
    """Acceptance given that the parent was accepted, as Beta counts whose past fades.

    A bin is a drafter, a depth (1, 2, 3, 4 and more) and a range of confidence. Before anything
    was seen, a node is worth what the drafter says.

    Args:
        weight: how many observations the drafter's own confidence counts for.
        decay: what a bin's counts are multiplied with when a newer observation comes.
    """

    def __init__(self, weight: float = 3.0, decay: float = 0.98) -> None:
        self._weight, self._decay = weight, decay
        self._bins: dict[str, list[list[float]]] = {}

    def rate(self, source: str, depth: int, confidence: float) -> float:
        """Mean chance that a node is right, given that its parent is.

        Args:
            source: name of the drafter.
            depth: 1 for children of the anchor.
            confidence: what the drafter says, 0..1.
        """
        hits, total = self._counts(source)[_bin(depth, confidence)]
        said = min(max(confidence, _LOW), _HIGH)
        return (hits + self._weight * said) / (total + self._weight)

    def mean(self, source: str, depth: int) -> float:
        """Chance that a node at this depth is right, whatever the drafter will say of it."""
        first = (min(depth, _DEPTHS) - 1) * _WIDTH
        bins = self._counts(source)[first : first + _WIDTH]
        hits, total = sum(pair[0] for pair in bins), sum(pair[1] for pair in bins)
        return (hits + self._weight * _UNKNOWN) / (total + self._weight)

    def draw(self, source: str, depth: int, confidence: float, noise: random.Random) -> float:
        """The same chance, drawn from its Beta law instead of its mean (Thompson sampling)."""
        hits, total = self._counts(source)[_bin(depth, confidence)]
        said = min(max(confidence, _LOW), _HIGH)
        misses = total - hits + self._weight * (1 - said)
        return noise.betavariate(hits + self._weight * said, misses)

    def values(self, tree: TokenTree, noise: random.Random | None = None) -> list[float]:
        """Chance that each node and all before it are right; drawn if `noise` is given."""
        # Written out instead of calling `rate` for each node: this runs in every round.
        values: list[float] = []
        depths: list[int] = []
        weight, known, bins = self._weight, "", []
        for parent, said, source in zip(tree.parents, tree.confidences, tree.sources, strict=True):
            if source != known:
                known, bins = source, self._counts(source)
            depth = 1 if parent < 0 else depths[parent] + 1
            depths.append(depth)
            row = depth - 1 if depth < _DEPTHS else _DEPTHS - 1
            hits, total = bins[row * _WIDTH + bisect_right(_EDGES, said)]
            said = _LOW if said < _LOW else _HIGH if said > _HIGH else said
            if noise is None:
                value = (hits + weight * said) / (total + weight)
            else:
                right = hits + weight * said
                value = noise.betavariate(right, total + weight - right)
            values.append(value if parent < 0 else value * values[parent])
        return values

    def value(self, tree: TokenTree) -> np.ndarray:
        """`values` as float64 [N]."""
        return np.array(self.values(tree), np.float64)

    def observe(self, tree: TokenTree, path: Iterable[int]) -> None:
        """Count the nodes that a verified round decided: those behind an accepted parent."""
        accepted = set(path)
        depths = {-1: 0}
        for node, parent in enumerate(tree.parents):
            if parent in depths:
                hit = node in accepted
                if hit:
                    depths[node] = depths[parent] + 1
                self._count(tree, node, depths[parent] + 1, hit)

    def judge(self, tree: TokenTree, came: Sequence[int]) -> None:
        """Count the nodes that the text decided, verified or not.

        Args:
            tree: as proposed.
            came: ids that now stand behind the tree's anchor.
        """
        depths = {-1: 0}
        for node, hit in checked(tree, came):
            depths[node] = depths[tree.parents[node]] + 1
            self._count(tree, node, depths[node], hit)

    def _count(self, tree: TokenTree, node: int, depth: int, hit: bool) -> None:
        counts = self._counts(tree.sources[node])[_bin(depth, tree.confidences[node])]
        counts[0] = counts[0] * self._decay + hit
        counts[1] = counts[1] * self._decay + 1.0

    def _counts(self, source: str) -> list[list[float]]:
        bins = self._bins.get(source)
        if bins is None:
            bins = self._bins[source] = [[0.0, 0.0] for _ in range(_DEPTHS * _WIDTH)]
        return bins


def _bin(depth: int, confidence: float) -> int:
    return (min(depth, _DEPTHS) - 1) * _WIDTH + bisect_right(_EDGES, confidence)
