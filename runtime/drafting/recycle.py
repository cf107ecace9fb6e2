"""Guessing from what the target thought before: token recycling with adaptive tri-grams.

Every verified row tells the target's best tokens behind one token. They are kept in a table
[V, k] and read as a bigram model (Luo et al. 2024, "Turning Trash into Treasure"). Where the text
has had the same two tokens before, what followed them is offered too (Liu et al. 2024, ADED). The
search is best-first by the product of hit rates that are measured per kind of guess.
"""

from __future__ import annotations

import heapq
from typing import TYPE_CHECKING, Any

import numpy as np

from forerun.errors import OptionError
from forerun.runtime.drafting.hits import Guesses, HitRates
from forerun.runtime.drafting.suffix import SuffixIndex
from forerun.runtime.drafting.top import top_ids
from forerun.runtime.drafting.tree import TokenTree

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterable, Sequence

    from forerun.runtime.drafting.drafter import Outcome

_PLACES = 8
_LEAST_VALUE = 0.02
# Edges of how much larger the best logit was than the second, in nats.
_MARGINS = np.array([0.5, 1.5, 3.0, 6.0], np.float32)
# Hit rates as measured on answers of a small model; what is measured in use replaces them.
_TABLE_PRIORS = (0.12, 0.17, 0.22, 0.28, 0.33)
_TEXT_PRIORS = {"sure": (0.70, 0.90, 0.95, 0.98), "split": (0.27, 0.55, 0.70, 0.77)}
_RANK_FADE = 0.4

Successor = tuple[float, int, "Hashable"]


class RecycleDrafter:
    """Proposes from the target's own earlier top tokens and from the text's tri-grams.

    Args:
        vocab: ids of the target.
        width: tokens kept per id.
        branches: successors tried per node; above 1 the proposals are trees.

    Raises:
        OptionError: a number is out of range.
    """

    name = "recycle"
    needs_features = False

    def __init__(self, vocab: int, width: int = 4, branches: int = 1) -> None:
        if vocab < 1 or not 1 <= width <= 16 or not 1 <= branches <= 16:
            raise OptionError(
                "vocab must be positive, width and branches in 1..16, "
                f"got {vocab}, {width} and {branches}"
            )
        self.proposes_trees = branches > 1
        self._width = min(width, vocab)
        self._branches = branches
        self._best = np.full((vocab, self._width), -1, np.int32)
        self._margin = np.zeros(vocab, np.int8)
        self._scratch = np.empty(vocab, np.float32)
        self._text = SuffixIndex(2)
        self._rates = HitRates(_prior)
        self._guesses = Guesses(self._rates)

    def begin(self, ids: Sequence[int], features: Any = None) -> None:
        """Take up a text; the table is kept from text to text."""
        self._text.replace(ids)

    def propose(self, budget: int, keep_going: Callable[[float], bool] | None = None) -> TokenTree:
        """Propose the most promising nodes, at most `budget`."""
        ids = self._text.ids
        if not ids or budget < 1:
            return TokenTree.EMPTY
        tokens: list[int] = []
        parents: list[int] = []
        confidences: list[float] = []
        kinds: list[Hashable] = []
        before = ids[-2] if len(ids) > 1 else -1
        # Entries: minus value, age (so that equal values keep their order), node, its parent.
        open_nodes: list[tuple[float, int, Successor, int, int]] = []
        age = self._push(open_nodes, 1.0, self._successors(before, ids[-1]), -1, ids[-1], 0)
        while open_nodes and len(tokens) < budget:
            negative, _, (rate, token, kind), parent, previous = heapq.heappop(open_nodes)
            node = len(tokens)
            tokens.append(token)
            parents.append(parent)
            confidences.append(rate)
            kinds.append(kind)
            following = self._successors(previous, token)
            age = self._push(open_nodes, -negative, following, node, token, age)
        if not tokens:
            return TokenTree.EMPTY
        sources = (self.name,) * len(tokens)
        tree = TokenTree(tuple(tokens), tuple(parents), tuple(confidences), sources)
        self._guesses.remember(ids, tree, kinds)
        return tree

    def observe(self, outcome: Outcome) -> None:
        """Refresh the table from the rows that became text, and append the text."""
        before = len(self._text)
        self._text.extend(outcome.new_tokens)
        self._guesses.judge(self._text.ids, before)
        if outcome.logits is not None:
            for row in (0, *(node + 1 for node in outcome.path)):
                self._learn(outcome.row_tokens[row], outcome.logits[row])

    def rewind(self, length: int) -> None:
        """Forget the text from `length` on, not what the target thought of it."""
        self._text.truncate(length)

    def close(self) -> None:
        """Nothing to free."""

    def _learn(self, token: int, logits: np.ndarray) -> None:
        best = self._best[token] = top_ids(logits, self._width, self._scratch)
        if self._width > 1:
            margin = logits[best[0]] - logits[best[1]]
            self._margin[token] = int(np.searchsorted(_MARGINS, margin))

    def _successors(self, before: int, token: int) -> Iterable[Successor]:
        """(hit rate, token, kind) of what may follow two tokens, best first."""
        found: dict[int, Successor] = {}
        for follower, kind in self._from_text(before, token):
            found[follower] = (self._rates.rate(kind), follower, kind)
        margin = int(self._margin[token])
        for rank, follower in enumerate(self._best[token].tolist()):
            if follower < 0:
                break
            kind = ("table", rank, margin)
            rate = self._rates.rate(kind)
            if follower not in found or found[follower][0] < rate:
                found[follower] = (rate, follower, kind)
        return sorted(found.values(), key=_by_rate)[: self._branches]

    def _from_text(self, before: int, token: int) -> list[tuple[int, Hashable]]:
        """What followed the two tokens in the text, each with its kind; often nothing."""
        ids = self._text.ids
        ends = [end for end in self._text.ends((before, token), _PLACES) if end + 1 < len(ids)]
        counts: dict[int, int] = {}
        for end in ends:
            follower = ids[end + 1]
            counts[follower] = counts.get(follower, 0) + 1
        certainty = "sure" if len(counts) == 1 else "split"
        return [
            (follower, ("text", certainty, min(count, 4))) for follower, count in counts.items()
        ]

    def _push(
        self,
        open_nodes: list[tuple[float, int, Successor, int, int]],
        value: float,
        successors: Iterable[Successor],
        parent: int,
        previous: int,
        age: int,
    ) -> int:
        for successor in successors:
            worth = value * successor[0]
            if worth >= _LEAST_VALUE:
                heapq.heappush(open_nodes, (-worth, age, successor, parent, previous))
                age += 1
        return age


def _by_rate(successor: Successor) -> tuple[float, int]:
    return -successor[0], successor[1]


def _prior(kind: Any) -> float:
    where, first, second = kind
    if where == "table":
        return _TABLE_PRIORS[second] * _RANK_FADE**first
    return _TEXT_PRIORS[first][second - 1]
