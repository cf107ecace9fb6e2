"""`forerun bench profile`: where the time of a decoding step goes, by operator.

ONNX Runtime's profiler itself adds some microseconds to every node, so the sum is longer than a
step without it; read the shares.
"""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from forerun.devices.home import find_bundle
from forerun.devices.session import SessionOptions
from forerun.errors import ContextLimitError
from forerun.runtime.arena import KVArena
from forerun.runtime.bound import BoundGraph
from forerun.runtime.manifest import load_manifest

if TYPE_CHECKING:
    from collections.abc import Sequence

    from forerun.runtime.manifest import Manifest

_CHUNK = 512
_STEPS = 100


def run_profile(
    model: str, depths: Sequence[int], threads: int, json_path: Path | None = None
) -> dict[str, Any]:
    """Profile decoding steps, print a table to stdout, and return the figures.

    Args:
        model: name of a pulled model, or a bundle.
        depths: tokens in the cache.
        threads: of the session.
        json_path: file that takes the returned object.

    Returns:
        model, threads and `rows`: operator, nodes, and us (depth to microseconds a step).

    Raises:
        ContextLimitError: a depth does not fit into the KV cache.
        UserError: the bundle is not there, or is damaged.
    """
    folder = find_bundle(model)
    manifest = load_manifest(folder)
    manifest.check_files(folder)
    if max(depths) >= manifest.kv.capacity:
        raise ContextLimitError(
            f"depth {max(depths)} does not fit into the KV cache of {manifest.kv.capacity} tokens"
        )
    measured = {depth: _by_operator(manifest, folder, depth, threads) for depth in depths}
    result = {"model": model, "threads": threads, "rows": _rows(measured)}
    if json_path is not None:
        json_path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    _print(result, list(measured))
    return result


def _by_operator(
    manifest: Manifest, folder: Path, depth: int, threads: int
) -> dict[str, tuple[float, float]]:
    """Operator to (nodes a step, microseconds a step)."""
    with tempfile.TemporaryDirectory() as work:
        options = SessionOptions(threads=threads, profile=Path(work) / "trace")
        arena = KVArena(manifest.kv)
        form = manifest.lowerings["cpu"]
        graph = BoundGraph(form, folder, options, arena, manifest.model)
        runs = 0
        for start in range(0, depth, _CHUNK):
            ids = np.zeros(min(_CHUNK, depth - start), np.int64)
            graph.run(ids, start, np.array([len(ids) - 1]), start)
            runs += 1
        for _ in range(_STEPS):
            graph.run(np.zeros(1, np.int64), depth, np.zeros(1, np.int64), depth)
        events = json.loads(graph.end_profile().read_text(encoding="utf-8"))
        graph.close()
    return _tally(events, runs + _STEPS)


def _tally(events: list[dict[str, Any]], runs: int) -> dict[str, tuple[float, float]]:
    """Sum up the last `_STEPS` of `runs` runs, which all have the same nodes."""
    kernels = [e for e in events if e.get("cat") == "Node" and e["name"].endswith("_kernel_time")]
    per_run = len(kernels) // runs
    kernels = kernels[-per_run * _STEPS :]
    micros: Counter[str] = Counter()
    nodes: Counter[str] = Counter()
    for event in kernels:
        operator = event["args"]["op_name"]
        micros[operator] += event["dur"]
        nodes[operator] += 1
    return {op: (nodes[op] / _STEPS, micros[op] / _STEPS) for op in micros}


def _rows(measured: dict[int, dict[str, tuple[float, float]]]) -> list[dict[str, Any]]:
    first = next(iter(measured.values()))
    order = sorted(first, key=lambda op: -first[op][1])
    return [
        {
            "operator": op,
            "nodes": round(first[op][0]),
            "us": {str(depth): round(found[op][1]) for depth, found in measured.items()},
        }
        for op in order
    ]


def _print(result: dict[str, Any], depths: list[int]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{result['model']}, microseconds a decoding step by operator")
    table.add_column("operator (nodes)")
    for depth in depths:
        table.add_column(f"depth {depth}", justify="right")
    for row in result["rows"]:
        cells = [str(row["us"][str(depth)]) for depth in depths]
        table.add_row(f"{row['operator']} ({row['nodes']})", *cells)
    Console().print(table)
