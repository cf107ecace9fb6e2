"""Block-quantized matrices as MatMulNBits and GatherBlockQuantized store them.

A weight [N, K] is cut into blocks of `block` along K; each has a float32 scale and an unsigned
zero point: w = scale * (code - zero). Codes of 4 bits are packed two a byte, low nibble first.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from forerun.errors import UnsupportedError


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

    @property
    def nbytes(self) -> int:
        """Bytes when packed."""
        zeros = 0 if self.zeros is None else len(self.scales) * _zero_bytes(self)
        return self.codes.size * self.bits // 8 + self.scales.nbytes + zeros


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


def _zero_bytes(q: Blocks) -> int:
    blocks = q.scales.shape[1]
    return blocks if q.bits == 8 else -(-blocks // 2)
