"""Decoding speed and peak memory of one bundle in a process of its own; run with ``python -m``.

Only so is the peak that of the bundle and not of the evaluator with its reference. Nothing heavy
may be imported here.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from forerun.errors import ForerunError
from forerun.quant.measure_open import Judged, open_judged
from forerun.runtime.measure import peak_rss_mb

DEPTHS = (64, 1024)
_WINDOWS, _WINDOW = 3, 16
_WARM = 4
_ROWS = 64
_SECONDS = 600


class MeasureError(ForerunError):
    """The process that measures speed and memory failed."""


def measure_speed(
    judged: list[Judged],
    rounds: int,
    progress: Any = None,
    depths: tuple[int, ...] = DEPTHS,
) -> list[dict[str, Any]]:
    """Measure speed and memory of each, in turns, so that a slow drift of the machine hits all.

    Args:
        judged: what to run.
        rounds: processes for each.
        progress: called with (stage, done, total).
        depths: cached tokens at which decoding is timed; those that do not fit are left out.

    Returns:
        For each: decode_tok_s (median, min, max at the largest depth), decode_by_depth, and
        peak_rss_mb, the largest of the rounds.

    Raises:
        MeasureError: a process failed.
    """
    found: list[list[dict[str, Any]]] = [[] for _ in judged]
    for turn in range(rounds):
        for number, one in enumerate(judged):
            found[number].append(_in_a_process(one, depths))
            if progress:
                progress("speed", turn * len(judged) + number + 1, rounds * len(judged))
    return [_summary(runs) for runs in found]


def _in_a_process(judged: Judged, depths: tuple[int, ...]) -> dict[str, Any]:
    request = {**dataclasses.asdict(judged), "bundle": str(Path(judged.bundle).absolute())}
    request["depths"] = depths
    command = [sys.executable, "-m", "forerun.quant.measure_speed", json.dumps(request)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS)
    except subprocess.TimeoutExpired:
        raise MeasureError(f"{judged.bundle}: no figures within {_SECONDS} s") from None
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or ["it said nothing"]
        raise MeasureError(f"{judged.bundle}: measuring its speed failed: {last[0][:300]}")
    return json.loads(done.stdout.splitlines()[-1])


def _summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    depths = {
        depth: _spread([rate for run in runs for rate in run["rates"][depth]])
        for depth in runs[0]["rates"]
    }
    return {
        "decode_tok_s": depths[max(depths, key=int)],
        "decode_by_depth": depths,
        "peak_rss_mb": max(run["peak_rss_mb"] for run in runs),
    }


def _spread(rates: list[float]) -> dict[str, float]:
    return {
        "median": round(statistics.median(rates), 2),
        "min": round(min(rates), 2),
        "max": round(max(rates), 2),
    }


def _rates(runner: Any, wanted: list[int]) -> dict[str, list[float]]:
    """Tokens a second of greedy decoding, by depth that the caches can hold."""
    limit = min(runner.arena.capacity, runner.manifest.model.context)
    width = min(_ROWS, runner.arena.most_rows)
    span = _WARM + _WINDOWS * _WINDOW
    depths = [depth for depth in sorted(wanted) if depth + span <= limit] or [max(1, limit - span)]
    ids = list(range(min(runner.manifest.model.vocab, 256)))
    rates = {}
    for depth in depths:
        while runner.arena.length < depth:
            count = min(width, depth - runner.arena.length)
            logits = runner.step([ids[i % len(ids)] for i in range(count)])
        token = int(logits.argmax())
        token = _decode(runner, token, _WARM)
        rates[str(depth)] = []
        for _ in range(_WINDOWS):
            start = time.perf_counter()
            token = _decode(runner, token, _WINDOW)
            rates[str(depth)].append(_WINDOW / (time.perf_counter() - start))
    return rates


def _decode(runner: Any, token: int, count: int) -> int:
    for _ in range(count):
        token = int(runner.step([token]).argmax())
    return token


def main() -> None:
    """Measure what the argument describes and print one line of JSON."""
    request = json.loads(sys.argv[1])
    depths = request.pop("depths")
    judged = Judged(**{**request, "bundle": Path(request["bundle"])})
    runner = open_judged(judged)
    try:
        rates = _rates(runner, depths)
    finally:
        runner.close()
    print(json.dumps({"rates": rates, "peak_rss_mb": round(peak_rss_mb(), 1)}))


if __name__ == "__main__":
    main()
