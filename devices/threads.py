"""How many threads a session gets: measured once a model and machine, then remembered."""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

_CACHE_NAME = "threads.json"
_MOST = 8
_STEPS = 12
_ROUNDS = 3


def usable_cores() -> int:
    """Cores this process may run on."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on macOS and Windows
        return os.cpu_count() or 1


def default_threads() -> int:
    """Threads to use when nothing was measured: all cores up to eight."""
    return min(usable_cores(), _MOST)


def candidates() -> list[int]:
    """Thread counts worth trying: powers of two and all cores."""
    limit = default_threads()
    return sorted({n for n in (1, 2, 4, 8) if n <= limit} | {limit})


def remembered_threads(key: str, cache: Path) -> int | None:
    """The best count for `key` on this machine, or None if it was never measured."""
    try:
        value = json.loads((cache / _CACHE_NAME).read_text(encoding="utf-8"))[_full(key)]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return value if type(value) is int and value in candidates() else None


def probe_threads(
    key: str, cache: Path, open_step: Callable[[int], Callable[[], object]]
) -> dict[int, float]:
    """Measure a decoding step for each candidate and remember the fastest.

    Args:
        key: identifies the model, e.g. the hash of its weights.
        cache: folder where the choice is kept.
        open_step: for a thread count, returns a function that runs one step.

    Returns:
        Thread count to median milliseconds of a step.
    """
    times: dict[int, float] = {}
    for threads in candidates():
        step = open_step(threads)
        step()
        rounds = [_time(step) for _ in range(_ROUNDS)]
        times[threads] = statistics.median(rounds) * 1e3
        del step
    best = min(times, key=lambda n: times[n])
    _remember(key, cache, best)
    return times


def _time(step: Callable[[], object]) -> float:
    started = time.perf_counter()
    for _ in range(_STEPS):
        step()
    return (time.perf_counter() - started) / _STEPS


def _remember(key: str, cache: Path, threads: int) -> None:
    cache.mkdir(parents=True, exist_ok=True)
    path = cache / _CACHE_NAME
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        known = {}
    known = known if isinstance(known, dict) else {}
    known[_full(key)] = threads
    temporary = path.with_name(f"{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(known, indent=1), encoding="utf-8")
    temporary.replace(path)


def _full(key: str) -> str:
    return f"{platform.node()}/{usable_cores()}/{key}"
