"""The peers' speculative decoding, each against its own plain decoding, and ours beside them.

Every mode is a process of its own; only the one whose turn it is runs. All answer the same prompt
ids greedily and end where their model ends, so texts may differ between runtimes: rates are
compared between them, never times. All load their model anew for each repetition, because some
of them remember earlier answers from request to request.
"""

from __future__ import annotations

import re
import sys
from collections import defaultdict
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from forerun.apps.bench import peers, prepare
from forerun.apps.bench.draft_peer_rows import (
    PLAIN_MODE,
    Turn,
    Turns,
    make_ratios,
    make_rows,
)
from forerun.apps.bench.draft_rows import ALL, distinct_share
from forerun.apps.bench.draft_turns import PLAIN
from forerun.apps.bench.turns import FOREIGN_LIMIT, Bench
from forerun.apps.bench.worker import Worker, WorkerError
from forerun.devices.home import find_bundle, home
from forerun.errors import ForerunError
from forerun.runtime.manifest import load_manifest

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from forerun.apps.bench.draft import Options
    from forerun.apps.bench.peers import Runtime
    from forerun.apps.bench.turns import Opened

_CONTEXT_STEP = 256


@dataclass(frozen=True)
class Mode:
    """One way in which a peer decodes.

    Attributes:
        peer: key of its row in `peers.PEERS`.
        name: for tables.
        options: what its worker's `load` is told.
    """

    peer: str
    name: str
    options: dict[str, Any]


def _llama(name: str, spec_type: str, *more: str) -> Mode:
    return Mode("llama-q4_0", name, {"arguments": ["--spec-type", spec_type, *more]})


# Two of them also as tuned for short texts: their defaults look for 12 and 24 equal tokens.
MODES = (
    Mode("llama-q4_0", PLAIN_MODE, {}),
    _llama("ngram-simple", "ngram-simple"),
    _llama(
        "ngram-simple 3/8",
        "ngram-simple",
        "--spec-ngram-simple-size-n",
        "3",
        "--spec-ngram-simple-size-m",
        "8",
    ),
    _llama("ngram-map-k", "ngram-map-k"),
    _llama(
        "ngram-map-k 3/8",
        "ngram-map-k",
        "--spec-ngram-map-k-size-n",
        "3",
        "--spec-ngram-map-k-size-m",
        "8",
    ),
    _llama("ngram-map-k4v", "ngram-map-k4v"),
    _llama("ngram-mod", "ngram-mod"),
    _llama("ngram-cache (lookup)", "ngram-cache"),
    Mode("genai", PLAIN_MODE, {}),
    Mode("genai", "n-gram 3/8", {"speculative": {"ngram_size": 3, "max_draft_tokens": 8}}),
    Mode(
        "genai",
        "n-gram chained 3/8",
        {"speculative": {"ngram_size": 3, "max_draft_tokens": 8, "ngram_chained_lookup": True}},
    ),
    Mode("openvino", PLAIN_MODE, {}),
    Mode(
        "openvino",
        "prompt lookup 5/3",
        {"prompt_lookup": {"num_assistant_tokens": 5, "max_ngram_size": 3}},
    ),
    Mode(
        "openvino",
        "prompt lookup 10/3",
        {"prompt_lookup": {"num_assistant_tokens": 10, "max_ngram_size": 3}},
    ),
)


@dataclass(frozen=True)
class Task:
    """A prompt as ids, and its category."""

    category: str
    ids: tuple[int, ...]


