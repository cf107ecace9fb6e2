"""The model card of a bundle: where it came from, its licence, what was measured."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from forerun.runtime.manifest import Check, Manifest

CARD_NAME = "README.md"
# Of these, more is better.
_LOWER_LIMITS = frozenset({"top1_agreement"})


def is_lower_limit(check: Check) -> bool:
    """Whether a figure must be at least its bound, not at most."""
    return check.metric in _LOWER_LIMITS


def limit_text(check: Check) -> str:
    """The bound of a check with its sign, e.g. ``<= 0.75``."""
    return f"{'>=' if is_lower_limit(check) else '<='} {check.bound:.4g}"


def write_card(folder: Path, manifest: Manifest) -> None:
    """Write `README.md` into a bundle."""
    m, quant = manifest, manifest.quantization
    weights = "float32" if quant.method == "none" else f"{quant.method}: {quant.detail}"
    lines = [
        f"# {m.name}",
        "",
        f"- source: {m.source.origin}",
        f"- licence: {m.source.licence or 'not stated by the source'}",
        f"- parameters: {m.model.parameters:,}, layers: {m.model.layers}",
        f"- weights: {weights}",
        f"- KV cache: {m.kv.dtype}, {m.kv.capacity} tokens of {m.kv.nbytes_per_token:,} bytes",
        "",
        "| checked against | metric | value | limit |",
        "|---|---|---|---|",
        *(f"| {c.against} | {c.metric} | {c.value:.4g} | {limit_text(c)} |" for c in m.checks),
        "",
    ]
    (folder / CARD_NAME).write_text("\n".join(lines), encoding="utf-8")
