"""`forerun train-drafter`: a drafter for a model, trained on the model's own answers."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import Annotated

import typer

from forerun.apps.cli import options
from forerun.apps.cli.output import emit, emit_json
from forerun.apps.cli.progress import reporter
from forerun.errors import OptionError

HELP = """Train a drafter for a model.

The model answers prompts made from templates, and the drafter learns to guess its tokens: a head
from the model's hidden states, a model from the text alone. Takes hours; Ctrl-C or --max-minutes
stop it, and the same command with the same --work goes on. --head-of names a form of the same
model whose output head is taken instead, e.g. fp32 for labels without rounding. Needs PyTorch:

\b
pip install "forerun[train]"

\b
forerun train-drafter --model smollm2-135m --max-minutes 240
forerun train-drafter --model smollm2-135m:int4-exact --head-of smollm2-135m:fp32
forerun train-drafter --kind model --work ./training --out ./my-drafter
"""

Kind = Annotated[
    str, typer.Option("--kind", metavar="head|model", help="From hidden states, or from text.")
]
Out = Annotated[
    Path | None,
    typer.Option("--out", help="Folder of the drafter; beside the model's bundles if absent."),
]
Work = Annotated[
    Path | None,
    typer.Option("--work", help="Folder of data and checkpoints, several GB; kept afterwards."),
]
Minutes = Annotated[
    float, typer.Option("--max-minutes", min=1.0, help="Time for data and training together.")
]
Tokens = Annotated[int, typer.Option("--tokens", min=1000, help="Tokens of answers to train on.")]
Seed = Annotated[int, typer.Option("--seed", min=0, help="Of prompts, sampling and data order.")]
Head = Annotated[
    str | None,
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

    require_torch()
    if kind not in KINDS:
        raise OptionError(f"--kind {kind!r} is not known; it can be {' or '.join(KINDS)}")
    from forerun.devices.home import find_bundle, home
    from forerun.export.training.place import check_place

    bundle = Path(os.path.abspath(find_bundle(model)))
    head = Path(os.path.abspath(find_bundle(head_of))) if head_of else None
    place = out or bundle.parent / "drafters" / kind
    check_place(place)
    request = TrainRequest(
        kind=kind,
        bundle=bundle,
        out=place,
        work=work or home() / "training" / bundle.parent.name / bundle.name,
        head_bundle=head,
        tokens=tokens,
        minutes=max_minutes,
        seed=seed,
        command=command_of(kind, bundle, head, tokens, max_minutes, seed),
    )
    with reporter() as show:
        scores = run(request, progress=show)
    if as_json:
        emit_json({"kind": kind, "path": str(place), "acceptance": scores})
    else:
        emit(f"{place}\n")


def command_of(
    kind: str, bundle: Path, head: Path | None, tokens: int, minutes: float, seed: int
) -> str:
    """The command that trains the same drafter elsewhere.

    Defaults are spelt out, as a later version may have others. --out and --work are places on
    this machine and change nothing.

    Args:
        kind: of the drafter.
        bundle: folder of the target.
        head: folder of the bundle whose output head is used.
        tokens: of answers.
        minutes: for data and training.
        seed: of both.
    """
    given = {
        "--kind": kind,
        "--model": _name_of(bundle),
        "--head-of": _name_of(head) if head else None,
        "--tokens": str(tokens),
        "--max-minutes": f"{minutes:g}",
        "--seed": str(seed),
    }
    words = [word for name, value in given.items() if value is not None for word in (name, value)]
    return shlex.join(["forerun", "train-drafter", *words])


def _name_of(bundle: Path) -> str:
    """``NAME:VARIANT`` of a pulled model; of any other bundle what its folder is called."""
    from forerun.devices.home import home

    if bundle.parent.parent == Path(os.path.abspath(home())) / "models":
        return f"{bundle.parent.name}:{bundle.name}"
    return bundle.name