def measure_peers(
    drafter: str,
    tasks: Sequence[Task],
    eos: Sequence[int],
    options: Options,
    progress: Callable[[str, int, int | None], None],
    stopped: Callable[[], bool],
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Give all modes of all installed peers, and forerun plain and drafted, their turns.

    Args:
        drafter: what forerun drafts with.
        tasks: prompts.
        eos: ids that end an answer.
        options: of the benchmark; repetitions, threads and the longest answer count here.
        progress: told the answers made and all there are.
        stopped: asked after each answer; True ends the measurement.
        say: told what takes long.

    Returns:
        drafter, rows, ratios, left_out and warnings.

    Raises:
        ForerunError: no peer can take part, or forerun's own worker failed.
    """
    chosen, left_out = _choose(options.model, drafter, say)
    longest = max(len(task.ids) for task in tasks) + options.max_tokens + 1
    context = -(-longest // _CONTEXT_STEP) * _CONTEXT_STEP
    bench = Bench(say, home() / "cache" / "bench-logs", options.threads, context)
    try:
        bench.open(chosen)
        turns = _take_turns(bench, tasks, eos, options, progress, stopped)
        modes = {item.key: item for item in bench.opened}
    finally:
        bench.close()
    categories = list(dict.fromkeys(task.category for task in tasks))
    rows = [row for name in (*categories, ALL) for row in make_rows(modes, turns, name)]
    ratios = [row for name in (ALL, *categories) for row in make_ratios(modes, turns, name)]
    found = {"drafter": drafter, "rows": rows, "ratios": ratios}
    return {**found, "left_out": left_out | bench.failed, "warnings": _warnings(bench)}


def _choose(
    model: str, drafter: str, say: Callable[[str], None]
) -> tuple[list[tuple[Runtime, prepare.Prepared, str]], dict[str, str]]:
    """Modes with their model and interpreter, and the peers left out with the reason.

    Raises:
        NotPrepared: no peer can take part.
    """
    folder = find_bundle(model)
    manifest = load_manifest(folder)
    method = manifest.quantization.method
    ours = peers.forerun_runtime(folder.name if method == "none" else method)
    bundle = prepare.Prepared(folder, ours.weights)
    chosen = [
        (_as_mode(ours, mode, {"drafter": name}), bundle, sys.executable)
        for mode, name in ((PLAIN_MODE, PLAIN), (drafter, drafter))
    ]
    python = peers.peers_python()
    rows = {peer.key: peer for peer in peers.PEERS}
    packages = {rows[mode.peer].package or "" for mode in MODES}
    versions = peers.installed_versions(python, packages)
    left_out: dict[str, str] = {}
    origin = None
    for mode in MODES:
        peer = rows[mode.peer]
        if peer.package not in versions:
            left_out[peer.name] = (
                f"not installed ({peers.INSTALL_HINT}, or set {peers.PYTHON_VARIABLE})"
            )
            continue
        origin = origin or prepare.origin_of(manifest.name, python, say)
        try:
            prepared = prepare.MODELS[peer.model](origin)
        except ForerunError as error:
            left_out[peer.name] = str(error)
            continue
        chosen.append((_as_mode(peer, mode.name, mode.options), prepared, python))
    if len(chosen) == 2:
        raise prepare.NotPrepared("; ".join(f"{name}: {why}" for name, why in left_out.items()))
    return chosen, left_out


def _as_mode(runtime: Runtime, mode: str, options: dict[str, Any]) -> Runtime:
    key = re.sub(r"[^a-z0-9]+", "-", f"{runtime.key} {mode}")  # it names the log
    return replace(runtime, key=key, mode=mode, options=options)


def _take_turns(
    bench: Bench,
    tasks: Sequence[Task],
    eos: Sequence[int],
    options: Options,
    progress: Callable[[str, int, int | None], None],
    stopped: Callable[[], bool],
) -> Turns:
    """Turns of every mode; a repetition that was not finished counts only if it is the first."""
    turns: Turns = defaultdict(list)
    total = len(tasks) * options.repeat
    for repeat in range(options.repeat):
        fresh: Turns = defaultdict(list)
        for item in bench.workers:
            _guarded(bench, item, lambda item=item: bench.reload(item))
        for number, task in enumerate(tasks):
            work = _work(task, eos, options.max_tokens, repeat)
            for item in _rotated(bench.workers, number + repeat):
                if stopped():
                    return turns if repeat else fresh
                turn = _guarded(bench, item, lambda item=item, work=work: bench.turn(item, work))
                if turn is not None:
                    fresh[item.runtime.key].append(turn)
            progress("prompts of the peers", repeat * len(tasks) + number + 1, total)
        for key, found in fresh.items():
            turns[key] += found
    return turns


def _guarded(bench: Bench, item: Opened, call: Callable[[], Any]) -> Any:
    """Call; None if the worker failed and was dropped.

    Raises:
        WorkerError: it was forerun's own.
    """
    try:
        return call()
    except WorkerError as error:
        bench.drop(item, error)
        return None


def _work(task: Task, eos: Sequence[int], max_tokens: int, repeat: int) -> Callable[[Worker], Turn]:
    def work(worker: Worker) -> Turn:
        answer = worker.call("measure", prompt=list(task.ids), tokens=max_tokens, eos=list(eos))
        return Turn(
            task.category,
            repeat,
            answer["steps"],
            answer["decode_s"],
            answer.get("proposed"),
            answer.get("accepted"),
            answer.get("rounds"),
            distinct_share(answer["tokens"]),
        )

    return work


def _rotated(items: list[Opened], by: int) -> list[Opened]:
    start = by % len(items) if items else 0
    return items[start:] + items[:start]


def _warnings(bench: Bench) -> list[str]:
    if not bench.disturbed:
        return []
    return [
        f"other processes used over {FOREIGN_LIMIT:.0%} of a core during {bench.disturbed} of "
        f"{bench.taken} turns of the peers"
    ]
