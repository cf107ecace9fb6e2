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
from itertools import pairwise
from pathlib import Path
from typing import Any

from forerun.errors import ForerunError, OptionError
from forerun.quant.corpus import (
    CHARS_PER_TOKEN,
    CORPUS,
    corpus_text,
    load_tokenizer,
    measured_part,
)
from forerun.quant.measure_open import Judged, check_judged, label, open_judged
from forerun.runtime.manifest import Manifest
from forerun.runtime.measure import peak_rss_mb

DEPTHS = (64, 1024)
_WINDOWS, _WINDOW = 3, 16
_WARM = 4
# Tokens that are decoded behind a depth.
_SPAN = _WARM + _WINDOWS * _WINDOW
_ROWS = 64
_SECONDS = 600


class MeasureError(ForerunError):
    """The process that measures speed and memory failed."""


def measure_speed(
    judged: list[Judged],
    rounds: int,
    progress: Any = None,
    depths: tuple[int, ...] | None = None,
) -> list[dict[str, Any]]:
    """Measure speed and memory of each, in turns, so that a slow drift of the machine hits all.

    Args:
        judged: what to run.
        rounds: processes for each.
        progress: called with (stage, done, total).
        depths: see `depths_of`.

    Returns:
        For each: decode_tok_s (median, min, max at the largest depth), decode_depth (that depth),
        ffn_skipped (share of the feed-forward blocks that decoding left out there),
        decode_by_depth, and peak_rss_mb, the largest of the rounds.

    Raises:
        OptionError: a depth does not fit.
        BundleError: a bundle cannot be loaded.
        MeasureError: a process failed.
    """
    requests = [_request(one, check_judged(one), depths) for one in judged]
    found: list[list[dict[str, Any]]] = [[] for _ in judged]
    for turn in range(rounds):
        for number, request in enumerate(requests):
            found[number].append(_in_a_process(request))
            if progress:
                progress("speed", turn * len(judged) + number + 1, rounds * len(judged))
    return [_summary(runs) for runs in found]


def depths_of(
    judged: Judged, manifest: Manifest, wanted: tuple[int, ...] | None
) -> tuple[int, ...]:
    """The cached tokens at which decoding is timed.

    Args:
        judged: what is run.
        manifest: of it.
        wanted: all of these; None takes those of `DEPTHS` that fit, or else the largest that does.

    Raises:
        OptionError: one of `wanted` does not fit or is too near another, or nothing would fit.
    """
    # The cache of a window has no end.
    room = [manifest.model.context] + ([] if judged.window else [manifest.kv.capacity])
    most = min(room) - _SPAN
    if most < 1:
        raise OptionError(
            f"{label(judged, manifest)} holds {min(room)} tokens, and speed is timed over {_SPAN}; "
            "measure without speed, or take a bundle with more capacity"
        )
    if wanted is None:
        return tuple(depth for depth in DEPTHS if depth <= most) or (most,)
    for depth in wanted:
        if not 1 <= depth <= most:
            raise OptionError(
                f"a depth at which speed is timed must be in 1..{most} for "
                f"{label(judged, manifest)}, since {_SPAN} tokens are decoded behind it; "
                f"got {depth}"
            )
    found = tuple(sorted(wanted))
    for low, high in pairwise(found):
        if high - low < _SPAN:
            raise OptionError(
                f"depths at which speed is timed must be {_SPAN} or more apart, since so many "
                f"tokens are decoded behind each; got {low} and {high}"
            )
    return found


def _request(judged: Judged, manifest: Manifest, wanted: tuple[int, ...] | None) -> dict[str, Any]:
    """What a process is told: all that needs a tokenizer is done here."""
    depths = depths_of(judged, manifest, wanted)
    # What adaptive skipping leaves out depends on the text, so random ids would tell nothing.
    text = measured_part(corpus_text(CORPUS[0]))[: depths[-1] * CHARS_PER_TOKEN]
    ids = load_tokenizer(manifest, judged.bundle).encode(text, add_special_tokens=False).ids
    told = {**dataclasses.asdict(judged), "bundle": str(Path(judged.bundle).absolute())}
    return {"judged": told, "depths": depths, "ids": ids[: depths[-1]]}


def _in_a_process(request: dict[str, Any]) -> dict[str, Any]:
    command = [sys.executable, "-m", "forerun.quant.measure_speed"]
    told, bundle = json.dumps(request), request["judged"]["bundle"]
    try:
        done = subprocess.run(command, input=told, capture_output=True, text=True, timeout=_SECONDS)
    except subprocess.TimeoutExpired:
        raise MeasureError(f"{bundle}: no figures within {_SECONDS} s") from None
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or ["it said nothing"]
        raise MeasureError(f"{bundle}: measuring its speed failed: {last[0][:300]}")
    return json.loads(done.stdout.splitlines()[-1])


def _summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    depths = {
        depth: _spread([rate for run in runs for rate in run["rates"][depth]])
        for depth in runs[0]["rates"]
    }
    deepest = max(depths, key=int)
    return {
        "decode_tok_s": depths[deepest],
        "decode_depth": int(deepest),
        "ffn_skipped": round(statistics.mean(run["skipped"][deepest] for run in runs), 4),
        "decode_by_depth": depths,
        "peak_rss_mb": max(run["peak_rss_mb"] for run in runs),
    }


def _spread(rates: list[float]) -> dict[str, float]:
    return {
        "median": round(statistics.median(rates), 2),
        "min": round(min(rates), 2),
        "max": round(max(rates), 2),
    }


def _rates(runner: Any, depths: list[int], ids: list[int]) -> dict[str, dict[str, Any]]:
    """Tokens a second of greedy decoding by depth, and the share of blocks that were skipped."""
    width = min(_ROWS, runner.arena.most_rows)
    rates: dict[str, list[float]] = {}
    skipped: dict[str, float] = {}
    for depth in depths:
        while (start := runner.arena.length) < depth:
            stop = min(start + width, depth)
            logits = runner.step([ids[i % len(ids)] for i in range(start, stop)])
        token = _decode(runner, int(logits.argmax()), _WARM)
        ran, possible = runner.ffn_counts
        rates[str(depth)] = []
        for _ in range(_WINDOWS):
            begun = time.perf_counter()
            token = _decode(runner, token, _WINDOW)
            rates[str(depth)].append(_WINDOW / (time.perf_counter() - begun))
        ran, possible = runner.ffn_counts[0] - ran, runner.ffn_counts[1] - possible
        skipped[str(depth)] = 1 - ran / possible
    return {"rates": rates, "skipped": skipped}


def _decode(runner: Any, token: int, count: int) -> int:
    for _ in range(count):
        token = int(runner.step([token]).argmax())
    return token


def main() -> None:
    """Measure what standard input describes and print one line of JSON."""
    request = json.load(sys.stdin)
    told = request["judged"]
    runner = open_judged(Judged(**{**told, "bundle": Path(told["bundle"])}))
    try:
        found = _rates(runner, request["depths"], request["ids"])
    finally:
        runner.close()
    print(json.dumps({**found, "peak_rss_mb": round(peak_rss_mb(), 1)}))


if __name__ == "__main__":
    main()
