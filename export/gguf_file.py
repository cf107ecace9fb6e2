"""A strict reader of GGUF files: metadata, tensor table and one tensor at a time.

Every length and count is compared with what the file can hold before anything is allocated, so a
damaged file costs no memory. Numbers of quantized blocks are left to `gguf.quants`.
Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md (versions 2 and 3).
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from forerun.errors import SourceError, UnsupportedError

MAGIC = b"GGUF"
MAX_NAME_BYTES = 65535
MAX_DIMENSIONS = 4
MAX_ALIGNMENT = 1 << 20
DEFAULT_ALIGNMENT = 32
_MIN_KEY_BYTES = 8 + 1 + 4 + 1
_MIN_TENSOR_BYTES = 8 + 1 + 4 + 8 + 4 + 8

_STRING, _ARRAY, _BOOL = 8, 9, 7
_SCALARS = {
    0: "<u1",
    1: "<i1",
    2: "<u2",
    3: "<i2",
    4: "<u4",
    5: "<i4",
    6: "<f4",
    _BOOL: "|b1",
    10: "<u8",
    11: "<i8",
    12: "<f8",
}
_INTEGER_TENSORS = {"I8", "I16", "I32", "I64"}


@dataclass(frozen=True)
class TensorEntry:
    """One row of the tensor table.

    Attributes:
        name: name in the file, e.g. ``blk.0.attn_q.weight``.
        shape: numpy order, (out, in) for matrices.
        type: name of the storage type, e.g. ``Q4_1``.
        offset: first byte in the file.
        nbytes: bytes in the file.
    """

    name: str
    shape: tuple[int, ...]
    type: str
    offset: int
    nbytes: int


class GGUFFile:
    """A GGUF file, mapped into memory and checked as a whole.

    Args:
        path: the file.

    Raises:
        SourceError: it is not a GGUF file, or it is cut, damaged or inconsistent.
        UnsupportedError: its version, byte order or a storage type is not read here.
    """

    path: Path
    size: int
    metadata: dict[str, Any]
    tensors: dict[str, TensorEntry]

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        try:
            with open(self.path, "rb") as stream:
                self.size = stream.seek(0, 2)
                if self.size < 24:
                    raise SourceError(f"{self.path} has {self.size} bytes; too short for GGUF")
                self._map = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise SourceError(f"{self.path} cannot be read: {error.strerror}") from None
        cursor = _Cursor(self.path, self._map, self.size)
        self.metadata, self.tensors = _read_tables(cursor)

    def raw(self, name: str) -> np.ndarray:
        """Bytes of a tensor as a read-only uint8[nbytes] view of the mapped file."""
        entry = self.tensors[name]
        return np.frombuffer(self._map, np.uint8, entry.nbytes, entry.offset)

    def tensor(self, name: str) -> np.ndarray:
        """Dequantize one tensor to float32 in numpy order.

        Raises:
            SourceError: a value is not finite.
            UnsupportedError: the storage type holds integers, or has no dequantizer.
        """
        entry = self.tensors[name]
        values = _dequantize(self.raw(name), entry, self.path)
        if not np.isfinite(values).all():
            raise SourceError(f"{self.path}: tensor {name} holds values that are not finite")
        return values


@dataclass
class _Cursor:
    """A reading position that never leaves the file."""

    path: Path
    data: mmap.mmap
    size: int
    at: int = 0

    def fail(self, why: str) -> SourceError:
        return SourceError(f"{self.path}: damaged GGUF at byte {self.at}: {why}")

    def take(self, count: int, what: str) -> int:
        """Advance by `count` bytes and return where they begin."""
        if count > self.size - self.at:
            raise self.fail(f"{what} needs {count} bytes, {self.size - self.at} are left")
        start, self.at = self.at, self.at + count
        return start

    def unpack(self, form: str, what: str) -> int:
        return struct.unpack_from(form, self.data, self.take(struct.calcsize(form), what))[0]

    def count(self, what: str, smallest: int) -> int:
        """Read a count of items that take at least `smallest` bytes each."""
        value = self.unpack("<Q", f"count of {what}")
        if value > (self.size - self.at) // smallest:
            raise self.fail(f"{value} {what} cannot fit into the file")
        return value

    def string(self, what: str, limit: int | None = None) -> str:
        length = self.unpack("<Q", f"length of {what}")
        if limit is not None and not 0 < length <= limit:
            raise self.fail(f"{what} is {length} bytes long, allowed are 1 to {limit}")
        start = self.take(length, what)
        try:
            return self.data[start : self.at].decode("utf-8")
        except UnicodeDecodeError:
            raise self.fail(f"{what} is not UTF-8") from None

    def array(self, dtype: str, count: int, what: str) -> np.ndarray:
        kind = np.dtype(dtype)
        start = self.take(count * kind.itemsize, what)
        if dtype == _SCALARS[_BOOL] and count:
            # Any other byte than 0 and 1 would make an invalid numpy bool.
            return np.frombuffer(self.data, np.uint8, count, start) != 0
        return np.frombuffer(self.data, kind, count, start)


def _read_tables(cursor: _Cursor) -> tuple[dict[str, Any], dict[str, TensorEntry]]:
    if cursor.data[: len(MAGIC)] != MAGIC:
        raise SourceError(f"{cursor.path} is not a GGUF file")
    cursor.at = len(MAGIC)
    version = cursor.unpack("<I", "version")
    if version not in (2, 3):
        order = " (big-endian)" if version and version & 0xFFFF == 0 else ""
        raise UnsupportedError(f"{cursor.path}: GGUF version {version}{order}; 2 and 3 are read")
    tensor_count = cursor.count("tensors", _MIN_TENSOR_BYTES)
    key_count = cursor.count("metadata keys", _MIN_KEY_BYTES)
    metadata: dict[str, Any] = {}
    for _ in range(key_count):
        key = cursor.string("metadata key", MAX_NAME_BYTES)
        if key in metadata:
            raise cursor.fail(f"metadata key {key!r} occurs twice")
        metadata[key] = _read_value(cursor, key)
    sizes = _type_sizes()
    rows = [_read_tensor(cursor, sizes) for _ in range(tensor_count)]
    return metadata, _place(cursor, rows, _alignment(cursor, metadata))


def _read_value(cursor: _Cursor, key: str) -> Any:
    kind = cursor.unpack("<I", f"type of {key}")
    if kind == _STRING:
        return cursor.string(f"value of {key}")
    if kind != _ARRAY:
        return cursor.array(_scalar(cursor, kind, key), 1, f"value of {key}")[0].item()
    kind = cursor.unpack("<I", f"item type of {key}")
    if kind == _STRING:
        count = cursor.count(f"strings of {key}", 8)
        return [cursor.string(f"item of {key}") for _ in range(count)]
    dtype = _scalar(cursor, kind, key)
    count = cursor.count(f"items of {key}", np.dtype(dtype).itemsize)
    return cursor.array(dtype, count, f"items of {key}")


def _scalar(cursor: _Cursor, kind: int, key: str) -> str:
    if kind not in _SCALARS:
        raise cursor.fail(f"{key} has the unknown value type {kind}")
    return _SCALARS[kind]


def _read_tensor(
    cursor: _Cursor, sizes: dict[int, tuple[str, int, int]]
) -> tuple[str, tuple[int, ...], str, int, int]:
    """Return (name, shape, type, offset from the data's begin, bytes) of one tensor."""
    name = cursor.string("tensor name", MAX_NAME_BYTES)
    rank = cursor.unpack("<I", f"rank of {name}")
    if not 1 <= rank <= MAX_DIMENSIONS:
        raise cursor.fail(f"tensor {name!r} has {rank} dimensions, allowed are 1 to 4")
    shape = tuple(cursor.unpack("<Q", f"shape of {name}") for _ in range(rank))[::-1]
    kind = cursor.unpack("<I", f"type of {name}")
    offset = cursor.unpack("<Q", f"offset of {name}")
    if kind not in sizes:
        raise UnsupportedError(f"{cursor.path}: tensor {name!r} has the unknown type {kind}")
    label, block, block_bytes = sizes[kind]
    if min(shape) < 1 or shape[-1] % block:
        raise cursor.fail(f"tensor {name!r} of type {label} has the impossible shape {shape}")
    return name, shape, label, offset, math.prod(shape) // block * block_bytes


def _alignment(cursor: _Cursor, metadata: dict[str, Any]) -> int:
    value = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    good = type(value) is int and 8 <= value <= MAX_ALIGNMENT and not value & (value - 1)
    if not good:
        raise cursor.fail(f"general.alignment is {value!r}, not a power of two from 8")
    return value


def _place(
    cursor: _Cursor, rows: list[tuple[str, tuple[int, ...], str, int, int]], alignment: int
) -> dict[str, TensorEntry]:
    """Check that tensors lie inside the data, aligned and apart, and index them by name."""
    begin = -(-cursor.at // alignment) * alignment
    tensors: dict[str, TensorEntry] = {}
    end, last = 0, ""
    for name, shape, label, offset, nbytes in sorted(rows, key=lambda row: row[3]):
        if name in tensors:
            raise cursor.fail(f"tensor {name!r} occurs twice")
        if offset % alignment:
            raise cursor.fail(f"tensor {name!r} begins at {offset}, not a multiple of {alignment}")
        if offset < end:
            raise cursor.fail(f"tensors {last!r} and {name!r} overlap")
        end, last = offset + nbytes, name
        if begin + end > cursor.size:
            raise cursor.fail(f"tensor {name!r} ends {begin + end - cursor.size} bytes too late")
        tensors[name] = TensorEntry(name, shape, label, begin + offset, nbytes)
    return tensors


def _type_sizes() -> dict[int, tuple[str, int, int]]:
    """Map a type number to (name, weights per block, bytes per block)."""
    from gguf.constants import GGML_QUANT_SIZES

    return {int(t): (t.name, block, size) for t, (block, size) in GGML_QUANT_SIZES.items()}


def _dequantize(raw: np.ndarray, entry: TensorEntry, path: Path) -> np.ndarray:
    if entry.type in _INTEGER_TENSORS:
        raise UnsupportedError(f"{path}: tensor {entry.name} holds {entry.type}, not weights")
    if entry.type in ("F32", "F64", "F16"):
        return (
            raw.view(f"<{entry.type.lower()[0]}{int(entry.type[1:]) // 8}")
            .reshape(entry.shape)
            .astype(np.float32)
        )
    from gguf.constants import GGMLQuantizationType
    from gguf.quants import dequantize

    blocks = raw.reshape(*entry.shape[:-1], -1)
    try:
        with np.errstate(all="ignore"):
            values = dequantize(blocks, GGMLQuantizationType[entry.type])
    except NotImplementedError:
        raise UnsupportedError(
            f"{path}: tensor {entry.name} is stored as {entry.type}, which cannot be dequantized"
        ) from None
    return np.ascontiguousarray(values, dtype=np.float32).reshape(entry.shape)
