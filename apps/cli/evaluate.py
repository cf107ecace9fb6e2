"""`forerun evaluate`: what a bundle is worth, alone or beside another one."""

from __future__ import annotations

from typing import Annotated, Any, Optional

import typer

from forerun.apps.cli import options
from forerun.apps.cli.output import emit_json, emit_table
from forerun.apps.cli.progress import reporter
from forerun.apps.cli.quantize import Bundle

HELP = """Measure what a bundle is worth.

Perplexity and size, and with --against the distance from another bundle, on built-in text.

\b
forerun evaluate smollm2-135m
forerun evaluate smollm2-135m --against smollm2-135m:fp32 --json
"""

Against = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option("--against", metavar="BUNDLE", help="The reference for KL and agreement."),
]
Window = Annotated[int, typer.Option("--context", min=16, help="Tokens the model sees at once.")]
Tokens = Annotated[int, typer.Option("--tokens", min=16, help="Tokens of text to measure on.")]


def evaluate(
    bundle: Bundle,
    against: Against = None,
    context: Window = 512,
    tokens: Tokens = 4096,
    as_json: options.Json = False,
) -> None:
    """Evaluate a bundle; `HELP` is what the user reads."""
    from forerun.devices.home import find_bundle

    judged, reference = find_bundle(bundle), find_bundle(against) if against else None
    from forerun.quant.evaluate import evaluate as run

    with reporter() as show:
        result: dict[str, Any] = run(
            judged, against=reference, context=context, max_tokens=tokens, progress=show
        )
    if as_json:
        emit_json(result)
    else:
        emit_table(("measure", "value"), list(result.items()))
