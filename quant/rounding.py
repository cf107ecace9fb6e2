"""Choosing scales, zero points and codes: by error, not by range."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np

from forerun.devices.threads import usable_cores
from forerun.quant.blocks import Blocks, half_scales, split_blocks

if TYPE_CHECKING:
    from collections.abc import Callable

    Grid = tuple[np.ndarray, np.ndarray, np.ndarray]
    Choose = Callable[[np.ndarray, int, np.ndarray], Grid]

# Small enough to stay in the second-level cache while the candidates are tried.
_CHUNK_BLOCKS = 1 << 11
# Ranges to try, relative to the range of the block's values, and shifts of the zero point.
_CANDIDATES = {
    4: [(shrink, shift) for shrink in (0.84, 0.9, 0.95, 1.0) for shift in (0, -1, 1)],
    8: [(1.0, 0)],
}
_LINE_SHRINKS = (0.84, 0.9, 0.95, 1.0)
_DAMPING = 0.01
# Rows of GPTQ that are worked on at a time: a vocabulary is too long to copy whole.
_CHUNK_ROWS = 1 << 12


def quantize_blocks(weight: np.ndarray, bits: int, block: int) -> Blocks:
    """Quantize with the scale and zero point of least squared error in each block.

    A few ranges and zero points are tried; for the codes that each gives the scale is refitted by
    least squares, and the best candidate wins.

    Args:
        weight: float32 [N, K].
        bits: 4 or 8.
        block: weights that share a scale and a zero point.

    Raises:
        UnsupportedError: K is not a multiple of the block size.
    """
    codes, scales, zeros = _plain(weight, bits, block, best_grid)
    return Blocks(codes, scales, zeros.astype(np.uint8), bits)


def round_range(weight: np.ndarray, bits: int, block: int) -> Blocks:
    """Round to the nearest of evenly spaced levels over the range of each block.

    Args:
        weight: float32 [N, K].
        bits: 4 or 8.
        block: weights that share a scale and a zero point.

    Raises:
        UnsupportedError: K is not a multiple of the block size.
    """
    values = split_blocks(weight, block)
    top = (1 << bits) - 1
    low, high = np.minimum(values.min(2), 0), np.maximum(values.max(2), 0)
    scales = half_scales(((high - low) / top).astype(np.float32))
    inverse = np.divide(1, scales, out=np.zeros_like(scales), where=scales > 1e-30)
    zeros = np.clip(np.rint(-low * inverse), 0, top)
    codes = np.clip(np.rint(values * inverse[..., None] + zeros[..., None]), 0, top)
    return Blocks(codes.astype(np.uint8), scales, zeros.astype(np.uint8), bits)


def quantize_gptq(weight: np.ndarray, moment: np.ndarray, bits: int, block: int) -> Blocks:
    """Quantize column by column, moving each error to columns not yet rounded (Frantar 2022).

    Args:
        weight: float32 [N, K].
        moment: float32 [K, K], the sum of x x^T over inputs x of this matrix.
        bits: 4 or 8.
        block: weights that share a scale and a zero point.

    Raises:
        UnsupportedError: K is not a multiple of the block size.
    """
    codes, scales, zeros = _gptq(weight, moment, bits, block, best_grid)
    return Blocks(codes, scales, zeros.astype(np.uint8), bits)


def line_gptq(
    weight: np.ndarray, moment: np.ndarray, bits: int, block: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """As `quantize_gptq`, with levels that begin anywhere.

    Returns:
        uint8 codes [N, K / block, block], float32 scales and least levels [N, K / block].
    """
    codes, scales, zeros = _gptq(weight, moment, bits, block, best_line)
    return codes, scales, -zeros * scales


def line_blocks(
    weight: np.ndarray, bits: int, block: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """As `quantize_blocks`, with levels that begin anywhere; returns as `line_gptq`."""
    codes, scales, zeros = _plain(weight, bits, block, best_line)
    return codes, scales, -zeros * scales


def _plain(weight: np.ndarray, bits: int, block: int, choose: Choose) -> Grid:
    """Round every block by itself, all of its columns equally important."""
    shape = split_blocks(weight, block).shape
    flat = weight.reshape(-1, block)
    codes = np.empty(flat.shape, np.uint8)
    scales, zeros = np.empty(len(flat), np.float32), np.empty(len(flat), np.float32)
    even = np.ones(block, np.float32)

    def run(part: slice) -> None:
        codes[part], scales[part], zeros[part] = choose(flat[part], bits, even)

    _in_parallel(run, len(flat), _CHUNK_BLOCKS)
    return codes.reshape(shape), half_scales(scales).reshape(shape[:2]), zeros.reshape(shape[:2])


def _gptq(weight: np.ndarray, moment: np.ndarray, bits: int, block: int, choose: Choose) -> Grid:
    shape = split_blocks(weight, block).shape
    upper, importance = _inverse_factor(moment)
    codes = np.empty(weight.shape, np.uint8)
    scales, zeros = np.empty(shape[:2], np.float32), np.empty(shape[:2], np.float32)

    def run(part: slice) -> None:
        rows = weight[part].astype(np.float32)
        for number in range(shape[1]):
            begin, end = number * block, (number + 1) * block
            _, scale, zero = choose(rows[:, begin:end], bits, importance[begin:end])
            scale = half_scales(scale)
            inner = upper[begin:end, begin:end]
            codes[part, begin:end], errors = _round_block(
                rows[:, begin:end], scale, zero.astype(np.float32), inner, bits
            )
            rows[:, end:] -= errors @ upper[begin:end, end:]
            scales[part, number], zeros[part, number] = scale, zero

    _in_parallel(run, len(weight), min(_CHUNK_ROWS, -(-len(weight) // usable_cores())))
    return codes.reshape(shape), scales, zeros


def best_grid(
    w: np.ndarray, bits: int, importance: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Search the grid of least weighted squared error for each row.

    Args:
        w: float32 [R, block].
        bits: 4 or 8.
        importance: float32 [block], weight of each column's error.

    Returns:
        uint8 codes [R, block], float32 scales [R], uint8 zero points [R].
    """
    top = (1 << bits) - 1
    # Zero must be representable, so that blocks of zeros stay what they are.
    low, high = np.minimum(w.min(1), 0), np.maximum(w.max(1), 0)
    weighted = w * importance
    best_gain = np.full(len(w), -1, np.float32)
    best_q = np.zeros(w.shape, np.float32)
    best_scale, best_zero = np.zeros(len(w), np.float32), np.zeros(len(w), np.float32)
    for shrink, shift in _CANDIDATES[bits]:
        scale = (high - low) * np.float32(shrink / top)
        inverse = np.divide(1, scale, out=np.zeros_like(scale), where=scale > 1e-30)
        zero = np.clip(np.rint(top / 2 - (low + high) / 2 * inverse) + shift, 0, top)
        q = np.rint(w * inverse[:, None])
        q += zero[:, None]
        np.clip(q, 0, top, out=q)
        q -= zero[:, None]
        # With the codes fixed the best scale is a projection, and it lowers the error by `gain`.
        energy = np.einsum("ij,ij,j->i", q, q, importance)
        along = np.einsum("ij,ij->i", weighted, q)
        fitted = np.divide(along, energy, out=np.zeros_like(along), where=energy > 0)
        gain = fitted * along
        better = gain > best_gain
        best_gain[better], best_scale[better] = gain[better], fitted[better]
        best_zero[better], best_q[better] = zero[better], q[better]
    codes = (best_q + best_zero[:, None]).astype(np.uint8)
    return codes, best_scale, best_zero.astype(np.uint8)


