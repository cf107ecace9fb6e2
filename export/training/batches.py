"""Batches of answers as padded arrays, in the ids of a draft vocabulary."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from forerun.export.training.data import Answer, TokenStore

_COUNTED_AT_ONCE = 1 << 18


class DraftVocab:
    """The part of the target's vocabulary that a drafter can propose.

    Args:
        ids: int32 [V], target ids in ascending order.
        target_vocab: size of the target's vocabulary.

    Attributes:
        ids: as given.
        to_draft: int32 [target_vocab], the draft id of each target id; V, the id of the <unk>
            input, for those that have none.
    """

    def __init__(self, ids: np.ndarray, target_vocab: int) -> None:
        self.ids = np.asarray(ids, np.int32)
        self.to_draft = np.full(target_vocab, len(self.ids), np.int32)
        self.to_draft[self.ids] = np.arange(len(self.ids))

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def unknown(self) -> int:
        """Id of the row that stands for all other tokens at the input."""
        return len(self.ids)


def choose_vocab(
    store: TokenStore, size: int, target_vocab: int, always: tuple[int, ...]
) -> DraftVocab:
    """Pick the tokens to which the target gives most probability in the training data.

    Args:
        store: training data.
        size: of the draft vocabulary.
        target_vocab: size of the target's vocabulary.
        always: ids that are in whatever their count, e.g. the end of an answer.
    """
    mass = np.zeros(target_vocab)
    ids, logps = store.array("top_ids"), store.array("top_logps")
    train = np.zeros(store.tokens, bool)
    for answer in store.answers:
        train[answer.start : answer.start + answer.length] = not answer.held_out
    for start in range(0, store.tokens, _COUNTED_AT_ONCE):
        part = slice(start, start + _COUNTED_AT_ONCE)
        known = (ids[part] >= 0) & train[part, None]
        mass += np.bincount(
            ids[part][known], np.exp(logps[part][known].astype(np.float32)), target_vocab
        )
    mass[list(always)] = np.inf
    # Where nothing was counted, low ids first: byte-pair merges are numbered by frequency.
    order = np.argsort(-mass, kind="stable")
    return DraftVocab(np.sort(order[:size]), target_vocab)


@dataclass(frozen=True)
class Batch:
    """B answers, padded to N tokens.

    Attributes:
        ids: int64 [B, N], inputs as draft ids (`DraftVocab.unknown` where there is none).
        features: float16 [B, N, taps, D]; None if not asked for.
        label_ids: int64 [B, N, 8], draft ids of the target's most probable next tokens.
        label_weights: float32 [B, N, 8], their probabilities, which sum to 1 where there are
            any; 0 outside answers and for tokens outside the draft vocabulary.
        best: int64 [B, N], the argmax of the target as target id; -1 where unknown.
        follows: bool [B, N], the next token is that argmax.
        prompts: int64 [B], tokens of the prompts.
        lengths: int64 [B], tokens.
    """

    ids: np.ndarray
    features: np.ndarray | None
    label_ids: np.ndarray
    label_weights: np.ndarray
    best: np.ndarray
    follows: np.ndarray
    prompts: np.ndarray
    lengths: np.ndarray

    def bases(self) -> tuple[np.ndarray, np.ndarray]:
        """Rows and columns of the tokens behind which drafts can begin."""
        columns = np.arange(self.ids.shape[1])[None]
        usable = (columns >= self.prompts[:, None] - 1) & (columns + 1 < self.lengths[:, None])
        rows, columns = np.nonzero(usable)
        return rows, columns


class Batches:
    """Makes batches from a store.

    Args:
        store: training data.
        vocab: of the drafter.
        size: answers in a batch.
        taps: states that become features, counted in the store; none for a drafter without.
        hard: share of the target's argmax in the label weights; the rest is its distribution.
    """

    def __init__(
        self,
        store: TokenStore,
        vocab: DraftVocab,
        size: int,
        taps: tuple[int, ...] = (),
        hard: float = 0.5,
    ) -> None:
        self.store, self.vocab, self.size, self.taps, self.hard = store, vocab, size, taps, hard

    def epoch(self, seed: int, number: int) -> Iterator[Batch]:
        """Batches of one pass over the answers that may be trained on."""
        self.store.refresh()
        rng = np.random.default_rng((seed, number))
        answers = [a for a in self.store.answers if not a.held_out]
        order = rng.permutation(len(answers))
        for start in range(0, len(order) - self.size + 1, self.size):
            yield self.make([answers[i] for i in order[start : start + self.size]])

    def held_out(self) -> Iterator[tuple[list[Answer], Batch]]:
        """Batches for evaluation, with their answers."""
        answers = [a for a in self.store.answers if a.held_out]
        for start in range(0, len(answers), self.size):
            chosen = answers[start : start + self.size]
            yield chosen, self.make(chosen)

    def make(self, answers: list[Answer]) -> Batch:
        """Pad these answers to one batch."""
        lengths = np.array([a.length for a in answers])
        prompts = np.array([a.prompt for a in answers])
        shape = (len(answers), int(lengths.max()))
        # Padding repeats tokens of the data; `lengths` tells where it begins.
        columns = np.minimum(np.arange(shape[1])[None], lengths[:, None] - 1)
        places = np.array([a.start for a in answers])[:, None] + columns
        raw = self.store.array("ids")[places]
        features = None
        if self.taps:
            features = self.store.array("states")[places][:, :, list(self.taps)]
        best = self.store.array("top_ids")[places].astype(np.int64)
        inside = np.arange(shape[1])[None] < lengths[:, None]
        best[~inside] = -1
        weights, drafts = self._labels(best, self.store.array("top_logps")[places])
        follows = np.zeros(shape, bool)
        follows[:, :-1] = raw[:, 1:] == best[:, :-1, 0]
        ids = self.vocab.to_draft[raw].astype(np.int64)
        return Batch(ids, features, drafts, weights, best[..., 0], follows, prompts, lengths)

    def _labels(self, best: np.ndarray, logps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        drafts = np.where(best >= 0, self.vocab.to_draft[best], self.vocab.unknown)
        known = drafts < self.vocab.unknown
        probs = np.exp(logps.astype(np.float32)) * known
        probs /= np.maximum(probs.sum(-1, keepdims=True), 1e-9)
        weights = (1 - self.hard) * probs
        weights[..., 0] += self.hard
        # A drafter cannot propose what is not in its vocabulary; nothing is learned there.
        weights *= known[..., :1]
        return weights, np.minimum(drafts, len(self.vocab) - 1).astype(np.int64)
