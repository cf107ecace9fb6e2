"""`forerun quantize`: a smaller bundle from a bundle."""

from __future__ import annotations

from typing import Annotated

import typer

from forerun.apps.cli import options
from forerun.apps.cli.export import Out
from forerun.apps.cli.output import emit, emit_json
from forerun.apps.cli.progress import reporter
from forerun.errors import OptionError

HELP = """Write a copy of a bundle with smaller weights.

forerun evaluate SMALL --against BUNDLE tells what that cost.

\b
forerun quantize ./my-model ./my-model-int4
forerun quantize smollm2-135m:fp32 ./smollm2-int8 --weights int8
"""

Bundle = Annotated[
    str, typer.Argument(metavar="BUNDLE", help="A bundle, or the NAME of a pulled model.")
]
Weights = Annotated[
    str, typer.Option("--weights", metavar="int4|int4-exact|int8", help="How weights are stored.")
]


def quantize(
    bundle: Bundle, out: Out, weights: Weights = "int4", as_json: options.Json = False
) -> None:
    """Quantize a bundle; `HELP` is what the user reads."""
    if weights not in ("int4", "int4-exact", "int8"):
        raise OptionError(f"--weights {weights!r} is not known; it can be int4, int4-exact or int8")
    from forerun.devices.home import find_bundle

    source = find_bundle(bundle)
    if out.exists() and out.samefile(source):
        raise OptionError(f"OUT is the bundle itself ({out}); name another folder")
    from forerun.quant.quantize import quantize as run

    with reporter() as show:
        manifest = run(source, out, weights=weights, progress=show)
    if as_json:
        size = sum(entry.bytes for entry in manifest.files.values())
        emit_json({"name": manifest.name, "path": str(out), "weights": weights, "bytes": size})
    else:
        emit(f"{out}\n")
