"""Shared by the tests of drafters: verified rounds of a text that is known, and toy models."""

import numpy as np

from forerun.errors import OptionError
from forerun.runtime.drafting.drafter import Outcome
from forerun.runtime.drafting.tree import TokenTree

VOCAB = 50


def logits_for(token, vocab=VOCAB, second=None):
    """A row whose best token is `token`, next `second`."""
    row = np.zeros(vocab, np.float32)
    row[token] = 8.0
    if second is not None:
        row[second] = 4.0
    return row


def verified(tree, coming, with_logits=True, features=None):
    """The outcome of a round whose text goes on as `coming`."""
    path, node = [], -1
    for token in coming:
        child = [c for c in tree.children(node) if tree.tokens[c] == token]
        if not child:
            break
        node = child[0]
        path.append(node)
    path = path[: len(coming) - 1]
    new = tuple(coming[: len(path) + 1])
    rows = (0, *tree.tokens)
    logits = np.zeros((len(rows), VOCAB), np.float32)
    for row, token in zip((0, *(n + 1 for n in path)), new, strict=True):
        logits[row] = logits_for(token)
    return Outcome(tree, tuple(path), new, rows, logits if with_logits else None, features)


def replay(drafter, prompt, text, budget=4):
    """Write `text` behind `prompt` with a drafter; (rounds, accepted, proposed)."""
    drafter.begin([*prompt, text[0]], None)
    done, rounds, accepted, proposed = 1, 0, 0, 0
    while done < len(text):
        tree = drafter.propose(budget)
        assert len(tree) <= budget
        outcome = verified(tree, text[done:])
        row_tokens = (text[done - 1], *outcome.row_tokens[1:])
        drafter.observe(
            Outcome(tree, outcome.path, outcome.new_tokens, row_tokens, outcome.logits, None)
        )
        done += len(outcome.new_tokens)
        rounds, accepted = rounds + 1, accepted + len(outcome.path)
        proposed += len(tree)
    return rounds, accepted, proposed


def plain(*tokens):
    """A round without a draft."""
    return Outcome(TokenTree.EMPTY, (), tuple(tokens), (), None, None)


class ToyArena:
    """Rows are the ids themselves."""

    def __init__(self, capacity):
        self.capacity, self.rows = capacity, []

    @property
    def length(self):
        return len(self.rows)

    def rewind(self, length):
        if not 0 <= length <= len(self.rows):
            raise OptionError(f"cannot rewind to {length}")
        del self.rows[length:]


class ToyRunner:
    """Its logits are a function of all rows, so a stale row changes what it says.

    Args:
        vocab: its ids.
        capacity: rows that fit.
        follow: id to the id behind it; without it logits are pseudo-random.
    """

    def __init__(self, vocab=VOCAB, capacity=64, follow=None, scale=2.0):
        self.vocab, self.follow, self.scale = vocab, follow, scale
        self.arena = ToyArena(capacity)
        self.steps, self.closed, self.fail_at = [], False, None

    def step(self, ids, *, want="last"):
        ids = [int(i) for i in ids]
        assert self.arena.length + len(ids) <= self.arena.capacity
        assert all(0 <= i < self.vocab for i in ids)
        if len(self.steps) == self.fail_at:
            self.fail_at = None
            self.arena.rows += ids
            raise RuntimeError("the device went away")
        self.steps.append(len(ids))
        start = self.arena.length
        self.arena.rows += ids
        if want == "none":
            return np.zeros((0, self.vocab), np.float32)
        rows = [len(ids) - 1] if want == "last" else list(want)
        return np.stack([self.row(self.arena.rows[: start + r + 1]) for r in rows])

    def row(self, ids):
        if self.follow is not None:
            return logits_for(self.follow(ids[-1]), self.vocab)
        seed = 0
        for token in ids:
            seed = (seed * 1_000_003 + token + 1) % (2**61 - 1)
        return np.random.default_rng(seed).normal(0, self.scale, self.vocab).astype(np.float32)

    def close(self):
        self.closed = True
