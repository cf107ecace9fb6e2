"""How a chunk lies in memory: the tensors that the arena keeps and the graph reads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from forerun.errors import BundleError
from forerun.runtime.gear.compress import Chunk, Form, index_dtype, outlier_count

if TYPE_CHECKING:
    from forerun.runtime.manifest import KVLayout

CHUNK = 64
PARTS = ("key", "value")
# Two codes share a byte; the graph splits them by b / 16 = high + low / 16.
_BYTE = 16
# Whether a token's values share one scale over all heads, as in KCVT, or have one a head, as in
# KIVI. Keys have one a channel and chunk in both.
SHARED_SCALES = {"gear-kcvt": True, "gear-kivi": False}


@dataclass(frozen=True)
class PartLayout:
    """Tensors of the keys or of the values of one layer, each [chunks, ...].

    `codes` uint8 [heads, half, width]: rows are channels and columns tokens for keys, the other
    way round for values; the first half of the rows is in the low bits. `index` [vectors,
    outliers]: for keys tokens; for values places in [heads, CHUNK + rank, head_dim], which is what
    the graph multiplies with. `numbers` float16, in this order: `right` [heads, ., head_dim] and
    `left` [heads, rank, CHUNK], the factors; for keys the lows are the last row of `right`, as a
    product with them is wanted; `scale`, times 16 in the first half of the rows, since their codes
    are read as sixteenths; the lows of values; `exact` [vectors, outliers], as the codes are read.

    Attributes:
        heads: of keys and values.
        head_dim: of a head.
        rank: of the factors.
        outliers: per vector.
        scales: scales of a chunk: per channel for keys, per token (and head) for values.
        key: whether these are keys.
    """

    heads: int
    head_dim: int
    rank: int
    outliers: int
    scales: int
    key: bool

    @property
    def codes(self) -> tuple[int, ...]:
        """Shape of the codes of a chunk."""
        rows, width = self.tile
        return self.heads, rows // 2, width

    @property
    def tile(self) -> tuple[int, int]:
        """Rows and columns of a head's codes once they are spread."""
        return (self.head_dim, CHUNK) if self.key else (CHUNK, self.head_dim)

    @property
    def index(self) -> tuple[int, int]:
        """Shape of the places of the outliers of a chunk."""
        return (self.heads * self.head_dim if self.key else CHUNK), self.outliers

    @property
    def numbers(self) -> dict[str, int]:
        """Names and lengths of the parts of `numbers`."""
        channels = self.heads * self.head_dim
        rows = self.rank + 1 if self.key else self.rank
        lengths = {"right": channels * rows, "left": self.heads * CHUNK * self.rank}
        lengths["scale"] = self.scales
        if not self.key:
            lengths["low"] = self.scales
        return lengths | {"exact": self.index[0] * self.outliers}

    @property
    def shapes(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """Kind of tensor to shape of a chunk and dtype."""
        return {
            "codes": (self.codes, "uint8"),
            "index": (self.index, self._index_dtype),
            "numbers": ((sum(self.numbers.values()),), "float16"),
        }

    @property
    def nbytes(self) -> int:
        """Bytes of a chunk."""
        return sum(
            int(np.prod(shape)) * np.dtype(dtype).itemsize for shape, dtype in self.shapes.values()
        )

    @property
    def form(self) -> Form:
        """How `compress` treats these."""
        if self.key:
            return Form(2, CHUNK, self.rank, self.outliers)
        group = self.heads * self.head_dim * CHUNK // self.scales
        return Form(3, group, self.rank, self.outliers)

    def pack(self, chunk: Chunk) -> dict[str, np.ndarray]:
        """The tensors of a chunk, each [layers, ...]."""
        layers = len(chunk.codes)
        low, high = np.split(self._rows(chunk.codes), 2, axis=2)
        right, left = chunk.right.swapaxes(2, 3), chunk.left.swapaxes(2, 3)
        lows = self._vectors(chunk.low, layers)
        if self.key:
            right = np.concatenate([right, lows.reshape(layers, self.heads, 1, -1)], 2)
        parts = {
            "right": right,
            "left": left,
            "scale": self._vectors(chunk.scale, layers) * self._weight(chunk.scale.shape[-1]),
            "low": lows,
            "exact": chunk.exact.reshape(layers, -1) / self._weight(self.outliers, exact=True),
        }
        numbers = [parts[name].reshape(layers, -1) for name in self.numbers]
        return {
            "codes": low | high << 4,
            "index": self._graph_index(chunk.index).astype(self._index_dtype),
            "numbers": np.concatenate(numbers, 1).astype(np.float16),
        }

    def unpack(self, tensors: dict[str, np.ndarray]) -> Chunk:
        """The inverse of `pack`."""
        layers, numbers = len(tensors["codes"]), tensors["numbers"]
        cuts = np.cumsum(list(self.numbers.values()))[:-1]
        parts = dict(zip(self.numbers, np.split(numbers, cuts, axis=1), strict=True))
        rows = np.concatenate([tensors["codes"] & _BYTE - 1, tensors["codes"] >> 4], 2)
        right = parts["right"].reshape(layers, self.heads, -1, self.head_dim)
        low = right[:, :, -1] if self.key else parts["low"]
        groups = self.scales // self.index[0]
        scale = parts["scale"] / self._weight(groups)
        exact = parts["exact"] * self._weight(self.outliers, exact=True)
        codes = rows if self.key else rows.swapaxes(1, 2)
        return Chunk(
            codes=codes.reshape(layers, self.index[0], -1),
            scale=self._groups(scale, layers),
            low=self._groups(low, layers),
            index=self._vector_index(tensors["index"]),
            exact=exact.reshape(layers, *self.index).astype(np.float16),
            left=parts["left"].reshape(layers, self.heads, self.rank, CHUNK).swapaxes(2, 3),
            right=right[:, :, : self.rank].swapaxes(2, 3),
        )

    @property
    def _index_dtype(self) -> str:
        return index_dtype(CHUNK if self.key else self.heads * self._head_places)

    @property
    def _head_places(self) -> int:
        return (CHUNK + self.rank) * self.head_dim

    def _graph_index(self, index: np.ndarray) -> np.ndarray:
        """From places within vectors to those that `index` holds."""
        if self.key:
            return index
        head, channel = np.divmod(index.astype(np.int64), self.head_dim)
        token = np.arange(CHUNK)[:, None] * self.head_dim
        return head * self._head_places + token + channel

    def _vector_index(self, places: np.ndarray) -> np.ndarray:
        """The inverse of `_graph_index`."""
        if self.key:
            return places
        places = places.astype(np.int64)
        head, channel = places // self._head_places, places % self.head_dim
        return (head * self.head_dim + channel).astype(index_dtype(self.heads * self.head_dim))

    def _rows(self, codes: np.ndarray) -> np.ndarray:
        """[layers, vectors, length] to [layers, heads, rows, columns]."""
        if self.key:
            return codes.reshape(len(codes), self.heads, self.head_dim, CHUNK)
        return codes.reshape(len(codes), CHUNK, self.heads, -1).swapaxes(1, 2)

    def _vectors(self, x: np.ndarray, layers: int) -> np.ndarray:
        """[layers, vectors, groups] to [layers, groups * vectors], vectors last."""
        return x.swapaxes(1, 2).reshape(layers, -1)

    def _groups(self, x: np.ndarray, layers: int) -> np.ndarray:
        """The inverse of `_vectors`."""
        return x.reshape(layers, -1, self.index[0]).swapaxes(1, 2).astype(np.float16)

    def _weight(self, repeats: int, exact: bool = False) -> np.ndarray:
        """16 for what belongs to codes in the low bits, 1 for the others; flat, as stored."""
        half = np.repeat(np.array([_BYTE, 1], np.float16), self.tile[0] // 2)
        vectors = np.tile(half, self.heads) if self.key else half
        return np.repeat(vectors, repeats) if exact else np.tile(vectors, repeats)


def part_layouts(layout: KVLayout) -> dict[str, PartLayout]:
    """The tensors of keys and of values.

    Raises:
        BundleError: the layout is no form of GEAR that this version knows.
    """
    channels = layout.heads * layout.head_dim
    if layout.kind not in SHARED_SCALES or layout.group != CHUNK or layout.bits != 4:
        raise BundleError(
            f"KV layout {layout.kind!r} of {layout.bits} bits in chunks of {layout.group} tokens "
            f"is unknown; known are {', '.join(SHARED_SCALES)} of 4 bits in chunks of {CHUNK}; "
            "quantize the model again"
        )
    if layout.head_dim % 2 or not 1 <= layout.rank <= min(CHUNK, layout.head_dim):
        raise BundleError(
            f"GEAR takes heads of even width and a rank from 1 to that width or {CHUNK}; "
            f"got a width of {layout.head_dim} and rank {layout.rank}"
        )
    of_values = 1 if SHARED_SCALES[layout.kind] else layout.heads
    lengths = {"key": CHUNK, "value": channels}
    scales = {"key": channels, "value": of_values * CHUNK}
    return {
        part: PartLayout(
            layout.heads,
            layout.head_dim,
            layout.rank,
            outlier_count(layout.outliers, lengths[part]),
            scales[part],
            part == "key",
        )
        for part in PARTS
    }
