"""`forerun bench`: measurements, with the peers beside them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from forerun.apps.cli import options
from forerun.errors import OptionError

# Of `bench.quality`, which takes too long to import for a help text.
LEAST_TEXT = 2048

HELP = "Measure forerun, and other runtimes on the same weights."

TEXT_HELP = """Measure prefill, decoding and memory, each runtime in a process of its own, by turns.

\b
forerun bench text
forerun bench text --peers --runs 7 --json bench-text.json
forerun bench text --depths 0,512 --threads 4

Peers that cannot live in this environment are looked for in that of another Python:
FORERUN_PEERS_PYTHON=peers/bin/python forerun bench text --peers
"""

QUALITY_HELP = """Compare what each form of the weights says with the float32 bundle.

\b
forerun pull smollm2-135m --variant fp32
forerun bench quality
forerun bench quality --peers --tokens 8192 --json quality.json
"""

PROFILE_HELP = """Show where the time of a decoding step goes, by operator.

\b
forerun bench profile
forerun bench profile --depths 16,4096 --threads 1 --json profile.json
"""

Peers = Annotated[bool, typer.Option("--peers", help="Every installed peer too (extra: peers).")]
JsonFile = Annotated[
    Path | None,
    typer.Option("--json", metavar="FILE", help="Write all figures to this file."),
]
Runs = Annotated[int, typer.Option("--runs", min=1, help="Repetitions of every measurement.")]
Depths = Annotated[
    str, typer.Option("--depths", metavar="N,N,...", help="Tokens in the cache when decoding.")
]
Tokens = Annotated[
    int, typer.Option("--tokens", min=LEAST_TEXT, help="How much text is read, in tokens.")
]
Threads = Annotated[
    int,
    typer.Option("--threads", min=1, max=options.MAX_THREADS, help="Threads of every runtime."),
]


def bench_text(
    peers: Peers = False,
    json_file: JsonFile = None,
    runs: Runs = 5,
    depths: Depths = "0,512,1900",
    threads: Threads = 2,
    model: options.Model = options.DEFAULT_MODEL,
) -> None:
    """Measure text generation; `TEXT_HELP` is what the user reads."""
    wanted = depth_list(depths)
    check_folder(json_file)
    from forerun.apps.bench.text import run

    run(peers=peers, json_path=json_file, runs=runs, depths=wanted, threads=threads, model=model)


def bench_quality(
    peers: Peers = False,
    json_file: JsonFile = None,
    tokens: Tokens = 4096,
    threads: Threads = 2,
    model: options.Model = options.DEFAULT_MODEL,
) -> None:
    """Measure what quantization costs; `QUALITY_HELP` is what the user reads."""
    check_folder(json_file)
    from forerun.apps.bench.quality import run_quality

    run_quality(model=model, json_path=json_file, peers=peers, tokens=tokens, threads=threads)


def bench_profile(
    json_file: JsonFile = None,
    depths: Depths = "16,512,1900",
    threads: Threads = 2,
    model: options.Model = options.DEFAULT_MODEL,
) -> None:
    """Profile decoding; `PROFILE_HELP` is what the user reads."""
    wanted = depth_list(depths)
    check_folder(json_file)
    from forerun.apps.bench.profile import run_profile

    run_profile(model=model, depths=wanted, threads=threads, json_path=json_file)


def check_folder(json_file: Path | None) -> None:
    """Refuse a file whose folder is missing, before anything is measured.

    Raises:
        OptionError: it is.
    """
    if json_file is not None and not json_file.absolute().parent.is_dir():
        raise OptionError(f"{json_file.absolute().parent} is not a folder; make it first")


def depth_list(text: str) -> list[int]:
    """Return the depths of ``0,512,1900``, in order and each once.

    Raises:
        OptionError: one of them is not a whole number of at least 0.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdigit() for part in parts):
        raise OptionError(f"--depths {text!r} is not a list of whole numbers such as 0,512,1900")
    return sorted({int(part) for part in parts})
