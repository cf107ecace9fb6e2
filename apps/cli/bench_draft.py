"""`forerun bench draft`: what drafting gains, by kind of prompt and by drafter."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

import typer

from forerun.apps.cli import options
from forerun.apps.cli.bench import JsonFile, Peers, Threads, check_folder
from forerun.apps.cli.progress import reporter
from forerun.apps.cli.report import Interrupted
from forerun.errors import OptionError

HELP = """Compare every drafter with plain decoding, on the same prompts by turns.

\b
forerun bench draft
forerun bench draft --drafters auto,ngram --categories rewrite,json --limit 3
forerun bench draft --peers --json bench-draft.json --plot bench-draft.svg
forerun bench draft --temperatures 0 --simulate

The prompts are of six kinds: chat, summarise, rewrite, code, json and copy. A drafter changes the
speed and not the text, which is checked for every answer. --peers needs the peers' own
environment, see forerun bench text --help. --simulate also runs the schedules against an
accelerator that only waits; those figures are a simulation. Ctrl-C ends it and shows what is done.
"""

Names = Annotated[
    str | None,
    typer.Option("--drafters", metavar="NAME,NAME,...", help="Which; all that are here if absent."),
]
Categories = Annotated[
    str | None,
    typer.Option("--categories", metavar="NAME,NAME,...", help="Kinds of prompts; all if absent."),
]
Limit = Annotated[
    int | None,
    typer.Option("--limit", min=1, metavar="N", help="Only the first N prompts of each kind."),
]
MaxTokens = Annotated[int, typer.Option("--max-tokens", min=2, help="Most tokens of an answer.")]
Temperatures = Annotated[
    str, typer.Option("--temperatures", metavar="T,T,...", help="0 is greedy.")
]
Seeds = Annotated[int, typer.Option("--seeds", min=1, help="Seeds at each temperature above 0.")]
Repeat = Annotated[int, typer.Option("--repeat", min=1, help="Repetitions of everything.")]
Plot = Annotated[
    Path | None,
    typer.Option("--plot", metavar="FILE.svg", help="Draw the speed-ups as bars."),
]
Simulate = Annotated[
    bool, typer.Option("--simulate", help="The schedules on a simulated accelerator too.")
]


def bench_draft(
    model: options.Model = options.DEFAULT_MODEL,
    drafters: Names = None,
    categories: Categories = None,
    limit: Limit = None,
    max_tokens: MaxTokens = 128,
    temperatures: Temperatures = "0,0.8",
    seeds: Seeds = 1,
    repeat: Repeat = 3,
    threads: Threads = 2,
    peers: Peers = False,
    simulate: Simulate = False,
    json_file: JsonFile = None,
    plot_file: Plot = None,
) -> None:
    """Measure drafting; `HELP` is what the user reads."""
    from forerun.apps.bench.draft import Options, run
    from forerun.apps.bench.draft_plot import check_plot_path

    chosen = Options(
        model=model,
        drafters=names("--drafters", drafters),
        categories=names("--categories", categories),
        limit=limit,
        max_tokens=max_tokens,
        temperatures=numbers("--temperatures", temperatures),
        seeds=seeds,
        repeat=repeat,
        threads=threads,
        peers=peers,
        simulate=simulate,
    )
    check_folder(json_file)
    if plot_file is not None:
        check_plot_path(plot_file)
    with reporter() as progress:
        result = run(chosen, json_file, plot_file, progress)
    if not result["complete"]:
        raise Interrupted("interrupted; the figures are those of what was finished")


def names(option: str, text: str | None) -> tuple[str, ...]:
    """Return the names of ``a,b``, in order and each once; nothing for None.

    Raises:
        OptionError: one of them is empty.
    """
    if text is None:
        return ()
    parts = [part.strip() for part in text.split(",")]
    if not all(parts):
        raise OptionError(f"{option} {text!r} is not a list of names such as auto,ngram")
    return tuple(dict.fromkeys(parts))


def numbers(option: str, text: str) -> tuple[float, ...]:
    """Return the numbers of ``0,0.8``, in order and each once.

    Raises:
        OptionError: one of them is not a number of at least 0.
    """
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        values = [-1.0]
    if not all(math.isfinite(value) and value >= 0 for value in values):
        raise OptionError(f"{option} {text!r} is not a list of numbers from 0 on, such as 0,0.8")
    return tuple(dict.fromkeys(values))
