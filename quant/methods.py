"""The ways to store a matrix: one table, each with how to pack and how to unpack."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from forerun.quant.affine import Affine, dequantize_affine, quantize_affine
from forerun.quant.blocks import Blocks, dequantize
from forerun.quant.rounding import quantize_blocks, quantize_gptq, round_range
from forerun.quant.rows8 import Columns8, dequantize_columns, quantize_rows

if TYPE_CHECKING:
    from collections.abc import Callable

    Stored = Blocks | Affine | Columns8
    Pack = Callable[[np.ndarray, np.ndarray | None], Stored]

# Every width must be a multiple of it.
LEAST_BLOCK = 32


@dataclass(frozen=True)
class Method:
    """One way to store a matrix [N, K].

    Attributes:
        bits: of a code.
        block: weights along K that share a scale; 0 for all of a row.
        calibrated: packing takes the second moments of the inputs (see `calibration`).
        pack: float32 [N, K], and float32 [K, K] moments or None, to what is stored.
    """

    bits: int
    block: int
    calibrated: bool
    pack: Pack


def _blocks(quantize: Callable[[np.ndarray, int, int], Blocks], bits: int, block: int) -> Method:
    def pack(weight: np.ndarray, moment: np.ndarray | None) -> Blocks:
        return quantize(weight, bits, _fitting(weight, block))

    return Method(bits, block, False, pack)


def _gptq(bits: int, block: int) -> Method:
    def pack(weight: np.ndarray, moment: np.ndarray | None) -> Blocks:
        size = _fitting(weight, block)
        if moment is None:
            return quantize_blocks(weight, bits, size)
        return quantize_gptq(weight, moment, bits, size)

    return Method(bits, block, True, pack)


def _fitting(weight: np.ndarray, block: int) -> int:
    # Some models are as wide as 32 divides and 64 does not; smaller blocks lose nothing.
    return block if weight.shape[1] % block == 0 else LEAST_BLOCK


METHODS = {
    "range4": _blocks(round_range, 4, 32),
    "least4": _blocks(quantize_blocks, 4, 32),
    "gptq4": _gptq(4, 32),
    "gptq4-64": _gptq(4, 64),
    "affine4": Method(4, 32, True, quantize_affine),
    "least8": _blocks(quantize_blocks, 8, 32),
    "rows8": Method(8, 0, False, lambda weight, moment: quantize_rows(weight)),
}


def unpack(stored: Stored) -> np.ndarray:
    """Return the float32 matrix [N, K] that a stored one stands for."""
    return _UNPACK[type(stored)](stored)


_UNPACK: dict[type, Callable[..., np.ndarray]] = {
    Blocks: dequantize,
    Affine: dequantize_affine,
    Columns8: lambda stored: np.ascontiguousarray(dequantize_columns(stored).T),
}
