"""Comparing an exported bundle with its source at several lengths, before it is let out."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from forerun.errors import ExportMismatch
from forerun.export.reference import reference_logits
from forerun.runtime.manifest import Check
from forerun.runtime.runner import Runner
from forerun.runtime.static_runner import StaticRunner

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from forerun.export.arch import ArchSpec
    from forerun.export.sources import WeightSource
    from forerun.runtime.manifest import Manifest

_SEED = 20261
_SHORT = 48
_PAST_WINDOW = 8
_LONGEST = 640

# What runs each form of the graph on the CPU.
RUNNERS: dict[str, Callable[[Manifest, Path], Runner | StaticRunner]] = {
    "cpu": Runner,
    "npu": StaticRunner,
}


def check_export(
    source: WeightSource,
    arch: ArchSpec,
    manifest: Manifest,
    folder: Path,
    progress: Callable[[int, int], None] | None = None,
    form: str = "cpu",
) -> Check:
    """Run the graph as prefill, in chunks and row by row, and compare with the reference.

    The text is random ids, long enough to leave a sliding window.

    Args:
        source: the weights.
        arch: the row of facts of the architecture.
        manifest: of the bundle.
        folder: of the bundle.
        progress: called with (done, total).
        form: the lowering to run, a name of `RUNNERS`.

    Returns:
        The largest error, and the bound it kept.

    Raises:
        ExportMismatch: the logits differ by more than the architecture's tolerance.
    """
    length = probe_length(source, manifest)
    ids = np.random.default_rng(_SEED).integers(0, manifest.model.vocab, length)
    expected = reference_logits(source, arch, ids)
    bound = arch.rtol * float(np.std(expected))
    runner = RUNNERS[form](manifest, folder)
    worst = 0.0
    try:
        plans = _plans(length)
        for done, (label, widths) in enumerate(plans):
            error = _largest_error(runner, ids, widths, expected)
            worst = max(worst, error)
            if not error <= bound:
                raise ExportMismatch("logits", error, bound, f"{form}, {label}")
            if progress:
                progress(done + 1, len(plans))
    finally:
        runner.close()
    metric = "max_abs_error" if form == "cpu" else f"max_abs_error_{form}"
    return Check("numpy reference", metric, worst, bound)


def probe_length(source: WeightSource, manifest: Manifest) -> int:
    """Length of the text of the check."""
    window = source.config.sliding_window or 0
    wanted = max(_SHORT, window + _PAST_WINDOW)
    return min(wanted, _LONGEST, manifest.kv.capacity)


def _plans(length: int) -> list[tuple[str, list[int]]]:
    """Ways of feeding the text: widths of the steps, the last one possibly cut short."""
    tail = min(8, length)
    plans = [
        (f"prefill of {length}", [length]),
        (f"chunks of 7 up to {length}", [7] * (length // 7)),
        (f"the last {tail} rows one by one", [length - tail] + [1] * tail),
    ]
    return [(label, [w for w in widths if w > 0]) for label, widths in plans if any(widths)]


def _largest_error(
    runner: Runner | StaticRunner, ids: np.ndarray, widths: list[int], expected: np.ndarray
) -> float:
    runner.arena.rewind(0)
    worst, start = 0.0, 0
    for width in widths:
        logits = runner.step(ids[start : start + width], want="all")
        difference = np.abs(logits - expected[start : start + width]).max()
        # NaN must not pass for small.
        worst = max(worst, float(difference) if np.isfinite(difference) else float("inf"))
        start += width
    return worst
