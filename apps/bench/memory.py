"""`forerun bench memory`: where the peak memory of a long chat goes.

The chat runs in a process of its own. Each part is what the resident memory grew by when it was
opened; keys and values are counted by the system, as their pages are of a kind of their own.
"""

from __future__ import annotations

import json
import sys
from importlib import resources
from typing import TYPE_CHECKING, Any

from forerun.apps.bench import machine
from forerun.apps.bench.worker import Worker
from forerun.apps.cli.output import emit_table
from forerun.devices.home import find_bundle, home
from forerun.errors import ContextLimitError, OptionError, UnsupportedError
from forerun.runtime.kv_request import KVRequest
from forerun.runtime.layouts import layout_name
from forerun.runtime.manifest import load_manifest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from forerun.runtime.manifest import Manifest

LEAST_TOKENS = 256
TEXT = "corpus_prose.txt"
_ASK = "Read this and say one thing about it:\n"
# Of a turn: most tokens that are read and answered, and room for the template and the question.
_READ, _ANSWER, _FRAME = 600, 60, 64
_LEAST_READ = 16
_TURN_SECONDS = 600.0
_STAGES = ("libraries", "tokenizer", "session")
PARTS = {
    "libraries": "Python, numpy, ONNX Runtime, forerun",
    "tokenizer": "tokenizer",
    "session": "ONNX Runtime session: packed weights, and what is mapped of the file",
    "kv": "KV cache",
    "rest": "the rest: activations of a step, texts, what is freed and kept",
}


def run_memory(
    model: str = "smollm2-135m",
    kv: str | None = None,
    tokens: int = 7600,
    threads: int = 2,
    json_path: Path | None = None,
    progress: Callable[[str, int, int | None], None] = lambda stage, done, total: None,
) -> dict[str, Any]:
    """Chat until a conversation is that long, print a table to stdout, and return the figures.

    Args:
        model: name of a pulled model, or a bundle.
        kv: a layout of the KV cache that the bundle has; None takes its own.
        tokens: of the conversation, all messages and answers together; it ends a little below.
        threads: of the session.
        json_path: file that takes the returned object.
        progress: called with (stage, done, total) in tokens.

    Returns:
        machine, model, kv, threads, turns, tokens, kv_bytes_per_token, peak_rss_mb, and `parts`,
        name to MiB, which add up to the peak.

    Raises:
        ContextLimitError: so many tokens do not fit into the KV cache.
        OptionError: the bundle lacks the layout, or a number is out of range.
        UnsupportedError: the system is not Linux, or the model has no chat template.
        UserError: the bundle is not there, or is damaged.
        WorkerError: the process that chats failed.
    """
    if not sys.platform.startswith("linux"):
        raise UnsupportedError("bench memory reads /proc, which only Linux has")
    folder = find_bundle(model)
    whole = load_manifest(folder)
    whole.check_files(folder)
    manifest, _ = KVRequest(kv).apply(whole)
    _check(manifest, tokens, threads)
    about = {
        "machine": machine.describe(),
        "model": model,
        "kv": layout_name(manifest.kv),
        "threads": threads,
    }
    worker = _open_worker()
    try:
        how = {"model": str(folder.absolute()), "kv": kv, "threads": threads}
        seen = {stage: worker.call(stage, **how) for stage in _STAGES}
        turns, end = _talk(worker, _excerpts(manifest, folder), tokens, progress)
    finally:
        worker.close()
    result = about | {
        "turns": turns,
        "tokens": end["tokens"],
        "kv_bytes_per_token": manifest.kv.nbytes_per_token,
        "peak_rss_mb": round(end["peak"], 2),
        "parts": parts_of(seen, end),
    }
    if json_path is not None:
        json_path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    _print(result)
    return result


def parts_of(seen: dict[str, dict[str, float]], end: dict[str, float]) -> dict[str, float]:
    """What each part takes of the peak, MiB.

    Args:
        seen: stage to the memory behind it, see `memory_worker.read_memory`.
        end: the memory behind the last turn.
    """
    # Without the cache: a first token is in it already when the session is open.
    plain = {stage: found["rss"] - found["kv"] for stage, found in seen.items()}
    parts = {
        "libraries": plain["libraries"],
        "tokenizer": plain["tokenizer"] - plain["libraries"],
        "session": plain["session"] - plain["tokenizer"],
        "kv": end["kv"],
    }
    parts["rest"] = end["peak"] - sum(parts.values())
    return {name: round(mb, 2) for name, mb in parts.items()}


def _check(manifest: Manifest, tokens: int, threads: int) -> None:
    if tokens < LEAST_TOKENS:
        raise OptionError(f"tokens is {tokens}; it must be at least {LEAST_TOKENS}")
    if threads < 1:
        raise OptionError(f"threads is {threads}; it must be at least 1")
    if tokens > manifest.kv.capacity:
        raise ContextLimitError(
            f"a chat of {tokens} tokens does not fit into the KV cache of "
            f"{manifest.kv.capacity}; give fewer --tokens"
        )
    if manifest.tokenizer.chat_template is None:
        raise UnsupportedError(f"{manifest.name} is a base model without a chat template")


def _open_worker() -> Worker:
    logs = home() / "cache" / "bench-logs"
    logs.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "forerun.apps.bench.memory_worker"]
    return Worker("the chat", command, logs / "memory.log")


def _excerpts(manifest: Manifest, folder: Path) -> Callable[[int], str]:
    """A function that gives the next piece of the built-in prose, of so many tokens."""
    from forerun.runtime.tokenizer import Tokenizer

    tokenizer = Tokenizer(manifest, folder)
    prose = resources.files("forerun.quant").joinpath(TEXT).read_text(encoding="utf-8")
    ids = tokenizer.encode(prose, add_special=False)
    at = 0

    def take(count: int) -> str:
        nonlocal at
        piece = [ids[(at + i) % len(ids)] for i in range(count)]
        at += count
        return tokenizer.decode(piece)

    return take


def _talk(
    worker: Worker,
    excerpt: Callable[[int], str],
    tokens: int,
    progress: Callable[[str, int, int | None], None],
) -> tuple[int, dict[str, Any]]:
    """Turns until no more fit; returns how many, and the answer of the last one."""
    end: dict[str, Any] = {"tokens": 0}
    turns = 0
    progress("chat", 0, tokens)
    for room in _rooms(end, tokens):
        message = _ASK + excerpt(room)
        end.update(worker.call("say", _TURN_SECONDS, message=message, tokens=_ANSWER))
        turns += 1
        progress("chat", end["tokens"], tokens)
    progress("chat", tokens, tokens)
    return turns, end


def _rooms(end: dict[str, Any], tokens: int) -> Iterator[int]:
    """Tokens that the next turn may read, for as long as there is room."""
    while True:
        room = tokens - end["tokens"] - _ANSWER - _FRAME
        if room < _LEAST_READ:
            return
        yield min(room, _READ)


def _print(result: dict[str, Any]) -> None:
    rows = [(PARTS[name], f"{mb:.1f}") for name, mb in result["parts"].items()]
    rows.append(("peak", f"{result['peak_rss_mb']:.1f}"))
    title = (
        f"{result['model']}, KV {result['kv']}, a chat of {result['tokens']:,} tokens in "
        f"{result['turns']} turns"
    )
    emit_table(("part", "MB"), rows, title)
