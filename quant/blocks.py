"""Block-quantized matrices as MatMulNBits and GatherBlockQuantized store them.

A weight [N, K] is cut into blocks of `block` along K; each has a float32 scale and an unsigned
zero point: w = scale * (code - zero). Codes of 4 bits are packed two a byte, low nibble first.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from forerun.errors import UnsupportedError

if TYPE_CHECKING:
    from forerun.export.writer import GraphWriter

# int8 activations within blocks: the only level whose rows do not depend on each other.
_ACCURACY_LEVEL = 4
# What rounding to 11 bits does to a number that float16 holds as a normal one.
_HALF_ERROR = 2.0**-11
# A scale of that part of the largest one is as good as none.
_TINY = 1e-6
_FLOAT = 1


@dataclass(frozen=True)
class Blocks:
    """A quantized matrix.

    Attributes:
        codes: uint8 [N, K / block, block], one code a byte.
        scales: float32 [N, K / block].
        zeros: uint8 [N, K / block], or None when every zero point is 2 ** (bits - 1).
        bits: 4 or 8.
    """

    codes: np.ndarray
    scales: np.ndarray
    zeros: np.ndarray | None
    bits: int

    @property
    def block(self) -> int:
        """Weights that share a scale."""
        return self.codes.shape[2]

    def arrays(self) -> list[np.ndarray]:
        """What is written to the weights file."""
        zeros = pack_zeros(self)
        arrays = [pack_codes(self), stored_scales(self.scales)]
        return arrays if zeros is None else [*arrays, zeros]


def split_blocks(weight: np.ndarray, block: int) -> np.ndarray:
    """View a matrix [N, K] as [N, K / block, block].

    Raises:
        UnsupportedError: K is not a multiple of the block size.
    """
    rows, columns = weight.shape
    if columns % block:
        raise UnsupportedError(f"{columns} columns cannot be cut into blocks of {block}")
    return weight.reshape(rows, columns // block, block)


def dequantize(q: Blocks) -> np.ndarray:
    """Return the float32 matrix [N, K] that a quantized one stands for."""
    zero = np.float32(1 << (q.bits - 1)) if q.zeros is None else q.zeros[..., None]
    values = (q.codes.astype(np.float32) - zero) * q.scales[..., None]
    return values.reshape(len(q.codes), -1)


def pack_codes(q: Blocks) -> np.ndarray:
    """Pack codes into uint8 [N, K / block, block * bits / 8]."""
    if q.bits == 8:
        return q.codes
    return q.codes[..., 0::2] | (q.codes[..., 1::2] << 4)


def unpack_codes(packed: np.ndarray, bits: int) -> np.ndarray:
    """Undo `pack_codes`."""
    if bits == 8:
        return packed
    return np.stack([packed & 15, packed >> 4], -1).reshape(*packed.shape[:-1], -1)


def pack_zeros(q: Blocks) -> np.ndarray | None:
    """Pack zero points into uint8 [N, bytes]; with 4 bits two a byte along the row."""
    if q.zeros is None or q.bits == 8:
        return q.zeros
    zeros = q.zeros
    if zeros.shape[1] % 2:
        zeros = np.pad(zeros, ((0, 0), (0, 1)))
    return zeros[:, 0::2] | (zeros[:, 1::2] << 4)


def unpack_zeros(packed: np.ndarray, blocks: int, bits: int) -> np.ndarray:
    """Undo `pack_zeros` for rows of `blocks` blocks."""
    if bits == 8:
        return packed
    return np.stack([packed & 15, packed >> 4], -1).reshape(len(packed), -1)[:, :blocks]


def half_scales(scales: np.ndarray) -> np.ndarray:
    """Round scales to what float16 holds, those excepted of which it holds fewer than 11 bits.

    The error is a fiftieth of that of 4-bit codes at most.
    """
    with np.errstate(over="ignore", under="ignore"):
        half = scales.astype(np.float16).astype(np.float32)
    return np.where(np.abs(half - scales) <= _HALF_ERROR * np.abs(scales), half, scales)


def stored_scales(scales: np.ndarray) -> np.ndarray:
    """Scales as float16 if `half_scales` could round all that matter, or else as they are."""
    with np.errstate(over="ignore", under="ignore"):
        half = scales.astype(np.float16)
    tiny = np.abs(scales) <= _TINY * np.abs(scales).max(initial=0)
    return half if np.all((half == scales) | tiny) else scales


def write_constants(writer: GraphWriter, name: str, q: Blocks) -> list[str]:
    """Store scales and zero points of a matrix; return the names that nodes take.

    Scales in float16 get a node that widens them, which ONNX Runtime evaluates when it loads.
    """
    scales = writer.constant(f"{name}.scales", (stored := stored_scales(q.scales)))
    if stored.dtype == np.float16:
        scales = writer.add("Cast", [scales], [f"{scales}.float"], to=_FLOAT)
    zeros = pack_zeros(q)
    return [scales] if zeros is None else [scales, writer.constant(f"{name}.zeros", zeros)]


def write_product(writer: GraphWriter, x: str, name: str, q: Blocks, outputs: list[str]) -> None:
    """Add the node that multiplies x [.., K] by a matrix [N, K], transposed."""
    names = [writer.constant(name, pack_codes(q)), *write_constants(writer, name, q)]
    writer.add("MatMulNBits", [x, *names], outputs, **product_attributes(q))


def product_attributes(q: Blocks) -> dict[str, int]:
    """Attributes of a `MatMulNBits` node."""
    rows, blocks = q.scales.shape
    return {
        "N": rows,
        "K": blocks * q.block,
        "bits": q.bits,
        "block_size": q.block,
        "accuracy_level": _ACCURACY_LEVEL,
    }
