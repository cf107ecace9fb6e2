"""Choosing scales, zero points and codes: by error, not by range."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np

from forerun.devices.threads import usable_cores
from forerun.quant.blocks import Blocks, split_blocks

# Small enough to stay in the second-level cache while the candidates are tried.
_CHUNK_BLOCKS = 1 << 11
# Ranges to try, relative to the range of the block's values, and shifts of the zero point.
_CANDIDATES = {
    4: [(shrink, shift) for shrink in (0.82, 0.87, 0.92, 0.96, 1.0, 1.04) for shift in (0, -1, 1)],
    8: [(1.0, 0)],
}


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
    shape = split_blocks(weight, block).shape
    flat = weight.reshape(-1, block)
    codes = np.empty(flat.shape, np.uint8)
    scales = np.empty(len(flat), np.float32)
    zeros = np.empty(len(flat), np.uint8)

    def run(start: int) -> None:
        part = slice(start, start + _CHUNK_BLOCKS)
        codes[part], scales[part], zeros[part] = _best(flat[part], bits)

    with ThreadPoolExecutor(usable_cores()) as pool:
        list(pool.map(run, range(0, len(flat), _CHUNK_BLOCKS)))
    grid = shape[:2]
    return Blocks(codes.reshape(shape), scales.reshape(grid), zeros.reshape(grid), bits)


def _best(w: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    top = (1 << bits) - 1
    # Zero must be representable, so that blocks of zeros stay what they are.
    low, high = np.minimum(w.min(1), 0), np.maximum(w.max(1), 0)
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
        energy = np.einsum("ij,ij->i", q, q)
        along = np.einsum("ij,ij->i", w, q)
        fitted = np.divide(along, energy, out=np.zeros_like(along), where=energy > 0)
        gain = fitted * along
        better = gain > best_gain
        best_gain[better], best_scale[better] = gain[better], fitted[better]
        best_zero[better], best_q[better] = zero[better], q[better]
    codes = (best_q + best_zero[:, None]).astype(np.uint8)
    return codes, best_scale, best_zero.astype(np.uint8)
