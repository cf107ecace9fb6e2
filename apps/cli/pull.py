"""`forerun pull`: fetch a model of the catalog and make a checked bundle of it."""

from __future__ import annotations

from typing import Annotated

import typer

from forerun.apps.cli import options
from forerun.apps.cli.output import emit, emit_json, emit_table
from forerun.apps.cli.progress import reporter
from forerun.apps.cli.report import note
from forerun.devices.home import DEFAULT_VARIANT, VARIANTS
from forerun.errors import OptionError

HELP = """Fetch a model and make a checked bundle of it.

The weights are fetched, verified, exported and quantized, and the result is checked.

The path of the bundle is printed. An interrupted pull goes on where it was; a model that is here
already is not fetched again, and a bundle that an older forerun made is made again. Models live in
~/.forerun, or in the folder FORERUN_HOME names.

\b
forerun pull smollm2-135m
forerun pull smollm2-135m --variant fp32
forerun pull gemma3-270m --accept-terms
forerun pull --list
"""

Name = Annotated[
    str | None,
    typer.Argument(metavar="NAME", help="A model of the catalog, or NAME:VARIANT."),
]
Variant = Annotated[
    str | None,
    typer.Option(
        "--variant",
        metavar="|".join(VARIANTS),
        help=f"Form of the weights; {DEFAULT_VARIANT} if absent.",
    ),
]
AcceptTerms = Annotated[
    bool, typer.Option("--accept-terms", help="Accept the licence terms of the model.")
]
Force = Annotated[bool, typer.Option("--force", help="Make it again even if it is installed.")]
List = Annotated[bool, typer.Option("--list", help="Show the catalog and fetch nothing.")]


def pull(
    name: Name = None,
    variant: Variant = None,
    accept_terms: AcceptTerms = False,
    capacity: options.Capacity = None,
    list_models: List = False,
    force: Force = False,
    as_json: options.Json = False,
) -> None:
    """Fetch a model; `HELP` is what the user reads."""
    if list_models:
        return _show_catalog(as_json)
    if not name:
        raise OptionError("pull needs the NAME of a model; forerun pull --list shows them")
    base, _, suffix = name.partition(":")
    if suffix and variant and suffix != variant:
        raise OptionError(f"{name} and --variant {variant} contradict each other; drop one")
    from forerun.export.pull import pull as fetch_and_export

    with reporter() as show:
        path = fetch_and_export(
            base,
            variant=suffix or variant,
            accept_terms=accept_terms,
            progress=show,
            note=note,
            capacity=capacity,
            force=force,
        )
    if as_json:
        emit_json({"name": base, "variant": path.name, "path": str(path)})
    else:
        emit(f"{path}\n")


def _show_catalog(as_json: bool) -> None:
    from forerun.export.catalog import load_catalog

    entries = load_catalog().values()
    rows = [(entry.name, entry.kind, entry.licence, entry.note) for entry in entries]
    columns = ("name", "kind", "licence", "note")
    if as_json:
        emit_json({"models": [dict(zip(columns, row, strict=True)) for row in rows]})
    else:
        emit_table(columns, rows)
