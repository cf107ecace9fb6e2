"""How fast this machine reads memory, which bounds how fast a model can decode."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np

_MEGABYTES = 64
_REPEATS = 5


def read_bandwidth(threads: int, megabytes: int = _MEGABYTES) -> float:
    """Bytes per second that threads of this process read together, the best of five.

    Args:
        threads: how many read at the same time, each its own part.
        megabytes: to read; well above the caches.
    """
    data = np.ones(megabytes << 18, np.float32)
    parts = np.array_split(data, max(threads, 1))
    best = float("inf")
    with ThreadPoolExecutor(len(parts)) as pool:
        for _ in range(_REPEATS):
            started = time.perf_counter()
            # numpy lets go of the interpreter lock while it looks for the maximum.
            list(pool.map(np.max, parts))
            best = min(best, time.perf_counter() - started)
    return data.nbytes / best


def contention(alone: float, together: float, threads: int) -> float:
    """Share by which readers slow each other down when all of them read.

    Args:
        alone: bytes per second of one thread.
        together: bytes per second of all of them.
        threads: how many.
    """
    return max(threads * alone / together - 1, 0.0) if threads > 1 else 0.0
