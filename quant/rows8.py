"""Matrices for cheap verification: 8-bit columns times activations rounded row by row (W8A8).

A product over n rows of `MatMulNBits` costs nearly n times its first row once the weights are in
the cache; the integer product costs far less, since it is one matrix product in 8 bits. Every row
has a scale of its own, so a row's result does not depend on the rows beside it (per-row dynamic
quantization as in LLM.int8, Dettmers 2022, without its outlier columns).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from forerun.export.writer import GraphWriter

_LEVELS = 127
_CONSTANTS = {
    "rows8.unit": np.array(1 / _LEVELS, np.float32),
    "rows8.zero": np.array(128, np.uint8),
    "rows8.axis": np.array([-1], np.int64),
    # A row of zeros would otherwise be divided by its largest value, which is zero.
    "rows8.least": np.array(1e-30, np.float32),
}


@dataclass(frozen=True)
class Columns8:
    """A matrix whose columns have a scale each: w = scale * code.

    Attributes:
        codes: int8 [K, N] in -127..127.
        scales: float32 [N].
    """

    codes: np.ndarray
    scales: np.ndarray

    def arrays(self) -> list[np.ndarray]:
        """What is written to the weights file."""
        return [self.codes, self.scales]


def quantize_columns(weight: np.ndarray) -> Columns8:
    """Round a matrix float32 [K, N] to 8 bits a weight, column by column."""
    scales = np.maximum(np.abs(weight).max(axis=0), 1e-30).astype(np.float32) / _LEVELS
    return Columns8(np.rint(weight / scales).astype(np.int8), scales)


def quantize_rows(weight: np.ndarray) -> Columns8:
    """`quantize_columns` of a matrix [N, K], transposed."""
    return quantize_columns(np.ascontiguousarray(weight.T))


def dequantize_columns(q: Columns8) -> np.ndarray:
    """Return the float32 matrix [K, N] that a quantized one stands for."""
    return q.codes.astype(np.float32) * q.scales


def write_product(writer: GraphWriter, x: str, name: str, q: Columns8, outputs: list[str]) -> None:
    """Add the nodes that multiply x [.., K] by a matrix [K, N].

    Args:
        writer: of the graph.
        x: name of the activations, float32.
        name: of the matrix.
        q: the matrix.
        outputs: name of the product, float32 [.., N].
    """
    for constant, value in _CONSTANTS.items():
        if not writer.has_constant(constant):
            writer.constant(constant, value)
    codes = writer.constant(f"{name}.codes", q.codes)
    scales = writer.constant(f"{name}.columns", q.scales)
    sizes = writer.add("Abs", [x], [f"{name}.sizes"])
    largest = writer.add("ReduceMax", [sizes, "rows8.axis"], [f"{name}.peak"], keepdims=1)
    largest = writer.add("Max", [largest, "rows8.least"], [f"{name}.largest"])
    unit = writer.add("Div", [x, largest], [f"{name}.unit"])
    rounded = writer.add("QuantizeLinear", [unit, "rows8.unit", "rows8.zero"], [f"{name}.rounded"])
    product = writer.add(
        "MatMulIntegerToFloat",
        [rounded, codes, "rows8.unit", scales, "rows8.zero"],
        [f"{name}.product"],
    )
    writer.add("Mul", [product, largest], outputs)
