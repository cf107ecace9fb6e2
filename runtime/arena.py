"""The KV cache of one stream: which rows are committed, and static arrays that hold them."""

from __future__ import annotations

import abc
import contextlib
import mmap
from typing import TYPE_CHECKING

import numpy as np
import onnxruntime as ort

from forerun.errors import ContextLimitError, OptionError
from forerun.runtime.rows import MAX_ROWS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from forerun.runtime.manifest import KVLayout


class Rows(abc.ABC):
    """Which rows of a KV cache count; where they lie is the business of the classes below.

    Attributes:
        layout: of the cache.
        length: committed tokens; unless a class says otherwise, row i of every array belongs to
            the i-th of them.
        pending: rows behind them that the last step wrote and that are not committed.
        epoch: grows when the tensors were lost; graphs that are bound to them are useless then.
        is_endless: older tokens make room for new ones, so that a text never ends.
    """

    epoch = 0
    is_endless = False

    def __init__(self, layout: KVLayout) -> None:
        self.layout = layout
        self.length = 0
        self.pending = 0

    @property
    def capacity(self) -> int:
        """Tokens that fit."""
        return self.layout.capacity

    @property
    def used(self) -> int:
        """Rows of the tensors that are occupied."""
        return self.length

    @property
    def position(self) -> int:
        """Position of the next token."""
        return self.length

    @property
    def most_rows(self) -> int:
        """Rows that one step may have."""
        return min(self.capacity, MAX_ROWS)

    @property
    def nbytes(self) -> int:
        """Bytes reserved."""
        return self.layout.nbytes

    def make_room(self, rows: int) -> None:
        """Make sure that a step's rows fit; the last thing before it runs.

        Raises:
            ContextLimitError: the history and the new rows exceed the capacity.
        """
        if self.length + rows > self.capacity:
            raise ContextLimitError(
                f"{self.length} cached and {rows} new tokens exceed the capacity of "
                f"{self.capacity}; shorten the text, or export with a larger capacity"
            )

    def commit(self, rows: Sequence[int]) -> None:
        """Keep some of the pending rows, in this order, and drop the others.

        Args:
            rows: increasing numbers of rows of the last step, 0 being its first.

        Raises:
            OptionError: a number is not that of a pending row, or they do not increase.
        """
        picked = np.asarray(rows, np.int64)
        if picked.size and (picked[0] < 0 or picked[-1] >= self.pending):
            raise OptionError(f"rows {list(rows)} are not among the {self.pending} pending rows")
        if np.any(np.diff(picked) <= 0):
            raise OptionError(f"rows to commit must increase, got {list(rows)}")
        if not np.array_equal(picked, np.arange(len(picked))):
            self.move(self.length + picked, self.length)
        self.length, self.pending = self.length + len(picked), 0

    def rewind(self, length: int) -> None:
        """Forget all but the first `length` tokens.

        Raises:
            OptionError: that many tokens are not cached.
        """
        if not 0 <= length <= self.length:
            raise OptionError(f"cannot rewind to {length}: {self.length} tokens are cached")
        self.length, self.pending = length, 0

    def restorable(self, length: int) -> int:
        """How many of the first `length` tokens `rewind` gives back as they were read."""
        return length

    def pretend(self, length: int) -> None:
        """Count as `length` tokens that nobody read, so that steps behind them can be timed."""
        self.length, self.pending = length, 0

    def guarded(self) -> contextlib.AbstractContextManager[object]:
        """Around whatever runs on the tensors; turns a failure of their device into its error."""
        return contextlib.nullcontext()

    @abc.abstractmethod
    def values(self) -> dict[str, ort.OrtValue]:
        """Role ``key.N`` or ``value.N`` to the tensor that graphs are bound to."""

    @abc.abstractmethod
    def move(self, source: np.ndarray, start: int) -> None:
        """Copy the rows `source` int64 [N] to `start`, `start` + 1 and so on, in every tensor."""


class KVArena(Rows):
    """Keys and values of all layers in this process's memory, with room for `capacity` tokens.

    The memory is reserved at once and touched as the text grows, so that a short text costs
    little.

    Attributes:
        arrays: role ``key.N`` or ``value.N`` to array [1, heads, capacity, head_dim], of packed
            4-bit codes [1, heads, capacity, head_dim / 2].
    """

    def __init__(self, layout: KVLayout) -> None:
        super().__init__(layout)
        shape = (1, layout.heads, layout.capacity, row_width(layout))
        self.arrays = {
            f"{part}.{layer}": lazy_zeros(shape, layout.dtype)
            for layer in range(layout.layers)
            for part in ("key", "value")
        }

    def values(self) -> dict[str, ort.OrtValue]:
        """Views of `arrays`."""
        return {
            role: ort.OrtValue.ortvalue_from_numpy(array) for role, array in self.arrays.items()
        }

    def pretend(self, length: int) -> None:
        """Count as `length` tokens whose keys and values are zeros, in memory that is there."""
        for array in self.arrays.values():
            array[:, :, :length] = 0
        super().pretend(length)

    def move(self, source: np.ndarray, start: int) -> None:
        """Copy rows within every array."""
        for array in self.arrays.values():
            array[:, :, start : start + len(source)] = array[:, :, source]


def row_width(layout: KVLayout) -> int:
    """Items of an array that hold one head's key or value: two codes of 4 bits share a byte."""
    return layout.head_dim // 2 if layout.dtype == "uint8" and layout.bits == 4 else layout.head_dim


def lazy_zeros(shape: tuple[int, ...], dtype: str) -> np.ndarray:
    """An array of zeros whose memory is taken page by page, when it is first written.

    `numpy.zeros` asks for huge pages, of which a short text would touch all.
    """
    count = int(np.prod(shape))
    buffer = mmap.mmap(-1, max(1, count * np.dtype(dtype).itemsize))
    return np.frombuffer(buffer, dtype, count).reshape(shape)
