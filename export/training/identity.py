"""What a work folder was made for: data, vocabulary and checkpoints of one training only."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from forerun.errors import BundleError, OptionError
from forerun.export.training import prompts
from forerun.export.training.pack import form_of
from forerun.runtime.manifest import inside, load_manifest

if TYPE_CHECKING:
    from forerun.export.training.write import Sampling
    from forerun.runtime.manifest import Manifest

RECORD_NAME = "made-for.json"
_DIGITS = 12
# What a training leaves; the record must be there before any of them.
_MADE = ("data/index.jsonl", "vocab.i32", "*/checkpoint.pt")


def work_identity(
    bundle: Path, head_bundle: Path | None, seed: int, sampling: Sampling
) -> dict[str, str]:
    """Everything that decides what the data are, by names for people.

    Args:
        bundle: of the target.
        head_bundle: whose output head the target is taken to have; None is its own.
        seed: of prompts and sampling.
        sampling: how answers are drawn.
    """
    target = load_manifest(bundle)
    head = target if head_bundle is None else load_manifest(head_bundle)
    template = target.tokenizer.chat_template
    text = inside(Path(bundle), template).read_bytes() if template else b""
    return {
        "target": target.name,
        "weights": _weights(target),
        "output head": f"{head.name} {_weights(head)}",
        "tokenizer": target.tokenizer.sha256[:_DIGITS],
        "chat template": hashlib.sha256(text).hexdigest()[:_DIGITS] if template else "none",
        "prompts": prompts.fingerprint()[:_DIGITS],
        "sampling": ", ".join(f"{name} {value}" for name, value in asdict(sampling).items()),
        "seed": str(seed),
    }


def check_work(work: Path, identity: dict[str, str]) -> None:
    """Refuse a work folder whose data or checkpoints belong to another training.

    Raises:
        OptionError: they do, or nothing tells what they belong to; names every difference.
        BundleError: the record is damaged.
    """
    path = Path(work) / RECORD_NAME
    if not path.exists():
        if any(found.stat().st_size for name in _MADE for found in Path(work).glob(name)):
            raise OptionError(
                f"{work} holds training data, and no {RECORD_NAME} tells of which model, prompts "
                "and seed; give another --work, or remove that folder to begin anew"
            )
        return
    try:
        made = dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise BundleError(f"{path} is damaged ({error}); give another --work") from None
    different = [
        f"{name} {made.get(name, 'unknown')} instead of {value}"
        for name, value in identity.items()
        if made.get(name) != value
    ]
    if different:
        raise OptionError(
            f"{work} belongs to another training: {'; '.join(different)}; "
            "give another --work, or remove that folder to begin anew"
        )


def record_work(work: Path, identity: dict[str, str]) -> None:
    """Write down what a work folder is for, whole or not at all."""
    path = Path(work) / RECORD_NAME
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".part")
    partial.write_text(json.dumps(identity, indent=1) + "\n", encoding="utf-8")
    os.replace(partial, path)


def _weights(manifest: Manifest) -> str:
    detail = manifest.quantization.detail
    form = form_of(manifest) + (f" ({detail})" if detail else "")
    return f"{form} of {manifest.source.sha256[:_DIGITS] or manifest.source.origin}"
