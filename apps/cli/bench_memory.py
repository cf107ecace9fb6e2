"""`forerun bench memory`: where the peak memory of a long chat goes."""

from __future__ import annotations

from typing import Annotated

import typer

from forerun.apps.cli import cache_options, options
from forerun.apps.cli.bench import JsonFile, check_folder
from forerun.apps.cli.progress import reporter

# Of `bench.memory`, which takes too long to import for a help text.
LEAST_CHAT = 256

HELP = """Show where the peak memory of a long chat goes, part by part.

\b
forerun bench memory
forerun bench memory --kv int4 --json memory.json
forerun bench memory --model smollm2-135m:int8 --tokens 2000

A chat about built-in prose runs in a process of its own; each part is what its resident memory
grew by. Needs Linux.
"""

ChatTokens = Annotated[
    int,
    typer.Option("--tokens", min=LEAST_CHAT, help="Length of the chat; it ends a little below."),
]
Threads = Annotated[
    int,
    typer.Option("--threads", min=1, max=options.MAX_THREADS, help="Threads of the session."),
]


def bench_memory(
    model: options.Model = options.DEFAULT_MODEL,
    kv: cache_options.KV = None,
    tokens: ChatTokens = 7600,
    threads: Threads = 2,
    json_file: JsonFile = None,
) -> None:
    """Measure the memory of a chat; `HELP` is what the user reads."""
    check_folder(json_file)
    from forerun.apps.bench.memory import run_memory

    with reporter() as show:
        run_memory(model, kv, tokens, threads, json_file, show)
