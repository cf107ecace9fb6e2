"""Token trees: what a drafter guesses may follow, ready to be verified in one step."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from forerun.errors import OptionError


@dataclass(frozen=True)
class TokenTree:
    """Drafted tokens behind the anchor (the last committed token), parents first.

    Attributes:
        tokens: id of each node.
        parents: number of the node before, always a smaller one; -1 is the anchor.
        confidences: the drafter's estimate that a node is right given that its parent is, 0 to 1.
        sources: name of the drafter behind each node.

    Raises:
        OptionError: the columns differ in length, a parent does not come before its child, or a
            confidence is not from 0 to 1.
    """

    tokens: tuple[int, ...]
    parents: tuple[int, ...]
    confidences: tuple[float, ...]
    sources: tuple[str, ...]

    EMPTY: ClassVar[TokenTree]

    def __post_init__(self) -> None:
        columns = (self.tokens, self.parents, self.confidences, self.sources)
        if len({len(column) for column in columns}) != 1:
            raise OptionError(f"a tree's columns have lengths {[len(c) for c in columns]}")
        if any(not -1 <= parent < node for node, parent in enumerate(self.parents)):
            raise OptionError(f"each parent must come before its child, got {self.parents}")
        if not all(0 <= confidence <= 1 for confidence in self.confidences):
            raise OptionError(f"confidences must be from 0 to 1, got {self.confidences}")

    @classmethod
    def chain(cls, tokens: Sequence[int], confidences: Sequence[float], source: str) -> TokenTree:
        """Tokens that follow one another, all from one drafter."""
        count = len(tokens)
        return cls(
            tuple(tokens), tuple(range(-1, count - 1)), tuple(confidences), (source,) * count
        )

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def is_chain(self) -> bool:
        """Whether every node follows the one before."""
        return self.parents == tuple(range(-1, len(self) - 1))

    def depths(self) -> np.ndarray:
        """How far behind the anchor each node is, 1 for its children; int64 [N]."""
        depths = np.ones(len(self), np.int64)
        for node, parent in enumerate(self.parents):
            if parent >= 0:
                depths[node] = depths[parent] + 1
        return depths

    def values(self) -> np.ndarray:
        """Estimate that a node and all before it are right: float64 [N], products along paths."""
        values = np.array(self.confidences, np.float64)
        for node, parent in enumerate(self.parents):
            if parent >= 0:
                values[node] *= values[parent]
        return values

    def children(self, node: int) -> list[int]:
        """Nodes right behind `node`, in order; -1 is the anchor."""
        return [child for child, parent in enumerate(self.parents) if parent == node]

    def path_to(self, node: int) -> list[int]:
        """Nodes from a child of the anchor to `node`; empty for the anchor, -1."""
        path: list[int] = []
        while node >= 0:
            path.append(node)
            node = self.parents[node]
        return path[::-1]

    def take(self, nodes: Iterable[int]) -> TokenTree:
        """The tree of some nodes, renumbered in their old order.

        Raises:
            OptionError: a node is not there, or its parent is not among them.
        """
        kept = sorted(set(nodes))
        if kept and not 0 <= kept[0] <= kept[-1] < len(self):
            raise OptionError(f"nodes {kept} are not among the {len(self)} of the tree")
        number = {-1: -1} | {node: new for new, node in enumerate(kept)}
        if any(self.parents[node] not in number for node in kept):
            raise OptionError(f"nodes {kept} lack the parent of one of them")
        if len(kept) == len(self):
            return self
        return TokenTree(
            tuple(self.tokens[node] for node in kept),
            tuple(number[self.parents[node]] for node in kept),
            tuple(self.confidences[node] for node in kept),
            tuple(self.sources[node] for node in kept),
        )

    def union(self, other: TokenTree) -> TokenTree:
        """Both trees in one: equal paths are merged and keep the larger confidence."""
        tokens, parents = list(self.tokens), list(self.parents)
        confidences, sources = list(self.confidences), list(self.sources)
        known = {pair: node for node, pair in enumerate(zip(parents, tokens, strict=True))}
        moved = {-1: -1}
        for node, token in enumerate(other.tokens):
            parent = moved[other.parents[node]]
            same = known.setdefault((parent, token), len(tokens))
            moved[node] = same
            if same == len(tokens):
                tokens.append(token)
                parents.append(parent)
                confidences.append(other.confidences[node])
                sources.append(other.sources[node])
            elif other.confidences[node] > confidences[same]:
                confidences[same] = other.confidences[node]
                sources[same] = other.sources[node]
        return TokenTree(tuple(tokens), tuple(parents), tuple(confidences), tuple(sources))

    def best_chain(self) -> TokenTree:
        """The path with the largest sum of values: what is left where only chains can be run."""
        if self.is_chain:
            return self
        totals = self.values()
        for node, parent in enumerate(self.parents):
            if parent >= 0:
                totals[node] += totals[parent]
        return self.take(self.path_to(int(totals.argmax())))

    def limited(self, nodes: int, depth: int) -> TokenTree:
        """At most `nodes` nodes, none deeper than `depth`; those of least value go first."""
        if len(self) <= min(nodes, depth):
            return self
        values = self.values()
        shallow = np.flatnonzero(self.depths() <= depth)
        # Stable, and a child is worth no more than its parent: the parent always comes first.
        order = shallow[np.argsort(-values[shallow], kind="stable")]
        return self.take(order[: max(nodes, 0)].tolist())

    def row_parents(self) -> list[int]:
        """Parents for `Runner.step`: row 0 is the anchor (parent -1), row i + 1 is node i."""
        return [-1, *(parent + 1 for parent in self.parents)]


TokenTree.EMPTY = TokenTree((), (), (), ())
