"""`forerun devices`: what can run models here, and what a model costs on it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from forerun.apps.cli import options
from forerun.apps.cli.output import emit, emit_json, emit_table
from forerun.apps.cli.progress import reporter
from forerun.errors import OptionError

if TYPE_CHECKING:
    from forerun.apps.cli.costs import ModelCosts

HELP = """List the devices forerun knows, and which of them are here.

With --model, measure what a step of the model costs there by the number of rows and the tokens in
the cache, what each drafter costs, how fast memory is read, and what the model takes of it. The
figures are kept, and are what drafting is steered by; --fresh measures again.

\b
forerun devices
forerun devices --json
forerun devices --model smollm2-135m
forerun devices --model smollm2-135m:fp32 --threads 1 --fresh
forerun devices --model smollm2-135m --device webgpu --json
"""

_COLUMNS = ("name", "provider", "available", "detail", "holds", "tested")

Model = Annotated[
    str | None,
    typer.Option("--model", metavar="NAME|PATH", help="Measure this model."),
]
Device = Annotated[
    str | None,
    typer.Option("--device", metavar="NAME", help="Where to measure it; the cpu if absent."),
]
Fresh = Annotated[bool, typer.Option("--fresh", help="Measure again what is known already.")]


def devices(
    model: Model = None,
    device: Device = None,
    threads: options.Threads = None,
    fresh: Fresh = False,
    as_json: options.Json = False,
) -> None:
    """List devices or measure a model; `HELP` is what the user reads."""
    if model is None:
        given = {"--device": device, "--threads": threads, "--fresh": fresh or None}
        for option, value in given.items():
            if value is not None:
                raise OptionError(f"{option} says how to measure a model; add --model NAME")
        return _list(as_json)
    from forerun.apps.cli.costs import measure_model

    with reporter() as show:
        found = measure_model(model, device or "cpu", threads, show, fresh)
    if as_json:
        emit_json(found.as_json())
    else:
        _print(found)


def _list(as_json: bool) -> None:
    from forerun.devices.table import list_devices

    rows = [tuple(getattr(row, column) for column in _COLUMNS) for row in list_devices()]
    if as_json:
        emit_json({"devices": [dict(zip(_COLUMNS, row, strict=True)) for row in rows]})
    else:
        emit_table(_COLUMNS, rows)


def _print(found: ModelCosts) -> None:
    fields = found.as_json()
    emit(f"{found.model} on {found.device}, {found.threads} threads\n\n")
    steps: list[dict[str, Any]] = fields["steps"]
    emit_table(
        ("rows", *(f"T(n) ms at {depth}" for depth in found.costs.depths), "T(n)/T(1)"),
        [(row["rows"], *row["ms"], row["ratio"]) for row in steps],
    )
    columns = ("drafter", "device", "call_ms", "step_ms", "c")
    drafters: list[dict[str, Any]] = fields["drafters"]
    emit_table(columns, [[row[name] for name in columns] for row in drafters])
    memory, bandwidth = fields["memory"], fields["bandwidth"]
    emit_table(
        ("figure", "value"),
        [
            ("weights", f"{memory['weights_mb']:.1f} MB"),
            ("KV cache per token", f"{memory['kv_bytes_per_token']} bytes"),
            ("capacity", f"{memory['capacity']} tokens"),
            ("KV cache when full", f"{memory['kv_mb']:.1f} MB"),
            ("memory is read at", f"{bandwidth['gb_per_s']:.1f} GB/s"),
            ("by one thread", f"{bandwidth['one_thread_gb_per_s']:.1f} GB/s"),
            ("a plain step reads", f"{bandwidth['step_gb_per_s']:.1f} GB/s"),
        ],
    )