def best_line(
    w: np.ndarray, bits: int, importance: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Search the evenly spaced levels of least weighted squared error for each row.

    Args:
        w: float32 [R, block].
        bits: 4 or 8.
        importance: float32 [block], weight of each column's error.

    Returns:
        uint8 codes [R, block], float32 scales and zero points [R], which need not be whole.
    """
    top = (1 << bits) - 1
    low, high = w.min(1), w.max(1)
    share = importance / importance.sum()
    mean = w @ share
    centred = (w - mean[:, None]) * share
    best_gain = np.full(len(w), -1, np.float32)
    best_q = np.zeros(w.shape, np.float32)
    best_scale, best_zero = np.zeros(len(w), np.float32), np.zeros(len(w), np.float32)
    for shrink in _LINE_SHRINKS:
        scale = np.maximum((high - low) * np.float32(shrink / top), 1e-30)
        q = (w - ((low + high) / 2)[:, None]) / scale[:, None]
        q += top / 2
        np.clip(np.rint(q, out=q), 0, top, out=q)
        # With the codes fixed, scale and offset are a line fitted by least squares.
        q_mean = q @ share
        spread = np.einsum("ij,ij,j->i", q, q, share) - q_mean**2
        along = np.einsum("ij,ij->i", centred, q)
        fitted = np.divide(along, spread, out=np.zeros_like(along), where=spread > 1e-6)
        gain = fitted * along
        better = gain > best_gain
        best_gain[better], best_scale[better] = gain[better], fitted[better]
        best_q[better], best_zero[better] = q[better], q_mean[better]
    # The line goes through the means; a row of one value has no slope to say where that is.
    flat = best_scale <= 1e-30
    best_scale[flat] = np.maximum(np.abs(mean[flat]), 1e-30)
    zero = best_zero - mean / best_scale
    return best_q.astype(np.uint8), best_scale, zero.astype(np.float32)


def _inverse_factor(moment: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Upper Cholesky factor of the damped inverse, and the importance of each column."""
    damped = moment.astype(np.float64)
    diagonal = np.diagonal(damped).copy()
    damping = _DAMPING * max(float(diagonal.mean()), 1e-12)
    damped[np.diag_indices_from(damped)] += damping
    upper = np.linalg.cholesky(np.linalg.inv(damped)).T
    importance = (diagonal + damping) / (diagonal.mean() + damping)
    return upper.astype(np.float32), importance.astype(np.float32)


def _round_block(
    w: np.ndarray, scale: np.ndarray, zero: np.ndarray, upper: np.ndarray, bits: int
) -> tuple[np.ndarray, np.ndarray]:
    """Round the columns of a block in turn; returns codes and the errors to hand on."""
    top = (1 << bits) - 1
    w = w.copy()
    codes, errors = np.empty(w.shape, np.uint8), np.empty(w.shape, np.float32)
    inverse = np.divide(1, scale, out=np.zeros_like(scale), where=np.abs(scale) > 1e-30)
    for j in range(w.shape[1]):
        q = np.clip(np.rint(w[:, j] * inverse + zero), 0, top)
        codes[:, j] = q
        errors[:, j] = (w[:, j] - scale * (q - zero)) / upper[j, j]
        w[:, j + 1 :] -= errors[:, j, None] * upper[j, j + 1 :]
    return codes, errors


def _in_parallel(run: Callable[[slice], None], count: int, chunk: int) -> None:
    parts = [slice(start, start + chunk) for start in range(0, count, chunk)]
    with ThreadPoolExecutor(usable_cores()) as pool:
        list(pool.map(run, parts))
