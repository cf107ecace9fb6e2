"""The KV cache of one stream in GEAR's form: chunks of 64 tokens, and a buffer of the newest."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import numpy as np

from forerun.runtime.arena import Rows, lazy_zeros
from forerun.runtime.gear.compress import compress, decompress
from forerun.runtime.gear.layout import CHUNK, PARTS, part_layouts

if TYPE_CHECKING:
    from collections.abc import Iterator

    import onnxruntime as ort

    from forerun.runtime.manifest import KVLayout

MAX_PENDING = 512


class GearArena(Rows):
    """Compressed chunks, and the tokens behind them in float32.

    A chunk is compressed once a step needs room behind it (`settle`), never with rows in it that
    are still pending. The float32 rows of the newest chunk are kept until the next one is
    compressed, so that dropping drafts leaves no trace; going back further makes what the chunk
    stands for the new buffer, see `restorable`.

    Attributes:
        chunks: ``PART_KIND.N`` to array [capacity / 64, ...], see `PartLayout`.
        rows: ``PART.N`` to float32 [rows, heads x head_dim]; row `offset` + i belongs to token
            64 * `compressed` + i.
        compressed: chunks that count.
    """

    def __init__(self, layout: KVLayout) -> None:
        super().__init__(layout)
        self._parts = part_layouts(layout)
        most, width = layout.capacity // CHUNK, layout.heads * layout.head_dim
        # No more rows are touched than a step has, so that large trees cost memory only when run.
        room = (2 * CHUNK + MAX_PENDING, width)
        layers = range(layout.layers)
        self.chunks = {
            f"{part}_{kind}.{layer}": lazy_zeros((most, *shape), dtype)
            for layer in layers
            for part, sizes in self._parts.items()
            for kind, (shape, dtype) in sizes.shapes.items()
        }
        self.rows = {
            f"{part}.{layer}": lazy_zeros(room, "float32") for layer in layers for part in PARTS
        }
        self.compressed = 0
        self._kept = False

    @property
    def nbytes(self) -> int:
        """Bytes reserved, the buffer included."""
        return sum(a.nbytes for a in (*self.chunks.values(), *self.rows.values()))

    @property
    def offset(self) -> int:
        """Row of the arrays `rows` at which the buffer begins."""
        return CHUNK if self._kept else 0

    def settle(self, tokens: int) -> None:
        """Compress what fills whole chunks.

        Args:
            tokens: that are in the cache and belong to the text; more than `length` within a step.
        """
        while tokens - self.compressed * CHUNK >= CHUNK:
            self._drop_kept(tokens - self.compressed * CHUNK)
            for part, sizes in self._parts.items():
                arrays = [self.rows[f"{part}.{n}"] for n in range(self.layout.layers)]
                x = np.stack([array[:CHUNK] for array in arrays])
                x = x.reshape(len(x), CHUNK, self.layout.heads, -1).swapaxes(1, 2)
                for kind, tensors in sizes.pack(compress(x, sizes.form)).items():
                    for layer, tensor in enumerate(tensors):
                        self.chunks[f"{part}_{kind}.{layer}"][self.compressed] = tensor
            self.compressed, self._kept = self.compressed + 1, True

    def rewind(self, length: int) -> None:
        """Forget all but the first `length` tokens.

        Raises:
            OptionError: that many tokens are not cached.
        """
        if not 0 <= length <= self.length:
            # It refuses; nothing has changed yet.
            return super().rewind(length)
        with self._emptied_if_broken_off():
            super().rewind(length)
            chunk, rest = divmod(length, CHUNK)
            if chunk >= self.compressed:
                return
            # The newest chunk's rows are still there; of an older one only what it stands for.
            if rest and not self._has_rows_of(chunk):
                self._restore(chunk)
            self.compressed, self._kept = chunk, False

    def restorable(self, length: int) -> int:
        """How many of the first `length` tokens `rewind` gives back as they were read.

        Within a chunk whose float32 rows are gone that is none of its tokens.
        """
        chunk = length // CHUNK
        is_exact = chunk >= self.compressed or self._has_rows_of(chunk)
        return length if is_exact else chunk * CHUNK

    def pretend(self, length: int) -> None:
        """Count as `length` tokens of zeros, in whole chunks and a buffer as after reading them."""
        super().pretend(length)
        self.compressed, self._kept = length // CHUNK, False
        for array in self.chunks.values():
            array[: self.compressed] = 0
        for array in self.rows.values():
            array[:CHUNK] = 0

    @contextlib.contextmanager
    def guarded(self) -> Iterator[None]:
        """Around a step: one that fails in the middle leaves the tokens that were there before.

        Down to the last chunk whose float32 rows are still there, that is: `restorable`. If it was
        broken off while rows were moved, it leaves none.
        """
        try:
            yield
        except BaseException:
            self.rewind(self.restorable(self.length))
            raise

    def values(self) -> dict[str, ort.OrtValue]:
        """None: what counts changes its shape, so the graph is bound to the arrays anew."""
        return {}

    def move(self, source: np.ndarray, start: int) -> None:
        """Copy rows of the buffer; `source` and `start` are numbers of tokens."""
        shift = self.offset - self.compressed * CHUNK
        begin = start + shift
        for array in self.rows.values():
            array[begin : begin + len(source)] = array[source + shift]

    def _has_rows_of(self, chunk: int) -> bool:
        """Whether the float32 rows of a chunk that is compressed are still there."""
        return self._kept and chunk == self.compressed - 1

    @contextlib.contextmanager
    def _emptied_if_broken_off(self) -> Iterator[None]:
        """Around what moves rows: broken off in the middle, it leaves nothing that counts."""
        try:
            yield
        except BaseException:
            self.length = self.pending = self.compressed = 0
            self._kept = False
            raise

    def _drop_kept(self, buffered: int) -> None:
        """Move the buffer to the beginning of its arrays."""
        with self._emptied_if_broken_off():
            if self._kept:
                for array in self.rows.values():
                    array[:buffered] = array[CHUNK : CHUNK + buffered].copy()
            self._kept = False

    def _restore(self, chunk: int) -> None:
        """Make what a chunk stands for the buffer."""
        for part, sizes in self._parts.items():
            tensors = {
                kind: np.stack(
                    [self.chunks[f"{part}_{kind}.{n}"][chunk] for n in range(self.layout.layers)]
                )
                for kind in sizes.shapes
            }
            x = decompress(sizes.unpack(tensors), sizes.form, self.layout.heads)
            rows = x.swapaxes(1, 2).reshape(len(x), CHUNK, -1)
            for layer, tokens in enumerate(rows):
                self.rows[f"{part}.{layer}"][:CHUNK] = tokens
