"""`forerun bench text`: us and the peers on the same weights and token ids, by turns."""

from __future__ import annotations

import json
import sys
import time
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from forerun.apps.bench import machine, plan, prepare, turns
from forerun.apps.bench.peers import (
    INSTALL_HINT,
    PEERS,
    PYTHON_VARIABLE,
    Runtime,
    forerun_runtime,
    installed_versions,
    peers_python,
)
from forerun.apps.bench.report import print_report
from forerun.apps.bench.worker import WorkerError
from forerun.devices.home import find_bundle, home
from forerun.errors import ContextLimitError, ForerunError, OptionError
from forerun.runtime.manifest import Manifest, load_manifest

if TYPE_CHECKING:
    from collections.abc import Sequence

TEXT = "corpus_prose.txt"
_BUSY_LOAD = 0.5


def run(
    peers: bool = False,
    json_path: Path | None = None,
    runs: int = 5,
    depths: Sequence[int] = (0, 512, 1900),
    threads: int = 2,
    model: str = "smollm2-135m",
) -> dict[str, Any]:
    """Measure, print tables to stdout and progress to stderr, and return what was measured.

    Args:
        peers: measure every installed peer too; those that are not installed are listed.
        json_path: file that takes the returned object.
        runs: repetitions; in each every runtime has one turn at each depth.
        depths: tokens in the cache at which decoding is measured.
        threads: of each runtime.
        model: name of a catalog model, or a bundle; peers need a name from the catalog.

    Raises:
        OptionError: `runs`, `depths` or `threads` are out of range.
        ContextLimitError: a depth does not fit into the model's context.
        UserError: the bundle is not there, or is damaged.
        WorkerError: forerun's own worker failed; a peer that fails is left out and listed.
    """
    _check_options(runs, depths, threads)
    folder = find_bundle(model)
    manifest = load_manifest(folder)
    depths = sorted(set(depths))
    _check_context(manifest, depths)
    measures = plan.make_plan(_token_ids(manifest, folder), depths, runs)
    chosen, left_out = _choose(peers, manifest, folder)
    about = {"machine": machine.describe(), "threads": threads, "model": manifest.name}
    about |= {"text": TEXT, "runs": runs}
    bench = turns.Bench(_say, home() / "cache" / "bench-logs", threads, plan.context_for(depths))
    started = time.monotonic()
    try:
        bench.open(chosen)
        samples = bench.measure(measures, runs)
    finally:
        bench.close()
    about["seconds"] = round(time.monotonic() - started, 1)
    result = about | _figures(bench, samples, depths, left_out, about["machine"])
    if json_path is not None:
        Path(json_path).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print_report(result)
    return result


def _figures(
    bench: turns.Bench,
    samples: turns.Samples,
    depths: Sequence[int],
    left_out: dict[str, str],
    described: dict[str, Any],
) -> dict[str, Any]:
    """The part of the output that was measured."""
    return {
        "rows": turns.rows(bench.opened, samples, depths, bench.peak_rss_mb),
        "runtimes": bench.runtimes(),
        "ratios": turns.ratios(bench.opened, samples, depths),
        "left_out": {**left_out, **bench.failed},
        "warnings": _warnings(described, bench),
    }


def _check_options(runs: int, depths: Sequence[int], threads: int) -> None:
    if runs < 1:
        raise OptionError(f"runs is {runs}; it must be at least 1")
    if threads < 1:
        raise OptionError(f"threads is {threads}; it must be at least 1")
    if not depths or min(depths) < 0:
        raise OptionError(f"depths are {list(depths)}; give at least one, none below 0")


def _check_context(manifest: Manifest, depths: Sequence[int]) -> None:
    needed = max(plan.longest(depths), plan.PREFILL_TOKENS + 1)
    if needed > manifest.kv.capacity:
        raise ContextLimitError(
            f"depth {max(depths)} needs {needed} tokens, the context holds "
            f"{manifest.kv.capacity}; give smaller --depths"
        )


def _token_ids(manifest: Manifest, folder: Path) -> list[int]:
    from forerun.runtime.tokenizer import Tokenizer

    text = resources.files("forerun.quant").joinpath(TEXT).read_text(encoding="utf-8")
    return Tokenizer(manifest, folder).encode(text, add_special=False)


def _choose(
    peers: bool, manifest: Manifest, folder: Path
) -> tuple[list[tuple[Runtime, prepare.Prepared, str]], dict[str, str]]:
    """Runtimes with their model and interpreter, and the peers left out with the reason."""
    weights = folder.name if manifest.quantization.method == "none" else ""
    weights = weights or manifest.quantization.method
    ours = forerun_runtime(weights)
    chosen = [(ours, prepare.Prepared(folder, weights), sys.executable)]
    if not peers:
        return chosen, {}
    python = peers_python()
    versions = installed_versions(python, {peer.package for peer in PEERS if peer.package})
    present = [peer for peer in PEERS if peer.package in versions]
    left_out = {
        peer.title: f"not installed ({INSTALL_HINT}, or set {PYTHON_VARIABLE})"
        for peer in PEERS
        if peer not in present
    }
    try:
        origin = prepare.origin_of(manifest.name, python, _say) if present else None
    except ForerunError as error:
        return chosen, left_out | {peer.title: str(error) for peer in present}
    for peer in present:
        assert origin is not None
        try:
            chosen.append((peer, prepare.MODELS[peer.model](origin), python))
        except ForerunError as error:
            left_out[peer.title] = str(error)
    return chosen, left_out


def _warnings(described: dict[str, Any], bench: turns.Bench) -> list[str]:
    found = []
    load = described["load_before"]
    if load is not None and load > _BUSY_LOAD:
        found.append(f"the machine was busy before the start (load {load})")
    if bench.disturbed:
        found.append(
            f"other processes used over {turns.FOREIGN_LIMIT:.0%} of a core during "
            f"{bench.disturbed} of {bench.taken} turns"
        )
    return found


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


__all__ = ["WorkerError", "run"]
