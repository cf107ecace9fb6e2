"""How often drafted tokens were right, kept by the drafters that have no probabilities."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterator, Sequence

    from forerun.runtime.drafting.tree import TokenTree

_TAIL = 8


class HitRates:
    """Beta counts per kind of guess, of which older ones fade.

    Args:
        prior: gives the rate of a kind before anything was seen, in 0..1.
        weight: how many guesses the prior counts for.
        decay: what a count is multiplied with when a newer one of its kind comes.
    """

    def __init__(
        self, prior: Callable[[Hashable], float], weight: float = 6.0, decay: float = 0.98
    ) -> None:
        self._prior = prior
        self._weight = weight
        self._decay = decay
        self._counts: dict[Hashable, list[float]] = {}

    def rate(self, kind: Hashable) -> float:
        """Estimated chance that a guess of this kind is right."""
        hits, total = self._counts.get(kind, (0.0, 0.0))
        return (hits + self._weight * self._prior(kind)) / (total + self._weight)

    def record(self, kind: Hashable, hit: bool) -> None:
        """Count one guess that was checked."""
        counts = self._counts.setdefault(kind, [0.0, 0.0])
        counts[0] = counts[0] * self._decay + hit
        counts[1] = counts[1] * self._decay + 1.0


class Guesses:
    """The last proposal of a drafter, and what became of it.

    It is judged by the text that came, not by what was verified: guesses that the policy pruned
    count too, so that a drafter learns while it is not listened to.
    """

    def __init__(self, rates: HitRates) -> None:
        self._rates = rates
        self._tree: TokenTree | None = None
        self._kinds: Sequence[Hashable] = ()
        self._at = 0
        self._tail: list[int] = []

    def remember(self, ids: Sequence[int], tree: TokenTree, kinds: Sequence[Hashable]) -> None:
        """Note what was proposed behind `ids`, with the kind of each node."""
        self._tree, self._kinds = tree, kinds
        self._at, self._tail = len(ids), list(ids[-_TAIL:])

    def judge(self, ids: Sequence[int], before: int) -> None:
        """Count hits and misses, now that `ids` are committed and `before` of them were."""
        tree, at = self._tree, self._at
        self._tree = None
        if tree is None or not before <= at < len(ids):
            return
        # The guess may have been made behind other guesses, which must have come true.
        if list(ids[max(at - _TAIL, 0) : at]) != self._tail:
            return
        for node, hit in checked(tree, ids[at:]):
            self._rates.record(self._kinds[node], hit)


def checked(tree: TokenTree, came: Sequence[int]) -> Iterator[tuple[int, bool]]:
    """Yield (node, whether it was right) for each node that the text `came` decides."""
    depth_of = {-1: 0}
    for node, (token, parent) in enumerate(zip(tree.tokens, tree.parents, strict=True)):
        depth = depth_of.get(parent)
        if depth is None or depth >= len(came):
            continue
        hit = token == came[depth]
        if hit:
            depth_of[node] = depth + 1
        yield node, hit
