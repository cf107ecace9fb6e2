"""The `forerun` command and the table of its subcommands."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from forerun.apps.cli import (
    bench,
    bench_draft,
    bench_memory,
    chat,
    devices,
    evaluate,
    export,
    generate,
    pull,
    quantize,
    train_drafter,
)
from forerun.apps.cli.output import emit
from forerun.apps.cli.report import guarded

HELP = """Run autoregressive models on your own device, offline.

\b
forerun pull smollm2-135m
forerun generate "Why is the sky blue?"
forerun chat

Results go to standard output, everything else to standard error. Exit codes: 0 done, 2 something
you can put right, 1 a failure, 130 interrupted.
"""

COMMANDS = {
    "pull": (pull.pull, pull.HELP),
    "generate": (generate.generate, generate.HELP),
    "chat": (chat.chat, chat.HELP),
    "export": (export.export, export.HELP),
    "quantize": (quantize.quantize, quantize.HELP),
    "evaluate": (evaluate.evaluate, evaluate.HELP),
    "devices": (devices.devices, devices.HELP),
    "train-drafter": (train_drafter.train_drafter, train_drafter.HELP),
}
BENCHES = {
    "text": (bench.bench_text, bench.TEXT_HELP),
    "draft": (bench_draft.bench_draft, bench_draft.HELP),
    "quality": (bench.bench_quality, bench.QUALITY_HELP),
    "profile": (bench.bench_profile, bench.PROFILE_HELP),
    "memory": (bench_memory.bench_memory, bench_memory.HELP),
}

_SETTINGS = {"help_option_names": ["-h", "--help"], "max_content_width": 100}

Version = Annotated[bool, typer.Option("--version", help="Print the version and leave.")]
Traceback = Annotated[
    bool, typer.Option("--traceback", help="Show where an error came from, for bug reports.")
]


def build() -> typer.Typer:
    """Return the application with all its commands."""
    # Plain help instead of rich panels: `forerun --help` answers in a fraction of the time.
    app = _group(HELP)
    for name, (function, text) in COMMANDS.items():
        app.command(name, help=text, context_settings=_SETTINGS)(function)
    benches = _group(bench.HELP)
    benches.callback(invoke_without_command=True)(_help_if_alone)
    for name, (function, text) in BENCHES.items():
        benches.command(name, help=text, context_settings=_SETTINGS)(function)
    app.add_typer(benches, name="bench")
    app.callback(invoke_without_command=True)(_root)
    return app


def _group(text: str) -> typer.Typer:
    return typer.Typer(
        help=text,
        add_completion=False,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        context_settings=_SETTINGS,
    )


def _root(
    context: typer.Context,
    version: Version = False,
    traceback: Traceback = False,
) -> None:
    if version:
        from importlib.metadata import version as installed

        emit(f"forerun {installed('forerun')}\n")
        raise typer.Exit
    _help_if_alone(context)


def _help_if_alone(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        emit(context.get_help() + "\n")
        raise typer.Exit


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line.

    Args:
        arguments: what stands after ``forerun``; None takes it from the process.

    Returns:
        The exit code; see `report.guarded`.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    # Names of files and prompts may hold bytes that are no text; printing them must not fail.
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    before_command = given[: next((i for i, a in enumerate(given) if a[:1] != "-"), len(given))]
    return guarded(
        lambda: build()(args=given, prog_name="forerun", standalone_mode=False),
        given,
        show_traceback="--traceback" in before_command,
    )


if __name__ == "__main__":
    sys.exit(main())
