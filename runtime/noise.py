"""Position-keyed noise: Gumbel values that depend on (seed, position, token id) and nothing else.

Sampling as ``argmax(log p + gumbel(seed, i))`` makes a text reproducible from its seed whatever
order or batch the rows were computed in, so a speculative decoder draws the very same text as a
plain one. The counter-based hash is a chain of splitmix64 finalizers (Steele, Lea and Flood 2014),
in 64-bit integers: the same on every platform.
"""

from __future__ import annotations

import numpy as np

MAX_SEED = 2**64 - 1
_MASK = MAX_SEED
_GOLDEN = 0x9E3779B97F4A7C15
_MIX1 = 0xBF58476D1CE4E5B9
_MIX2 = 0x94D049BB133111EB


def hash_bits(seed: int, position: int, ids: np.ndarray) -> np.ndarray:
    """Hash (seed, position, id) to 53 uniform bits.

    Args:
        seed: 0 .. 2**64 - 1.
        position: absolute position of the token in its sequence, >= 0.
        ids: int64 [N] token ids.

    Returns:
        uint64 [N], values in 0 .. 2**53 - 1.
    """
    key = _mix((_mix((seed + _GOLDEN) & _MASK) + (position + 1) * _GOLDEN) & _MASK)
    x = ids.astype(np.uint64)
    x *= np.uint64(_GOLDEN)
    x += np.uint64(key)
    for shift, factor in ((30, _MIX1), (27, _MIX2)):
        x ^= x >> np.uint64(shift)
        x *= np.uint64(factor)
    x ^= x >> np.uint64(31)
    x >>= np.uint64(11)
    return x


def bits_to_gumbel(bits: np.ndarray) -> np.ndarray:
    """Turn uniform bits (uint64 [N] below 2**53) into standard Gumbel noise, float64 [N].

    The map is increasing, so the largest bits are the largest noise.
    """
    uniform = (bits.astype(np.float64) + 0.5) * 2.0**-53
    # The largest bits would round to 1 and give infinity.
    np.minimum(uniform, 1.0 - 2.0**-53, out=uniform)
    return -np.log(-np.log(uniform))


def gumbel(seed: int, position: int, ids: np.ndarray) -> np.ndarray:
    """Standard Gumbel noise of (seed, position, id).

    Args:
        seed: 0 .. 2**64 - 1.
        position: absolute position of the token in its sequence.
        ids: int64 [N] token ids; only those that survive the filters need noise.

    Returns:
        float64 [N].
    """
    return bits_to_gumbel(hash_bits(seed, position, ids))


def _mix(x: int) -> int:
    """The splitmix64 finalizer on one Python integer."""
    x = ((x ^ (x >> 30)) * _MIX1) & _MASK
    x = ((x ^ (x >> 27)) * _MIX2) & _MASK
    return x ^ (x >> 31)
