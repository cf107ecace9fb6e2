"""`forerun train-drafter`: a drafter for a model, trained on the model's own answers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from forerun.apps.cli import options
from forerun.apps.cli.output import emit, emit_json
from forerun.apps.cli.progress import reporter
from forerun.errors import OptionError

HELP = """Train a drafter for a model.

The model answers prompts made from templates, and the drafter learns to guess its tokens: a head
from the model's hidden states, a model from the text alone. Takes hours; Ctrl-C or --max-minutes
stop it, and the same command with the same --work goes on. Needs the extra: forerun[train].

\b
forerun train-drafter --model smollm2-135m --max-minutes 240
forerun train-drafter --kind model --work ./training --out ./my-drafter
"""

Kind = Annotated[
    str, typer.Option("--kind", metavar="head|model", help="From hidden states, or from text.")
]
Out = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option("--out", help="Folder of the drafter; beside the model's bundles if absent."),
]
Work = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option("--work", help="Folder of data and checkpoints, several GB; kept afterwards."),
]
Minutes = Annotated[
    float, typer.Option("--max-minutes", min=1.0, help="Time for data and training together.")
]
Tokens = Annotated[int, typer.Option("--tokens", min=1000, help="Tokens of answers to train on.")]
Seed = Annotated[int, typer.Option("--seed", min=0, help="Of prompts, sampling and data order.")]
Head = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option("--head-of", metavar="NAME|PATH", help="A bundle whose output head is used."),
]


def train_drafter(
    kind: Kind = "head",
    model: options.Model = options.DEFAULT_MODEL,
    out: Out = None,
    work: Work = None,
    max_minutes: Minutes = 240.0,
    tokens: Tokens = 1_000_000,
    seed: Seed = 0,
    head_of: Head = None,
    as_json: options.Json = False,
) -> None:
    """Train a drafter; `HELP` is what the user reads."""
    from forerun.export.training.train import KINDS, TrainRequest, require_torch
    from forerun.export.training.train import train_drafter as run

    if kind not in KINDS:
        raise OptionError(f"--kind {kind!r} is not known; it can be {' or '.join(KINDS)}")
    require_torch()
    from forerun.devices.home import find_bundle, home
    from forerun.export.training.place import check_place

    bundle = find_bundle(model)
    place = out or bundle.parent / "drafters" / kind
    check_place(place)
    request = TrainRequest(
        kind=kind,
        bundle=bundle,
        out=place,
        work=work or home() / "training" / bundle.parent.name,
        head_bundle=find_bundle(head_of) if head_of else None,
        tokens=tokens,
        minutes=max_minutes,
        seed=seed,
        command=f"forerun train-drafter --kind {kind} --model {Path(model).name} "
        f"--tokens {tokens} --seed {seed}",
    )
    with reporter() as show:
        scores = run(request, progress=show)
    if as_json:
        emit_json({"kind": kind, "path": str(place), "acceptance": scores})
    else:
        emit(f"{place}\n")
