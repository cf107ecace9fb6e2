"""`forerun export`: a bundle from weights that are on this machine."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from forerun.apps.cli import options
from forerun.apps.cli.output import emit, emit_json
from forerun.apps.cli.progress import reporter
from forerun.apps.cli.report import note
from forerun.errors import OptionError

HELP = """Make a checked fp32 bundle of local weights.

SRC is a GGUF file or a folder in Hugging Face layout. The graph is compared with an independent
computation of the same weights before it is written. forerun quantize makes a smaller and faster
bundle of it.

\b
forerun export model.gguf ./my-model --capacity 4096
forerun export ./SmolLM2-135M-Instruct ./smollm2 --name smollm2
forerun export model.gguf ./for-an-npu --capacity 512 --static
forerun export ./unusual-model ./unusual --via optimum
"""

Source = Annotated[
    str, typer.Argument(metavar="SRC", help="A .gguf file, or a folder with config.json.")
]
Out = Annotated[
    Path,
    typer.Argument(metavar="OUT", help="Folder of the bundle; an old bundle there is replaced."),
]
Name = Annotated[
    str | None,
    typer.Option("--name", help="Name of the model in the bundle; the name of OUT if absent."),
]
Via = Annotated[
    str,
    typer.Option(
        "--via",
        metavar="forerun|optimum",
        help="optimum: for models forerun cannot export; what comes out is no bundle.",
    ),
]
HiddenStates = Annotated[
    bool, typer.Option("--hidden-states", help="Give the graph an output of hidden states.")
]
Static = Annotated[
    bool,
    typer.Option("--static", help="Also write the form with static shapes that NPUs need."),
]
Layers = Annotated[
    int | None,
    typer.Option(
        "--layers", min=1, help="Keep the first N layers: quick to try a device, but not the model."
    ),
]


# A model's name has two characters at least, so that this is no drive of Windows.
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]+:[a-z0-9.-]*")


def check_out(out: Path) -> None:
    """Refuse the name of a pulled model where a folder is needed.

    Raises:
        OptionError: it is ``NAME:VARIANT``.
    """
    if _NAME.fullmatch(str(out)):
        folder = f"./{str(out).replace(':', '-')}".rstrip("-")
        raise OptionError(
            f"OUT {str(out)!r} looks like the name of a pulled model, not like a folder; give a "
            f"folder such as {folder}, or use forerun pull {out}"
        )


def export(
    src: Source,
    out: Out,
    name: Name = None,
    capacity: options.Capacity = None,
    via: Via = "forerun",
    hidden_states: HiddenStates = False,
    static: Static = False,
    layers: Layers = None,
    as_json: options.Json = False,
) -> None:
    """Make a bundle; `HELP` is what the user reads."""
    check_out(out)
    if via not in ("forerun", "optimum"):
        raise OptionError(f"--via {via!r} is not known; it can be forerun or optimum")
    if via == "optimum":
        if any((hidden_states, static, capacity, name, layers)):
            raise OptionError(
                "--via optimum takes no --name, --capacity, --hidden-states, --static or --layers"
            )
        return _via_optimum(src, out, as_json)
    if not Path(src).exists():
        raise OptionError(f"{src} does not exist; give a .gguf file or a Hugging Face folder")
    from forerun.export.export import export_model
    from forerun.export.shorter import FirstLayers
    from forerun.export.sources import open_source

    source = open_source(src)
    if layers is not None:
        source = FirstLayers(source, layers)
    with reporter() as show:
        manifest = export_model(
            source,
            out,
            name=name or out.absolute().name,
            capacity=capacity,
            progress=show,
            hidden_states=hidden_states,
            static=static,
        )
    if as_json:
        checks = [vars(check) for check in manifest.checks]
        emit_json({"name": manifest.name, "path": str(out), "checks": checks})
    else:
        emit(f"{out}\n")


def _via_optimum(src: str, out: Path, as_json: bool) -> None:
    from forerun.export.via_optimum import export_via_optimum

    with reporter() as show:
        report = export_via_optimum(src, out, progress=show)
    for sentence in report["given_up"]:
        note(sentence)
    if as_json:
        emit_json(report)
    else:
        emit(f"{out}\n")
