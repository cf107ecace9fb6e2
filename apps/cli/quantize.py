"""`forerun quantize`: a smaller bundle from a bundle."""

from __future__ import annotations

import dataclasses
import math
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from forerun.apps.cli import options
from forerun.apps.cli.export import Out, check_out
from forerun.apps.cli.output import emit, emit_json, render_table
from forerun.apps.cli.progress import reporter
from forerun.errors import OptionError
from forerun.quant.formats import FORMATS, KEPT, KEPT_BOUNDS, PLAIN_FORMATS

if TYPE_CHECKING:
    from pathlib import Path

    from forerun.quant.gate import QualityMismatch
    from forerun.quant.quantize import Wish
    from forerun.runtime.manifest import Manifest

HELP = """Write a smaller copy of a bundle at a measured cost.

Every copy can run its KV cache in float, 16, 8 and 4 bits and in GEAR's form (--kv of generate and
chat); --kv here says which one it takes by itself. The copy is compared with BUNDLE on a short
built-in text, and written only if it keeps all limits; a table shows what was measured otherwise.
forerun evaluate tells more of the cost.

\b
forerun quantize ./my-model ./my-model-int4
forerun quantize smollm2-135m:fp32 ./smollm2-int8 --weights int8 --kv int8
forerun quantize smollm2-135m:fp32 ./smollm2-mixed --budget 99.5MB --max-kl 0.1
forerun quantize smollm2-135m:fp32 ./smollm2-skip --skipping
"""


def bounds_text() -> str:
    """The default of ``--max-kl`` for every form, e.g. ``0.75 for int4; 0.02 for int8``."""
    names: dict[float, list[str]] = {}
    for name, form in (FORMATS | PLAIN_FORMATS).items():
        names.setdefault(form.kl_bound, []).append(name)
    forms = "; ".join(f"{bound:g} for {', '.join(same)}" for bound, same in names.items())
    kept = ", ".join(f"{bound:g} for {layout}" for layout, bound in KEPT_BOUNDS.items())
    return f"{forms}; of {KEPT} by --kv: {kept}"


Bundle = Annotated[
    str, typer.Argument(metavar="BUNDLE", help="A bundle, or the NAME of a pulled model.")
]
Weights = Annotated[
    str,
    typer.Option(
        "--weights",
        metavar="FORM",
        help=f"How weights are stored: {', '.join(FORMATS)}; to compare with: "
        f"{', '.join(PLAIN_FORMATS)}; {KEPT} leaves them as they are.",
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
        help="Bytes of the weights, e.g. 99.5MB: what 4 bits leave of them goes to 8 bits where "
        "that gains most.",
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
        min=0.0,
        metavar="NATS",
        show_default=bounds_text(),
        help="Refuse a copy whose mean KL divergence is above this.",
    ),
]
MaxKLTail = Annotated[
    float | None,
    typer.Option(
        "--max-kl-p99",
        min=0.0,
        metavar="NATS",
        help="Refuse a copy whose KL divergence is above this at one token of a hundred.",
    ),
]
MinTop1 = Annotated[
    float | None,
    typer.Option(
        "--min-agreement",
        min=0.0,
        max=1.0,
        metavar="SHARE",
        help="Refuse a copy with a smaller share of equal best tokens.",
    ),
]
MaxPerplexity = Annotated[
    float | None,
    typer.Option(
        "--max-perplexity",
        min=0.0,
        metavar="RATIO",
        help="Refuse a copy whose perplexity by that of the source is above this.",
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
    max_kl_p99: MaxKLTail = None,
    min_top1: MinTop1 = None,
    max_perplexity: MaxPerplexity = None,
    as_json: options.Json = False,
) -> None:
    """Quantize a bundle; `HELP` is what the user reads."""
    from forerun.devices.home import find_bundle
    from forerun.quant.gate import QualityMismatch
    from forerun.quant.quantize import quantize as run

    check_out(out)
    wish = _wish(weights, kv, budget, skipping)
    wish = _limited(wish, max_kl, max_kl_p99, min_top1, max_perplexity)
    source = find_bundle(bundle)
    if out.exists() and out.samefile(source):
        raise OptionError(f"OUT is the bundle itself ({out}); name another folder")
    try:
        with reporter() as show:
            manifest = run(source, out, weights=wish, progress=show)
    except QualityMismatch as error:
        _tell_refusal(error, as_json)
        raise
    _tell(manifest, out, as_json)


def _wish(weights: str, kv: str | None, budget: str | None, skipping: bool) -> Wish:
    from forerun.quant.quantize import Wish
    from forerun.runtime.budget import parse_size

    return Wish(weights, kv, None if budget is None else parse_size(budget, "--budget"), skipping)


def _limited(
    wish: Wish,
    max_kl: float | None,
    max_kl_p99: float | None,
    min_top1: float | None,
    max_perplexity: float | None,
) -> Wish:
    """The wish with the limits that were given; the mean KL is always limited."""
    from forerun.quant.gate import Limits

    if (max_kl, max_kl_p99, min_top1, max_perplexity) == (None,) * 4:
        return wish
    bound = wish.kept_limits.kl_mean if max_kl is None else max_kl
    return dataclasses.replace(wish, limits=Limits(bound, max_kl_p99, min_top1, max_perplexity))


def _tell_refusal(error: QualityMismatch, as_json: bool) -> None:
    """Show all that was measured of a copy that is not written, also what has no limit."""
    from forerun.quant.gate import Limits, gate_checks, gate_rows, is_kept

    limited = {check.metric: check for check in error.checks}
    # Nothing can break these, so that every measure comes back.
    every = gate_checks(error.measured, Limits(math.inf, math.inf, 0.0, math.inf))
    if as_json:
        measures = {check.metric: {"value": check.value, "limit": None} for check in every}
        measures |= {
            name: {"value": check.value, "limit": check.bound, "is_kept": is_kept(check)}
            for name, check in limited.items()
        }
        emit_json({"is_written": False, "measures": measures})
        return
    rows = [
        gate_rows((limited[check.metric],))[0]
        if check.metric in limited
        else (*gate_rows((check,))[0][:2], "none", "")
        for check in every
    ]
    sys.stderr.write(render_table(("measure", "figure", "limit", ""), rows))


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
