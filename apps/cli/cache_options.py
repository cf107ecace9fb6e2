"""Options about the KV cache and about skipping, shared by the commands that generate."""

from __future__ import annotations

from typing import Annotated, Any

import typer

# Of `forerun.runtime.window`, which takes too long to import for a help text.
LEAST_ROWS = 36

KV = Annotated[
    str | None,
    typer.Option(
        "--kv",
        metavar="LAYOUT",
        show_default="the bundle's own",
        help="How the KV cache is kept: fp32, fp16, int8, int4, gear-kcvt or gear-kivi, of those "
        "that the bundle has; all but fp32 are lossy.",
    ),
]
KVBudget = Annotated[
    str | None,
    typer.Option(
        "--kv-budget", metavar="SIZE", help="Memory the KV cache may take, e.g. 64MB; sets context."
    ),
]
Window = Annotated[
    int | None,
    typer.Option(
        "--window",
        min=LEAST_ROWS,
        metavar="TOKENS",
        help="Keep the first tokens and the newest ones only: a text without end in fixed memory.",
    ),
]
Skipping = Annotated[
    str,
    typer.Option(
        "--skipping",
        metavar="SHARE|RULE",
        help="Leave out this share of the feed-forward blocks while decoding, e.g. 0.1, "
        "static:0.1, decode:0.2; default takes the share that the bundle was calibrated for, off "
        "runs every block. Lossy, needs a bundle quantized with --skipping.",
    ),
]
NAMES = ("kv", "kv_budget", "window", "skipping")


def cache_arguments(given: dict[str, Any]) -> dict[str, Any]:
    """Arguments of `forerun.load` from the options of a command, by their names in `NAMES`."""
    return {name: given[name] for name in NAMES}
