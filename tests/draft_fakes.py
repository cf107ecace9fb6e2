"""Drafters for tests: right, wrong, random, bushy, silent and broken ones."""

from __future__ import annotations

import numpy as np

from forerun.runtime.drafting.tree import TokenTree


class TestDrafter:
    """Follows the text and checks that it is told of all of it.

    Args:
        name: for statistics.
        fail_in: method that raises.
    """

    __test__ = False
    needs_features = False
    proposes_trees = False

    def __init__(self, name="test", fail_in=None, error=ZeroDivisionError):
        self.name, self.fail_in, self.error = name, fail_in, error
        self.ids: list[int] = []
        self.budgets: list[int] = []
        self.rounds: list[tuple[int, int]] = []
        self.closed = False

    def begin(self, ids, features):
        self._check("begin")
        self.ids = list(ids)

    def propose(self, budget, keep_going=None):
        self._check("propose")
        assert budget >= 1
        self.budgets.append(budget)
        return self.guess(budget, keep_going)

    def guess(self, budget, keep_going):
        return TokenTree.EMPTY

    def observe(self, outcome):
        self._check("observe")
        assert outcome.row_tokens == (self.ids[-1], *outcome.tree.tokens)
        assert len(outcome.logits) == len(outcome.row_tokens)
        accepted = tuple(outcome.tree.tokens[node] for node in outcome.path)
        assert outcome.new_tokens[:-1] == accepted
        self.rounds.append((len(outcome.tree), len(outcome.path)))
        self.ids.extend(outcome.new_tokens)

    def rewind(self, length):
        self._check("rewind")
        assert length <= len(self.ids)
        del self.ids[length:]

    def close(self):
        self.closed = True

    def _check(self, method):
        if method == self.fail_in:
            raise self.error("out of luck")


class Right(TestDrafter):
    """Knows the text in advance."""

    def __init__(self, text, **options):
        super().__init__("right", **options)
        self.text = list(text)

    def guess(self, budget, keep_going):
        at = len(self.ids)
        tokens = self.text[at : at + budget]
        return TokenTree.chain(tokens, [0.9] * len(tokens), self.name)


class Random(TestDrafter):
    """Says anything, of any length up to the budget."""

    def __init__(self, vocab, seed=0):
        super().__init__("random")
        self.vocab, self.rng = vocab, np.random.default_rng(seed)

    def guess(self, budget, keep_going):
        tokens = self.rng.integers(0, self.vocab, self.rng.integers(0, budget + 1)).tolist()
        return TokenTree.chain(tokens, self.rng.random(len(tokens)).tolist(), self.name)


class Bushy(TestDrafter):
    """Trees of random shape that hold the right tokens somewhere, sometimes."""

    proposes_trees = True

    def __init__(self, text, vocab, seed=0):
        super().__init__("bushy")
        self.text, self.vocab = list(text), vocab
        self.rng = np.random.default_rng(seed)

    def guess(self, budget, keep_going):
        count = int(self.rng.integers(0, budget + 1))
        parents = [int(self.rng.integers(-1, node)) for node in range(count)]
        depths = []
        for parent in parents:
            depths.append(0 if parent < 0 else depths[parent] + 1)
        tokens = []
        for depth in depths:
            right = self.text[len(self.ids) + depth : len(self.ids) + depth + 1]
            is_right = bool(right) and self.rng.random() < 0.6
            tokens.append(right[0] if is_right else int(self.rng.integers(0, self.vocab)))
        confidences = self.rng.random(count).tolist()
        return TokenTree(tuple(tokens), tuple(parents), tuple(confidences), (self.name,) * count)
