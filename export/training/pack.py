"""Folders of trained drafters: graph, vocabulary, `drafter.json` and card."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from forerun.runtime.drafting.folder import DRAFTER_NAME, FORMAT_VERSION
from forerun.runtime.manifest import (
    Check,
    FileEntry,
    Lowering,
    Manifest,
    Source,
    file_sha256,
    seal,
)

VOCAB_NAME = "vocab.i32"
CARD_NAME = "README.md"
_UNLISTED = (DRAFTER_NAME, ".verified.json")


@dataclass(frozen=True)
class DrafterFacts:
    """What `drafter.json` and the card say beside the files.

    Attributes:
        kind: ``head`` or ``model``.
        name: of the drafter.
        target: manifest of the bundle it was trained for.
        hidden: width of the target's states.
        taps: layers whose inputs a head reads.
        graphs: a head's graphs.
        scores: what `Scores.facts` returned.
        training: numbers, e.g. tokens and minutes.
        checks: what was compared when the graph was written.
        command: that trained it.
    """

    kind: str
    name: str
    target: Manifest
    hidden: int
    taps: tuple[int, ...] = ()
    graphs: dict[str, Lowering] = field(default_factory=dict)
    scores: dict[str, Any] = field(default_factory=dict)
    training: dict[str, float] = field(default_factory=dict)
    checks: tuple[Check, ...] = ()
    command: str = ""


def write_drafter_files(
    folder: Path, facts: DrafterFacts, vocab: np.ndarray, manifest: Manifest | None = None
) -> None:
    """Write vocabulary, card and `drafter.json` into a folder that holds the graph.

    Args:
        folder: of the drafter.
        facts: what is known of it.
        vocab: int32 [V], the target's id of each draft id; id V stands for all others.
        manifest: of a draft model, which is sealed on the way.
    """
    np.asarray(vocab, "<i4").tofile(folder / VOCAB_NAME)
    (folder / CARD_NAME).write_text(_card(facts, len(vocab)), encoding="utf-8")
    if manifest is not None:
        # Before drafter.json, which lists the manifest; the other way round neither is stable.
        seal(folder, manifest)
    target = facts.target
    data = {
        "format_version": FORMAT_VERSION,
        "kind": facts.kind,
        "name": facts.name,
        "target": {
            "name": target.name,
            "tokenizer_sha256": target.tokenizer.sha256,
            "vocab": target.model.vocab,
            "hidden": facts.hidden,
            "taps": list(facts.taps),
        },
        "vocab": {"file": VOCAB_NAME, "size": len(vocab), "unknown": len(vocab)},
        "source": dataclasses.asdict(_source(target)),
        "graphs": {name: dataclasses.asdict(form) for name, form in facts.graphs.items()},
        "training": facts.training | _flat(facts.scores),
        "checks": [dataclasses.asdict(check) for check in facts.checks],
        "files": _files(folder),
    }
    (folder / DRAFTER_NAME).write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


def form_of(manifest: Manifest) -> str:
    """What users call the form of a bundle's weights."""
    method = manifest.quantization.method
    return "fp32" if method == "none" else method


def _source(target: Manifest) -> Source:
    origin = f"trained on answers of {target.name}, with parts of its weights"
    return Source(origin, target.source.licence, target.source.sha256)


def _files(folder: Path) -> dict[str, dict[str, Any]]:
    paths = sorted(p for p in folder.rglob("*") if p.is_file() and p.name not in _UNLISTED)
    return {
        p.relative_to(folder).as_posix(): dataclasses.asdict(
            FileEntry(p.stat().st_size, file_sha256(p))
        )
        for p in paths
    }


def _flat(scores: dict[str, Any]) -> dict[str, float]:
    """Acceptance as plain numbers, e.g. ``acceptance_1`` and ``acceptance_1_story``."""
    flat: dict[str, float] = {}
    for key, value in scores.items():
        if key == "by_category":
            for kind, numbers in value.items():
                flat[f"acceptance_1_{kind}"] = numbers["1"]
        elif key.isdigit():
            flat[f"acceptance_{key}"] = value
        else:
            flat[key] = value
    return flat


_WHAT = {
    "head": "A feature head: drafts from the target's hidden states, one small graph call a token.",
    "model": "A draft model: a few of the target's layers, trained on, with a smaller vocabulary.",
}


def _card(facts: DrafterFacts, vocab: int) -> str:
    target, scores = facts.target, facts.scores
    lines = [
        f"# {facts.name}",
        "",
        _WHAT[facts.kind],
        "",
        f"- target: {target.name}, {form_of(target)} (tokenizer {target.tokenizer.sha256[:12]})",
        f"- licence: {target.source.licence}, as its target, whose weights it starts from",
        f"- draft vocabulary: {vocab} of {target.model.vocab} ids",
        "- training data: answers of the target itself to prompts made from templates",
        *(f"- {name.replace('_', ' ')}: {_shown(value)}" for name, value in facts.training.items()),
        *(_how(facts.command) if facts.command else []),
        "",
    ]
    if scores:
        steps = [key for key in scores if key.isdigit()]
        lines += [
            "Greedy acceptance on answers to templates that training never saw, each step given",
            "that those before were accepted:",
            "",
            "| step | accepted |",
            "|---|---|",
            *(f"| {key} | {scores[key]:.3f} |" for key in steps),
            "",
            f"Tokens per round with {len(steps)} drafts: {scores['tokens_per_round']:.2f}.",
            "",
            "| kind of prompt | first draft accepted | tokens per round |",
            "|---|---|---|",
            *(
                f"| {kind} | {numbers['1']:.3f} | {numbers['tokens_per_round']:.2f} |"
                for kind, numbers in scores["by_category"].items()
            ),
            "",
        ]
    return "\n".join(lines)


def _how(command: str) -> list[str]:
    return [
        f"- command: `{command}`",
        '- it needs `pip install "forerun[train]"`, and the bundles it names, pulled before',
    ]


def _shown(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}"
