"""`forerun quantize`: a smaller bundle from a bundle."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from forerun.apps.cli import options
from forerun.apps.cli.export import Out
from forerun.apps.cli.output import emit, emit_json, emit_table
from forerun.apps.cli.progress import reporter
from forerun.errors import OptionError

if TYPE_CHECKING:
    from pathlib import Path

    from forerun.quant.quantize import Wish
    from forerun.runtime.manifest import Manifest

HELP = """Write a smaller copy of a bundle at a measured cost.

Every copy can run its KV cache in float, 16, 8 and 4 bits and in GEAR's form (--kv of generate and
chat); --kv here says which one it takes by itself. forerun evaluate tells more of the cost.

\b
forerun quantize ./my-model ./my-model-int4
forerun quantize smollm2-135m:fp32 ./smollm2-int8 --weights int8 --kv int8
forerun quantize smollm2-135m:fp32 ./smollm2-mixed --budget 92MB --max-kl 0.1
forerun quantize smollm2-135m:fp32 ./smollm2-skip --skipping
"""

Bundle = Annotated[
    str, typer.Argument(metavar="BUNDLE", help="A bundle, or the NAME of a pulled model.")
]
Weights = Annotated[
    str,
    typer.Option(
        "--weights",
        metavar="FORM",
        help="How weights are stored: int4, int4-exact, int8, int8-rows; int4-range, int4-least "
        "and int4-gptq to compare with; fp32 leaves them as they are.",
    ),
]
DefaultKV = Annotated[
    str | None,
    typer.Option(
        "--kv",
        metavar="fp32|fp16|int8|int4",
        show_default="int8 for int4-exact and int8-rows, else fp32",
        help="The KV cache that the copy runs by itself.",
    ),
]
Budget = Annotated[
    str | None,
    typer.Option(
        "--budget",
        metavar="SIZE",
        help="Bytes of the weights, e.g. 92MB: what 4 bits leave of them goes to 8 bits where that "
        "gains most.",
    ),
]
Skipping = Annotated[
    bool,
    typer.Option("--skipping", help="Calibrate skipping of feed-forward blocks (minutes)."),
]
MaxKL = Annotated[
    float | None,
    typer.Option(
        "--max-kl",
        metavar="NATS",
        show_default="0.75, int8 0.02",
        help="Refuse a copy whose mean KL divergence is above this.",
    ),
]
MinTop1 = Annotated[
    float | None,
    typer.Option("--min-agreement", metavar="SHARE", help="Least share of equal best tokens."),
]
MaxPerplexity = Annotated[
    float | None,
    typer.Option(
        "--max-perplexity", metavar="RATIO", help="Largest perplexity by that of the source."
    ),
]


def quantize(
    bundle: Bundle,
    out: Out,
    weights: Weights = "int4",
    kv: DefaultKV = None,
    budget: Budget = None,
    skipping: Skipping = False,
    max_kl: MaxKL = None,
    min_top1: MinTop1 = None,
    max_perplexity: MaxPerplexity = None,
    as_json: options.Json = False,
) -> None:
    """Quantize a bundle; `HELP` is what the user reads."""
    from forerun.devices.home import find_bundle
    from forerun.quant.gate import QualityMismatch
    from forerun.quant.quantize import quantize as run

    wish = _wish(weights, kv, budget, skipping, (max_kl, min_top1, max_perplexity))
    source = find_bundle(bundle)
    if out.exists() and out.samefile(source):
        raise OptionError(f"OUT is the bundle itself ({out}); name another folder")
    try:
        with reporter() as show:
            manifest = run(source, out, weights=wish, progress=show)
    except QualityMismatch as error:
        emit_table(("measure", "figure", "limit", ""), error.rows)
        raise
    _tell(manifest, out, as_json)


def _wish(
    weights: str,
    kv: str | None,
    budget: str | None,
    skipping: bool,
    limits: tuple[float | None, float | None, float | None],
) -> Wish:
    from forerun.quant.gate import Limits
    from forerun.quant.quantize import Wish
    from forerun.runtime.budget import parse_size

    nbytes = None if budget is None else parse_size(budget, "--budget")
    wish = Wish(weights, kv, nbytes, skipping)
    if limits == (None, None, None):
        return wish
    max_kl, min_top1, ratio = limits
    bound = wish.kept_limits.kl_mean if max_kl is None else max_kl
    kept = Limits(bound, top1=min_top1, perplexity_ratio=ratio)
    return Wish(weights, kv, nbytes, skipping, kept)


def _tell(manifest: Manifest, out: Path, as_json: bool) -> None:
    if not as_json:
        emit(f"{out}\n")
        return
    from forerun.quant.measure_open import weight_bytes
    from forerun.runtime.layouts import layouts_of

    fields: dict[str, Any] = {
        "name": manifest.name,
        "path": str(out),
        "weights": manifest.quantization.method,
        "detail": manifest.quantization.detail,
        "bytes": sum(entry.bytes for entry in manifest.files.values()),
        "weight_bytes": weight_bytes(manifest),
        "kv": layouts_of(manifest),
        "checks": {check.metric: check.value for check in manifest.checks if check.metric},
    }
    emit_json(fields)
