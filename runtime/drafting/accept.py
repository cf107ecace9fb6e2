"""Which drafted tokens become text: the walk from the anchor down a verified tree."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from forerun.runtime.drafting.tree import TokenTree
from forerun.runtime.sampling import Distribution

Pick = Callable[[np.ndarray, Sequence[int]], int]
"""(logits float32 [V] of a row, accepted tokens before it in this round) -> the model's token."""
Process = Callable[[np.ndarray, Sequence[int]], Distribution]
"""The same arguments -> the distribution the token is drawn from."""


@dataclass(frozen=True)
class Walk:
    """How far a tree was right.

    Attributes:
        path: accepted nodes, from a child of the anchor on.
        next_token: the model's own token behind the last of them.
        overruled: how many accepted tokens the model had not chosen; 0 for every exact rule.
    """

    path: tuple[int, ...]
    next_token: int
    overruled: int = 0


class AcceptRule(Protocol):
    """Decides which nodes of a verified tree become text.

    Attributes:
        name: what it is called in options.
        exact: whether the text is the one that plain decoding gives.
    """

    name: str
    exact: bool

    def walk(self, tree: TokenTree, logits: np.ndarray, pick: Pick) -> Walk:
        """Walk down the tree.

        Args:
            tree: what was verified.
            logits: float32 [1 + N, V]; row 0 is the anchor's, row i + 1 that of node i.
            pick: chooses the model's token at a row, with that row's own history and position.
        """
        ...


class MatchWalk:
    """Follow the model's own choice for as long as the tree holds it.

    The choice at a row does not depend on the draft, so the text is that of plain decoding for any
    drafter; with position-keyed noise it is the same text, not only the same law. No exact rule
    can accept more of a set of children that was fixed beforehand.
    """

    name = "match"
    exact = True

    def walk(self, tree: TokenTree, logits: np.ndarray, pick: Pick) -> Walk:
        """See `AcceptRule.walk`. Rows behind the first mismatch are not looked at."""
        path: list[int] = []
        tokens: list[int] = []
        node = -1
        while True:
            token = pick(logits[node + 1], tokens)
            child = _child_with(tree, node, token)
            if child is None:
                return Walk(tuple(path), token)
            path.append(child)
            tokens.append(token)
            node = child


class Relaxed:
    """Also accept a drafted token that is typical for the model. Lossy: the text changes.

    A child is accepted although the model chose otherwise if its probability reaches
    ``min(epsilon, delta * exp(-entropy))`` (typical acceptance: Hewitt 2022, Cai 2024, Medusa).

    Args:
        process: gives the model's distribution at a row.
        epsilon: probability that always suffices.
        delta: share of exp(-entropy) that suffices.
    """

    name = "relaxed"
    exact = False

    def __init__(self, process: Process, epsilon: float = 0.09, delta: float = 0.3) -> None:
        self.epsilon, self.delta = epsilon, delta
        self._process = process

    def walk(self, tree: TokenTree, logits: np.ndarray, pick: Pick) -> Walk:
        """See `AcceptRule.walk`; where the model's own choice is drafted, that one is taken."""
        path: list[int] = []
        tokens: list[int] = []
        node, overruled = -1, 0
        while True:
            row = logits[node + 1]
            token = pick(row, tokens)
            child = _child_with(tree, node, token)
            if child is None:
                child = self._typical_child(tree, node, self._process(row, tokens))
                overruled += child is not None
            if child is None:
                return Walk(tuple(path), token, overruled)
            path.append(child)
            tokens.append(tree.tokens[child])
            node = child

    def total_variation(self, tree: TokenTree, node: int, distribution: Distribution) -> float:
        """How far one row's law is from the model's: half the sum of |p - p'|, 0 to 1.

        Wherever a child is typical, all choices that are not drafted turn into that child.
        """
        if self._typical_child(tree, node, distribution) is None:
            return 0.0
        drafted = [tree.tokens[child] for child in tree.children(node)]
        p = np.exp(distribution.log_probabilities())
        return float(p[~np.isin(distribution.ids, drafted)].sum())

    def _typical_child(self, tree: TokenTree, node: int, distribution: Distribution) -> int | None:
        """The most probable child whose probability suffices."""
        children = tree.children(node)
        if not children:
            return None
        logp = distribution.log_probabilities()
        likely = logp[np.isfinite(logp)]
        entropy = -float((np.exp(likely) * likely).sum())
        bound = min(math.log(self.epsilon), math.log(self.delta) - entropy)
        scores = dict(zip(distribution.ids.tolist(), logp.tolist(), strict=True))
        found = [(scores.get(tree.tokens[child], -math.inf), -child) for child in children]
        best, child = max(found)
        return -child if best >= bound else None


def _child_with(tree: TokenTree, node: int, token: int) -> int | None:
    """The child of `node` that holds `token`; children come after their parent."""
    for child in range(node + 1, len(tree)):
        if tree.parents[child] == node and tree.tokens[child] == token:
            return child
    return None


@dataclass(frozen=True)
class AcceptRow:
    """One accept rule that can be asked for.

    Attributes:
        name: what it is called in options.
        exact: whether the text is the one that plain decoding gives.
        summary: one line for help texts.
        make: builds it, given what computes the model's distribution at a row.
    """

    name: str
    exact: bool
    summary: str
    make: Callable[[Process], AcceptRule]


ACCEPT_RULES: dict[str, AcceptRow] = {
    row.name: row
    for row in (
        AcceptRow("match", True, "the text of plain decoding", lambda process: MatchWalk()),
        AcceptRow("relaxed", False, "lossy: typical drafts are kept", Relaxed),
    )
}
