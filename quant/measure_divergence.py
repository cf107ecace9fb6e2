"""How far the next-token distributions of models are from those of a reference."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from forerun.quant.corpus import Piece

Progress = Callable[[str, int, int | None], None]

_ROWS = 64


@dataclass(frozen=True)
class Divergence:
    """How one model's next-token distributions differ from another's, over many positions.

    Attributes:
        perplexity: of the model that is judged.
        perplexity_against: of the reference; None, as all that follows, if there is none.
        kl_mean: mean of KL(reference || judged) in nats.
        kl_p99: its 99th percentile.
        top1_agreement: share of positions with the same most probable token.
        tokens: positions that were read, always a number.
    """

    perplexity: float
    perplexity_against: float | None
    kl_mean: float | None
    kl_p99: float | None
    top1_agreement: float | None
    tokens: int


@dataclass(frozen=True)
class Stream:
    """A runner, and how many rows its judged steps have (None: as many as are convenient)."""

    runner: Any
    rows_per_step: int | None = None


@dataclass(frozen=True)
class _Block:
    """Figures of neighbouring positions, float [R] each; the last row may lack a next token."""

    context: int
    kind: str
    nll: np.ndarray
    nll_against: np.ndarray | None = None
    kl: np.ndarray | None = None
    same: np.ndarray | None = None


class Tally:
    """Adds up positions of one judged model."""

    def __init__(self) -> None:
        self._blocks: list[_Block] = []

    def add(
        self, piece: Piece, start: int, judged: np.ndarray, reference: np.ndarray | None
    ) -> None:
        """Add rows `start`, `start` + 1 and so on of a piece.

        Args:
            piece: what was read.
            start: number of the first row.
            judged: log-probabilities float32 [R, V].
            reference: likewise, or None.
        """
        following = piece.ids[start + 1 : start + 1 + len(judged)]
        rows = np.arange(len(following))
        about = (len(piece.ids), piece.kind, -judged[rows, following])
        if reference is None:
            self._blocks.append(_Block(*about))
            return
        kl = kl_rows(judged, reference)
        same = judged.argmax(-1) == reference.argmax(-1)
        self._blocks.append(_Block(*about, -reference[rows, following], kl, same))

    def result(self, context: int | None = None, kind: str | None = None) -> Divergence:
        """Figures over all positions, or over those of one context or one kind of text."""
        kept = [
            block
            for block in self._blocks
            if context in (None, block.context) and kind in (None, block.kind)
        ]
        nll = np.concatenate([block.nll for block in kept])
        perplexity = float(np.exp(nll.mean()))
        if kept[0].kl is None:
            return Divergence(perplexity, None, None, None, None, len(nll))
        kl = _joined(kept, "kl")
        return Divergence(
            perplexity=perplexity,
            perplexity_against=float(np.exp(_joined(kept, "nll_against").mean())),
            kl_mean=float(kl.mean()),
            kl_p99=float(np.quantile(kl, 0.99)),
            top1_agreement=float(_joined(kept, "same").mean()),
            tokens=len(kl),
        )


def compare(
    judged: list[Stream],
    reference: Stream | None,
    pieces: list[Piece],
    progress: Progress | None = None,
) -> list[Tally]:
    """Read the pieces with all models side by side and compare row by row.

    Only a few rows are held at a time: a thousand are hundreds of megabytes.

    Args:
        judged: open models.
        reference: the one they are compared with, or None for perplexity alone.
        pieces: what to read.
        progress: called with (stage, done, total) in rows that are judged.

    Returns:
        A tally for each judged model.
    """
    tallies = [Tally() for _ in judged]
    total, done = sum(len(piece.ids) - piece.first for piece in pieces), 0
    for piece in pieces:
        streams = [read(stream, piece) for stream in judged]
        expected = read(reference, piece) if reference else _nothing()
        # zip would read a block of the reference that no one takes.
        for first, *others in zip(*streams, strict=True):
            start, count = first[0], len(first[1])
            against = next(expected)
            for tally, (_, rows) in zip(tallies, (first, *others), strict=True):
                tally.add(piece, start, rows, None if against is None else against[1])
            done += count
            if progress:
                progress("evaluate", done, total)
    return tallies


def read(stream: Stream, piece: Piece) -> Iterator[tuple[int, np.ndarray]]:
    """Read a piece from an empty cache.

    Yields:
        (number of the first row, log-probabilities float32 [R, V]) of the judged rows.
    """
    ids = piece.ids
    stream.runner.arena.rewind(0)
    if piece.first:
        prefill(stream.runner, ids[: piece.first])
    for start in range(piece.first, len(ids), _ROWS):
        yield start, log_softmax(run_rows(stream, ids[start : start + _ROWS]))


def prefill(runner: Any, ids: np.ndarray, done: Callable[[int], None] | None = None) -> np.ndarray:
    """Read ids behind the history in steps of a few rows.

    Args:
        runner: an open model.
        ids: int64 [T].
        done: called with the number of ids read so far.

    Returns:
        float32 logits [V] behind the last id, a view that is valid until the next step.
    """
    width = min(_ROWS, runner.arena.most_rows)
    logits = np.empty(0, np.float32)
    for start in range(0, len(ids), width):
        end = min(start + width, len(ids))
        logits = runner.step(ids[start:end], want="last" if end == len(ids) else "none")
        if done:
            done(end)
    return logits[-1]


def run_rows(stream: Stream, ids: np.ndarray) -> np.ndarray:
    """Run rows behind the history, in steps as narrow as the stream asks for.

    Returns:
        float32 logits [R, V], a view that is valid until the next step.
    """
    width = stream.rows_per_step or min(len(ids), stream.runner.arena.most_rows)
    if width >= len(ids):
        return stream.runner.step(ids, want="all")
    steps = range(0, len(ids), width)
    return np.concatenate(
        [stream.runner.step(ids[i : i + width], want="all").copy() for i in steps]
    )


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Log-probabilities over the last axis, float32."""
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def kl_rows(judged: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """KL(reference || judged) of each row of log-probabilities float32 [R, V], in nats."""
    return (np.exp(reference) * (reference - judged)).sum(-1)


def _nothing() -> Iterator[None]:
    while True:
        yield None


def _joined(blocks: list[_Block], name: str) -> np.ndarray:
    return np.concatenate([getattr(block, name) for block in blocks])
