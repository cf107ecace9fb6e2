"""The gate a quantized bundle must pass before it is let out."""

from __future__ import annotations

from typing import TYPE_CHECKING

from forerun.errors import ExportMismatch
from forerun.quant.evaluate import compare, corpus_pieces
from forerun.runtime.manifest import Check

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from forerun.runtime.manifest import Manifest

_CONTEXT = 256
_TOKENS = 512


def check_quality(
    manifest: Manifest,
    folder: Path,
    reference: Manifest,
    reference_folder: Path,
    bound: float,
    progress: Callable[[str, int, int | None], None] | None = None,
) -> Check:
    """Compare a quantized bundle with its float32 source on a short text.

    Returns:
        The mean KL divergence, and the bound it kept.

    Raises:
        ExportMismatch: the divergence exceeds the bound.
    """
    context = min(_CONTEXT, manifest.kv.capacity)
    pieces = corpus_pieces(manifest, folder, context, _TOKENS)
    pair = (reference, reference_folder)
    measured = compare((manifest, folder), pair, pieces, progress)
    kl = measured.kl_mean
    if kl is None or not kl <= bound:
        raise ExportMismatch("mean KL to float32", float(kl or "nan"), bound, "built-in text")
    return Check("float32 bundle", "kl_mean", kl, bound)
