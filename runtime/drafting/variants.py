"""Published policies that do not measure what they gain, for experiments and comparisons."""

from __future__ import annotations

from typing import TYPE_CHECKING

from forerun.runtime.drafting.measured import kept

if TYPE_CHECKING:
    from collections.abc import Sequence

    from forerun.runtime.drafting.guide import Guide
    from forerun.runtime.drafting.tree import TokenTree

_NODES = 8
_DEPTH = 10
_LEAST_DELTA, _LARGEST_DELTA = 0.02, 1.0


class ConfidencePolicy:
    """The N nodes with the largest products of the drafter's own confidences, as in EAGLE-2.

    Args:
        guide: measured costs, which it does not look at.
        nodes: N.
    """

    name = "confidence"

    def __init__(self, guide: Guide | None = None, nodes: int = _NODES) -> None:
        self._nodes = nodes

    def budget(self, depth: int) -> int:
        """Always the same; see `DraftPolicy.budget`."""
        return self._nodes

    def keep_going(self, drafted: int, value: float, depth: int) -> bool:
        """Until there are N nodes; see `DraftPolicy.keep_going`."""
        return drafted < self._nodes

    def prune(self, tree: TokenTree, draft_seconds: float, depth: int) -> TokenTree:
        """The N best; see `DraftPolicy.prune`."""
        values = tree.values()
        # Stable, and no node is worth more than its parent, so parents stay in front.
        order = sorted(range(len(values)), key=lambda node: -values[node])
        return kept(tree, order, min(self._nodes, len(order)))

    def observe(
        self,
        tree: TokenTree,
        path: Sequence[int],
        draft_seconds: float,
        verify_seconds: float,
        depth: int,
        new_tokens: Sequence[int] = (),
    ) -> None:
        """It learns nothing; see `DraftPolicy.observe`."""


class OptTreePolicy:
    """OPT-Tree: a level more only while it adds more than delta expected tokens.

    Delta is the time of a draft step in units of a plain step, as its authors' theory wants, and
    is measured while it runs.

    Args:
        guide: measured costs.
        nodes: largest number of nodes.
    """

    name = "opt-tree"

    def __init__(self, guide: Guide, nodes: int = _NODES) -> None:
        self._guide, self._nodes = guide, nodes
        self._delta = 0.1

    def budget(self, depth: int) -> int:
        """Always the same; see `DraftPolicy.budget`."""
        return self._nodes

    def keep_going(self, drafted: int, value: float, depth: int) -> bool:
        """While the last node was worth more than delta; see `DraftPolicy.keep_going`."""
        return drafted < min(self._nodes, _DEPTH) and value > self._delta

    def prune(self, tree: TokenTree, draft_seconds: float, depth: int) -> TokenTree:
        """The N best nodes of the levels that add more than delta; see `DraftPolicy.prune`."""
        values, levels = tree.values(), tree.depths()
        order: list[int] = []
        expected = 0.0
        for level in range(1, int(levels.max(initial=0)) + 1):
            found = [node for node in range(len(values)) if levels[node] <= level]
            found = sorted(found, key=lambda node: -values[node])[: self._nodes]
            total = float(sum(values[node] for node in found))
            if total - expected <= self._delta:
                break
            order, expected = found, total
        return kept(tree, order, len(order))

    def observe(
        self,
        tree: TokenTree,
        path: Sequence[int],
        draft_seconds: float,
        verify_seconds: float,
        depth: int,
        new_tokens: Sequence[int] = (),
    ) -> None:
        """Measure delta; see `DraftPolicy.observe`."""
        if tree.tokens:
            steps = int(tree.depths().max())
            step = draft_seconds / steps / self._guide.plain(depth)
            step = min(max(step, _LEAST_DELTA), _LARGEST_DELTA)
            self._delta += 0.1 * (step - self._delta)
