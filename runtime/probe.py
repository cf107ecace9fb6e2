"""Measuring how many threads a bundle's decoding step wants on this machine."""

from __future__ import annotations

from typing import TYPE_CHECKING

from forerun.devices.home import home
from forerun.devices.threads import probe_threads, remembered_threads
from forerun.runtime.runner import Runner

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from forerun.runtime.manifest import Manifest

_DEPTH = 64
_FORM = "cpu"


def best_threads(manifest: Manifest) -> int | None:
    """The thread count that was measured for a bundle's graph for the cpu, or None."""
    if _FORM not in manifest.lowerings:
        return None
    return remembered_threads(_key(manifest), home() / "cache")


def probe_bundle(manifest: Manifest, folder: Path) -> dict[int, float]:
    """Time decoding steps with each sensible thread count, and remember the best.

    Returns:
        Thread count to median milliseconds of a step.
    """

    def open_step(threads: int) -> Callable[[], object]:
        runner = Runner(manifest, folder, threads=threads)
        depth = min(_DEPTH, manifest.kv.capacity - 1)
        runner.step([0] * depth, want="none")

        def step() -> object:
            runner.arena.rewind(depth)
            return runner.step([0])

        return step

    return probe_threads(_key(manifest), home() / "cache", open_step)


def _key(manifest: Manifest) -> str:
    graph = manifest.lowerings[_FORM].graph
    return f"{manifest.name}/{manifest.quantization.method}/{manifest.files[graph].sha256[:16]}"
