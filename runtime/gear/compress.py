"""GEAR's arithmetic: a chunk of keys or values as codes, exact outliers and low-rank factors.

X is stored as D + S + Q P^T (Kang 2024): D is rounded to a few bits, S holds the largest and the
smallest values exactly, and Q P^T, head by head, what is coherent in the error that rounding left.
Every chunk is stored by itself and always in the same way, so the result does not depend on how
the text was cut into steps. All functions work on many layers at once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

# float16 ends at 65504; scales are stored times 16, outliers in units of the scale.
_LARGEST = 3e4
_TINY = 1e-30


@dataclass(frozen=True)
class Form:
    """How a chunk is stored.

    Attributes:
        along: axis of [layers, heads, tokens, channels] along which values share a scale:
            2 for keys (a channel over the tokens), 3 for values (a token over channels).
        group: values of a token that share a scale; of no concern to keys.
        rank: of the factors, per head; 0 keeps none.
        outliers: values that are kept exactly of each channel over the tokens (keys), or of each
            token over all its channels (values); half of them the largest, half the smallest.
        levels: largest code.
        rounds: of the power iteration.
    """

    along: int
    group: int
    rank: int
    outliers: int
    levels: int = 15
    rounds: int = 3


@dataclass(frozen=True)
class Chunk:
    """A stored chunk of `layers` layers; vectors and groups as `Form.along` says.

    Attributes:
        codes: uint8 [layers, vectors, length], 0 to `Form.levels`. Vectors are channels
            (head by head) and length is tokens for keys, the other way round for values.
        scale: float16 [layers, vectors, groups].
        low: float16, the value of code 0, likewise.
        index: uint8 or uint16 [layers, vectors, outliers], places within the vector.
        exact: float16, values there in units of code: (x - low) / scale.
        left: float16 [layers, heads, tokens, rank], Q.
        right: float16 [layers, heads, channels, rank], P.
    """

    codes: np.ndarray
    scale: np.ndarray
    low: np.ndarray
    index: np.ndarray
    exact: np.ndarray
    left: np.ndarray
    right: np.ndarray


def outlier_count(share: float, length: int) -> int:
    """Values of a vector to keep: the least even number that is at least the share."""
    return 2 * math.ceil(share * length / 2)


def index_dtype(length: int) -> str:
    """The smallest dtype for that many places."""
    return str(np.min_scalar_type(length - 1))


def compress(x: np.ndarray, form: Form) -> Chunk:
    """Compress float32 [layers, heads, tokens, channels] of finite values."""
    x = np.clip(x, -_LARGEST, _LARGEST)
    rows = _as_vectors(x, form)
    index = _outlier_places(rows, form.outliers)
    values = np.take_along_axis(rows, index, -1)
    filled = rows.copy()
    # Replaced by the mean, they no longer stretch the range that the codes must cover.
    np.put_along_axis(filled, index, rows.mean(-1, keepdims=True), -1)
    grouped = filled.reshape(*rows.shape[:2], -1, _group(form, rows))
    low = grouped.min(-1)
    spread = np.maximum(grouped.max(-1) - low, np.abs(low) * 1e-3) / form.levels
    low = low.astype(np.float16)
    reach = np.abs(rows).max(-1, keepdims=True) * 2 / _LARGEST
    scale = np.maximum(np.maximum(spread, reach), 1e-7).astype(np.float16)
    units = (grouped - _wide(low)) / _wide(scale)
    codes = np.clip(np.rint(units), 0, form.levels).astype(np.uint8).reshape(rows.shape)
    place = index // _group(form, rows)
    step = np.take_along_axis(scale, place, -1).astype(np.float32)
    base = np.take_along_axis(low, place, -1).astype(np.float32)
    exact = ((values - base) / step).astype(np.float16)
    backbone = Chunk(
        codes, scale, low, index.astype(index_dtype(rows.shape[-1])), exact, *_no_factors(x)
    )
    if not form.rank:
        return backbone
    left, right = factors(x - decompress(backbone, form, x.shape[1]), form.rank, form.rounds)
    factored = (left.astype(np.float16), right.astype(np.float16))
    return Chunk(codes, scale, low, backbone.index, exact, *factored)


def decompress(chunk: Chunk, form: Form, heads: int) -> np.ndarray:
    """The float32 [layers, heads, tokens, channels] that a chunk stands for."""
    units = chunk.codes.astype(np.float32)
    np.put_along_axis(units, chunk.index.astype(np.int64), chunk.exact.astype(np.float32), -1)
    grouped = units.reshape(*chunk.scale.shape, -1)
    rows = (grouped * _wide(chunk.scale) + _wide(chunk.low)).reshape(units.shape)
    x = _as_heads(rows, form, heads)
    if not form.rank:
        return x
    return x + chunk.left.astype(np.float32) @ chunk.right.astype(np.float32).swapaxes(-1, -2)


def factors(error: np.ndarray, rank: int, rounds: int) -> tuple[np.ndarray, np.ndarray]:
    """Factors of the best matrix of a low rank, by power iteration from a fixed start.

    Args:
        error: float32 [.., tokens, channels].
        rank: of the factors.
        rounds: of the iteration; the last one makes the columns orthonormal.

    Returns:
        Q float32 [.., tokens, rank] and P [.., channels, rank], so that Q P^T is near `error`.
    """
    # Powers of the error must neither overflow nor vanish.
    size = np.maximum(np.abs(error).max((-1, -2), keepdims=True), _TINY)
    error = error / size
    turned = error.swapaxes(-1, -2)
    # Dense and of full rank, so that no direction is left out, and the same in every run.
    channel, column = np.ogrid[1 : error.shape[-1] + 1, 2 : rank + 2]
    right = np.broadcast_to(
        np.sin(channel * np.sqrt(column)).astype(np.float32),
        (*error.shape[:-2], error.shape[-1], rank),
    )
    left = error @ right
    for last in [False] * (rounds - 1) + [True]:
        right = turned @ left
        right = _orthonormal(right) if last else right
        left = error @ right
    left = _orthonormal(left)
    return left, turned @ left * size


def _as_vectors(x: np.ndarray, form: Form) -> np.ndarray:
    """[layers, heads, tokens, channels] to [layers, vectors, length]."""
    if form.along == 2:
        return np.ascontiguousarray(x.swapaxes(2, 3)).reshape(len(x), -1, x.shape[2])
    return np.ascontiguousarray(x.swapaxes(1, 2)).reshape(len(x), x.shape[2], -1)


def _as_heads(rows: np.ndarray, form: Form, heads: int) -> np.ndarray:
    """The inverse of `_as_vectors`."""
    if form.along == 2:
        return rows.reshape(len(rows), heads, -1, rows.shape[-1]).swapaxes(2, 3)
    return rows.reshape(len(rows), rows.shape[1], heads, -1).swapaxes(1, 2)


def _group(form: Form, rows: np.ndarray) -> int:
    return rows.shape[-1] if form.along == 2 else form.group


def _outlier_places(rows: np.ndarray, count: int) -> np.ndarray:
    """Indices int64 [layers, vectors, count] of the largest and the smallest values."""
    if not count:
        return np.zeros((*rows.shape[:2], 0), np.int64)
    places = []
    # A few passes over all vectors are faster than sorting each of them.
    for sign in (1, -1):
        rest = sign * rows
        for _ in range(count // 2):
            places.append(rest.argmin(-1)[..., None])
            np.put_along_axis(rest, places[-1], np.inf, -1)
    return np.concatenate(places, -1)


def _wide(x: np.ndarray) -> np.ndarray:
    """float16 [..] to float32 [.., 1]."""
    return x.astype(np.float32)[..., None]


def _no_factors(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    layers, heads, tokens, channels = x.shape
    empty = np.zeros((layers, heads, tokens, 0), np.float16)
    return empty, np.zeros((layers, heads, channels, 0), np.float16)


def _orthonormal(x: np.ndarray) -> np.ndarray:
    """Columns made orthonormal one after the other (Gram-Schmidt); columns of zeros stay."""
    x = x.copy()
    for i in range(x.shape[-1]):
        for j in range(i):
            x[..., i] -= (x[..., i] * x[..., j]).sum(-1, keepdims=True) * x[..., j]
        length = np.sqrt((x[..., i] ** 2).sum(-1, keepdims=True))
        x[..., i] /= np.maximum(length, _TINY)
    return x
