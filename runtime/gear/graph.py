"""The session of a graph that reads a cache in GEAR's form, bound to an arena that grows."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from forerun.runtime.bound import BoundGraph
from forerun.runtime.gear.layout import CHUNK
from forerun.runtime.gear.store import MAX_PENDING
from forerun.runtime.rows import HIDDEN, MAX_ROWS

if TYPE_CHECKING:
    from pathlib import Path

    from forerun.devices.session import SessionOptions
    from forerun.runtime.gear.store import GearArena
    from forerun.runtime.manifest import Lowering, ModelSizes

# Rows of a piece: a chunk's worth of a chain, or a tree.
_MOST = max(CHUNK, MAX_PENDING)


class GearGraph(BoundGraph):
    """Runs chains in pieces that end where a chunk does, so that cutting a text changes nothing.

    A row so sees the same chunks and the same float32 rows whatever step it is part of. The new
    rows are written right behind the buffer; only what changes its shape is bound again: buffer
    and new rows in every piece, chunks when there are more or fewer of them.

    Args: those of `BoundGraph`.
    """

    _arena: GearArena

    def __init__(
        self,
        form: Lowering,
        folder: Path,
        options: SessionOptions,
        arena: GearArena,
        sizes: ModelSizes,
    ) -> None:
        super().__init__(form, folder, options, arena, sizes)
        self._arena = arena
        self._lengths = np.zeros(2, np.int64)
        self._bias = np.zeros(0, np.float32)
        self._triangle = np.triu(np.full((CHUNK, CHUNK), HIDDEN, np.float32), 1)
        self._chunks = -1

    def run(
        self,
        ids: np.ndarray,
        positions: np.ndarray | int,
        rows: np.ndarray,
        past: int,
        bias: np.ndarray | None = None,
    ) -> np.ndarray:
        """Run rows behind `past` cached tokens.

        Args:
            ids: int64 [S].
            positions: int64 [S], or the position of the first row of a chain.
            rows: int64 [R], which rows' logits to compute.
            past: cached tokens.
            bias: float32 [1, 1, S, past + S] of a tree of up to `MAX_PENDING` rows, which stay
                behind the buffer in one piece.

        Returns:
            float32 [R, V], a view that is valid until the next run.
        """
        count = len(ids)
        self._ids[0, :count] = ids
        self._place(positions, count)
        # Pieces need their rows one behind the other; the order that was asked for comes last.
        order = np.argsort(rows, kind="stable")
        self._rows[: len(rows)] = rows[order]
        # Room for a row more, that nobody wants.
        self._reserve(count, len(rows) + 1)
        self._shape = (count, len(rows))
        self._arena.settle(past)
        if bias is not None:
            self._piece(0, count, past, bias[0, 0])
        else:
            start = 0
            while start < count:
                self._arena.settle(past + start)
                stop = min(count, start + CHUNK - (past + start) % CHUNK)
                self._piece(start, stop, past + start, None)
                start = stop
        if np.any(order[1:] < order[:-1]):
            self._logits[order] = self._logits[: len(rows)].copy()
            if self._hidden is not None:
                self._hidden[order] = self._hidden[: len(rows)].copy()
        return self._logits[: len(rows)]

    def _piece(self, start: int, stop: int, past: int, bias: np.ndarray | None) -> None:
        """Run rows `start` to `stop` of the step behind `past` tokens."""
        arena, count = self._arena, stop - start
        if arena.compressed != self._chunks:
            self._bind_chunks()
        buffered = past - arena.compressed * CHUNK
        self._bind_rows(buffered, count)
        self._lengths[:] = arena.compressed * CHUNK, buffered + count
        self._bind_input("lengths", self._lengths, (2,))
        self._bind_mask(buffered, count, bias)
        self._bind_input("ids", self._ids[:, start:stop], (1, count))
        self._bind_input("positions", self._positions[:, start:stop], (1, count))
        wanted = self._shape[1]
        first, last = map(int, np.searchsorted(self._rows[:wanted], (start, stop)))
        if first == last:
            # The graph computes a row at least; this one goes where none is wanted.
            first, last = wanted, wanted + 1
            rows = np.array([count - 1], np.int64)
        else:
            rows = self._rows[first:last] - start
        self._bind_input("rows", rows, (len(rows),))
        self._bind_outputs(slice(first, last), slice(start, stop))
        self._compute()

    def _bind_mask(self, buffered: int, count: int, bias: np.ndarray | None) -> None:
        width = buffered + count
        if self._bias.size < count * width:
            self._bias = np.zeros(count * width, np.float32)
        mask = self._bias[: count * width].reshape(count, width)
        mask[:, :buffered] = 0
        own = self._triangle[:count, :count] if bias is None else bias[:, -count:]
        mask[:, buffered:] = own
        self._bind_input("bias", mask, mask.shape)

    def _bind_chunks(self) -> None:
        self._chunks = self._arena.compressed
        for role, array in self._arena.chunks.items():
            self._bind_input(role, array, (self._chunks, *array.shape[1:]))

    def _bind_rows(self, buffered: int, count: int) -> None:
        """Bind the buffer, and behind it the new rows."""
        begin = self._arena.offset
        for role, array in self._arena.rows.items():
            part, _, layer = role.partition(".")
            name, width = self._form.inputs[f"{part}_buffer.{layer}"].name, array.shape[1]
            data, row = array.ctypes.data, array.strides[0]
            self._binding.bind_input(
                name, "cpu", 0, array.dtype, (1, buffered, width), data + begin * row
            )
            name = self._form.outputs[f"{part}_new.{layer}"].name
            behind = data + (begin + buffered) * row
            self._binding.bind_output(name, "cpu", 0, array.dtype, (1, count, width), behind)


assert MAX_ROWS >= _MOST
