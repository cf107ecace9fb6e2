"""A strict reader of safetensors files: header checked as a whole, one tensor at a time.

Format: https://huggingface.co/docs/safetensors (u64 header length, JSON header, data that the
tensors tile without gap or overlap).
"""

from __future__ import annotations

import json
import math
import mmap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from forerun.errors import SourceError, UnsupportedError

MAX_HEADER_BYTES = 100_000_000
MAX_DIMENSIONS = 8
_ITEM_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1,
    "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
    "U32": 4, "I32": 4, "F32": 4,
    "U64": 8, "I64": 8, "F64": 8,
}  # fmt: skip
_FLOATS = {"F16": "<f2", "F32": "<f4", "F64": "<f8"}


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of the header: shape, dtype name of the format, place in the file."""

    shape: tuple[int, ...]
    dtype: str
    offset: int
    nbytes: int


class SafetensorsFile:
    """One safetensors file, mapped into memory.

    Args:
        path: the file.

    Raises:
        SourceError: the header lies about the data, is not valid JSON or does not fit.
        UnsupportedError: a dtype is unknown.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        try:
            with open(self.path, "rb") as stream:
                self.size = stream.seek(0, 2)
                if self.size < 8:
                    raise self._fail(f"{self.size} bytes are too short")
                self._map = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise SourceError(f"{self.path} cannot be read: {error.strerror}") from None
        self.tensors = self._read_header()

    def tensor(self, name: str) -> np.ndarray:
        """Return a tensor as float32, in the shape of the file.

        Raises:
            SourceError: a value is not finite.
            UnsupportedError: the dtype is not a float of 16, 32 or 64 bits.
        """
        entry = self.tensors[name]
        raw = np.frombuffer(self._map, np.uint8, entry.nbytes, entry.offset)
        if entry.dtype == "BF16":
            # bfloat16 is the upper half of a float32.
            values = (raw.view("<u2").astype(np.uint32) << 16).view(np.float32)
        elif entry.dtype in _FLOATS:
            values = raw.view(_FLOATS[entry.dtype]).astype(np.float32)
        else:
            raise UnsupportedError(
                f"{self.path}: tensor {name} is {entry.dtype}; F32, F16, BF16 and F64 are read"
            )
        if not np.isfinite(values).all():
            raise SourceError(f"{self.path}: tensor {name} holds values that are not finite")
        return values.reshape(entry.shape)

    def _fail(self, why: str) -> SourceError:
        return SourceError(f"{self.path}: damaged safetensors file: {why}")

    def _read_header(self) -> dict[str, TensorEntry]:
        length = int.from_bytes(self._map[:8], "little")
        if not 2 <= length <= min(self.size - 8, MAX_HEADER_BYTES):
            raise self._fail(f"a header of {length} bytes does not fit into {self.size}")
        try:
            header = json.loads(self._map[8 : 8 + length], object_pairs_hook=_unique)
        except (ValueError, RecursionError) as error:
            raise self._fail(f"its header is not valid JSON ({error})") from None
        if not isinstance(header, dict):
            raise self._fail("its header is not an object")
        header.pop("__metadata__", None)
        begin = 8 + length
        tensors = {name: self._entry(name, row, begin) for name, row in header.items()}
        self._check_tiling(tensors, begin)
        return tensors

    def _entry(self, name: str, row: Any, begin: int) -> TensorEntry:
        if not isinstance(row, dict) or set(row) != {"dtype", "shape", "data_offsets"}:
            raise self._fail(f"tensor {name!r} lacks dtype, shape or data_offsets")
        dtype, shape, offsets = row["dtype"], row["shape"], row["data_offsets"]
        if not isinstance(dtype, str) or dtype not in _ITEM_BYTES:
            raise UnsupportedError(f"{self.path}: tensor {name!r} has the unknown dtype {dtype!r}")
        if not _counts(shape) or len(shape) > MAX_DIMENSIONS:
            raise self._fail(f"tensor {name!r} has an impossible shape")
        if not _counts(offsets) or len(offsets) != 2:
            raise self._fail(f"tensor {name!r} has impossible offsets")
        nbytes = math.prod(shape) * _ITEM_BYTES[dtype]
        if offsets[1] - offsets[0] != nbytes:
            raise self._fail(f"tensor {name!r} needs {nbytes} bytes, its offsets {offsets} differ")
        return TensorEntry(tuple(shape), dtype, begin + offsets[0], nbytes)

    def _check_tiling(self, tensors: dict[str, TensorEntry], begin: int) -> None:
        at = begin
        ordered = sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].nbytes))
        for name, entry in ordered:
            if entry.offset != at:
                raise self._fail(f"tensor {name!r} begins at {entry.offset} instead of {at}")
            at += entry.nbytes
        if at != self.size:
            raise self._fail(f"its tensors end at byte {at}, the file has {self.size}")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) != len(pairs):
        raise ValueError("a name occurs twice")
    return row


def _counts(value: Any) -> bool:
    return isinstance(value, list) and all(type(n) is int and 0 <= n < 1 << 62 for n in value)
