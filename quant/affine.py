"""Blocks whose 16 levels begin anywhere: w = scale * (code - zero) + rest.

Files with 4-bit blocks of a scale and a minimum (GGUF Q4_1) hold such values, and so they are kept
as they are. `MatMulNBits` knows whole zero points only. What they leave is the same for all
weights of a block, so its part of a product is `rest` times the sum of the block's inputs; the
sums are appended to the inputs and `rest`, as 4-bit codes of its own, to the matrix. That is a
twentieth more matrix and two small nodes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from forerun.quant.blocks import (
    Blocks,
    dequantize,
    half_scales,
    pack_codes,
    product_attributes,
    split_blocks,
    write_constants,
)
from forerun.quant.rounding import line_blocks, line_gptq

if TYPE_CHECKING:
    from forerun.export.writer import GraphWriter

BLOCK = 32
_TOP = 15
_MIDDLE = 8
# Steps of a rest: its codes are -7..7.
_STEPS = 7
# In steps of the grid: float32 values of a grid are this close to it, others never all are.
_TOLERANCE = 1e-3
_SAMPLE = 64


@dataclass(frozen=True)
class Affine:
    """A matrix [N, K] in blocks of 32 along K.

    Attributes:
        blocks: its 4-bit codes, scales and whole zero points.
        rest: `Blocks` [N, K / 32], rounded up to whole blocks: what is to be added to every weight
            of a block; None if that is nothing.
    """

    blocks: Blocks
    rest: Blocks | None

    def joined(self) -> Blocks:
        """The matrix that is stored: `rest` appended to `blocks` along K."""
        if self.rest is None:
            return self.blocks
        parts = (self.blocks, self.rest)
        codes = np.concatenate([p.codes for p in parts], 1)
        scales = np.concatenate([p.scales for p in parts], 1)
        zeros = np.concatenate([np.asarray(p.zeros) for p in parts], 1)
        return Blocks(codes, scales, zeros, 4)

    def arrays(self) -> list[np.ndarray]:
        """What is written to the weights file."""
        return self.joined().arrays()


def split_joined(joined: Blocks, blocks: int) -> Affine:
    """Undo `Affine.joined` for a matrix of `blocks` blocks."""
    zeros = (
        np.full(joined.scales.shape, _MIDDLE, np.uint8) if joined.zeros is None else joined.zeros
    )
    cut = [
        Blocks(joined.codes[:, part], joined.scales[:, part], zeros[:, part], 4)
        for part in (slice(blocks), slice(blocks, None))
    ]
    return Affine(cut[0], cut[1] if joined.codes.shape[1] > blocks else None)


def dequantize_affine(q: Affine) -> np.ndarray:
    """Return the float32 matrix [N, K] that a quantized one stands for."""
    values = dequantize(q.blocks)
    if q.rest is None:
        return values
    blocks = q.blocks.scales.shape[1]
    return values + np.repeat(dequantize(q.rest)[:, :blocks], BLOCK, 1)


def quantize_affine(weight: np.ndarray, moment: np.ndarray | None = None) -> Affine:
    """Keep 4-bit blocks that a matrix is made of; find such blocks by GPTQ if it is not.

    Args:
        weight: float32 [N, K].
        moment: float32 [K, K], see `rounding.quantize_gptq`; without it each block gets the levels
            of least squared error.

    Raises:
        UnsupportedError: K is not a multiple of 32.
    """
    shape = split_blocks(weight, BLOCK).shape
    found = find_grid(weight)
    if found is None:
        if moment is None:
            found = line_blocks(weight, 4, BLOCK)
        else:
            found = line_gptq(weight, moment, 4, BLOCK)
    codes, scales, starts = found
    scales = half_scales(scales.reshape(shape[:2]).astype(np.float32))
    starts = starts.reshape(shape[:2])
    whole = np.clip(
        np.rint(np.divide(-starts, scales, out=np.zeros(starts.shape), where=scales != 0)), 0, _TOP
    )
    rest = (starts + whole * scales).astype(np.float32)
    blocks = Blocks(codes.reshape(shape), scales, whole.astype(np.uint8), 4)
    return Affine(blocks, _round_rest(rest) if np.any(rest) else None)


def find_grid(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """Recover 4-bit blocks of 32 that a matrix was made from.

    Returns:
        uint8 codes [blocks, 32], scales and least levels [blocks]; None if any block has values
        that do not lie on 16 evenly spaced levels.
    """
    values = split_blocks(weight, BLOCK).reshape(-1, BLOCK)
    if _grid(values[:: max(1, len(values) // _SAMPLE)]) is None:
        return None
    return _grid(values)


def _grid(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    low = values.min(1).astype(np.float64)
    width = values.max(1) - low
    codes = np.zeros(values.shape, np.uint8)
    scales = np.where(width > 0, width, 1.0)
    left = np.flatnonzero(width > 0)
    # Blocks need not use all levels, so their range may be fewer steps.
    for steps in range(_TOP, 0, -1):
        step = width[left] / steps
        exact = (values[left] - low[left, None]) / step[:, None]
        rounded = np.rint(exact)
        fits = np.abs(exact - rounded).max(1, initial=0) < _TOLERANCE
        codes[left[fits]], scales[left[fits]] = rounded[fits], step[fits]
        left = left[~fits]
        if not len(left):
            return codes, scales, low
    return None


def _round_rest(rest: np.ndarray) -> Blocks:
    padded = np.pad(rest, ((0, 0), (0, -rest.shape[1] % BLOCK))).reshape(len(rest), -1, BLOCK)
    scales = half_scales((np.abs(padded).max(2) / _STEPS).astype(np.float32))
    inverse = np.divide(1, scales, out=np.zeros_like(scales), where=scales > 1e-30)
    codes = (np.rint(padded * inverse[..., None]) + _MIDDLE).astype(np.uint8)
    return Blocks(codes, scales, np.full(scales.shape, _MIDDLE, np.uint8), 4)


def write_product(writer: GraphWriter, x: str, name: str, q: Affine, outputs: list[str]) -> None:
    """Add the nodes that multiply x [.., K] by a matrix; see `rows8.write_product`."""
    joined = q.joined()
    if q.rest is not None:
        blocks, columns = q.blocks.scales.shape[1], q.rest.scales.shape[1] * BLOCK
        ones = _sum_matrix(writer, blocks, columns)
        sums = writer.add(
            "MatMulNBits",
            [x, *ones],
            [f"{name}.sums"],
            N=columns,
            K=blocks * BLOCK,
            bits=4,
            block_size=BLOCK,
            accuracy_level=4,
        )
        x = writer.add("Concat", [x, sums], [f"{name}.input"], axis=-1)
    names = write_constants(writer, name, joined)
    names.insert(0, writer.constant(name, pack_codes(joined)))
    writer.add("MatMulNBits", [x, *names], outputs, **product_attributes(joined))


def _sum_matrix(writer: GraphWriter, blocks: int, columns: int) -> list[str]:
    """A matrix of ones and zeros that adds up blocks of inputs, padded with empty columns."""
    names = [f"sums.{blocks}", f"sums.{blocks}.scales"]
    if not writer.has_constant(names[0]):
        # Every code is 9, so 1 above the zero point; scales of zero leave other blocks out.
        writer.constant(names[0], np.full((columns, blocks, BLOCK // 2), 0x99, np.uint8))
        writer.constant(names[1], np.eye(columns, blocks, dtype=np.float32))
    return names
