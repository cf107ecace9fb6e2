"""Comparing what was written with the torch modules it came from."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime
import torch  # pyright: ignore[reportMissingImports]

from forerun.errors import ExportMismatch
from forerun.export.training.draft import DraftModel
from forerun.export.training.head import FeatureHead
from forerun.export.training.to_onnx import STEP_GRAPH, HeadBits, rounded_head
from forerun.runtime.manifest import Check, Manifest
from forerun.runtime.runner import Runner

_ROWS = 64
# The graphs round activations to 8 bits, and a draft model's matrices to 4.
_HEAD_BOUND = 0.1
_DRAFT_BOUND = 0.5


@torch.inference_mode()
def check_head(head: FeatureHead, folder: Path, bits: HeadBits | None = None) -> Check:
    """Compare two steps of a head's graph with torch.

    Returns:
        The error of the logits, root mean square relative to their spread.

    Raises:
        ExportMismatch: it exceeds the bound.
    """
    sizes, rng = head.sizes, np.random.default_rng(0)
    features = rng.standard_normal((_ROWS, sizes.taps * sizes.hidden)).astype(np.float32)
    ids = rng.integers(0, sizes.vocab + 1, (_ROWS, 2))
    zeros = np.zeros((_ROWS, sizes.hidden), np.float32)
    session = onnxruntime.InferenceSession(str(folder / STEP_GRAPH))
    feeds = {"features": features, "state": zeros, "ids": ids}
    first, state = session.run(["logits", "new_state"], feeds)
    feeds = {"features": np.zeros_like(features), "state": state, "ids": ids}
    second = session.run(["logits"], feeds)[0]
    rounded = rounded_head(head, bits or HeadBits())
    before, last = (torch.from_numpy(ids[:, i]) for i in range(2))
    x = rounded.fused(torch.from_numpy(features).view(_ROWS, sizes.taps, sizes.hidden))
    x = rounded.step(x, last, before)
    expected = [rounded.logits(x).numpy()]
    expected.append(rounded.logits(rounded.step(x, last, before)).numpy())
    return _compare(
        np.stack([np.asarray(first), np.asarray(second)]),
        np.stack(expected),
        _HEAD_BOUND,
        "torch head",
    )


@torch.inference_mode()
def check_draft(model: DraftModel, manifest: Manifest, folder: Path) -> Manifest:
    """Compare a quantized draft model with torch.

    Returns:
        The manifest with the error, root mean square relative to the spread of the logits.

    Raises:
        ExportMismatch: it exceeds the bound.
    """
    ids = np.random.default_rng(0).integers(0, model.sizes.vocab, _ROWS)
    runner = Runner(manifest, folder)
    try:
        found = np.array(runner.step(ids, want="all")).reshape(_ROWS, -1)[:, :-1]
    finally:
        runner.close()
    expected = model.logits(model(torch.from_numpy(ids)[None]))[0].numpy()
    check = _compare(found, expected, _DRAFT_BOUND, "float32 torch model")
    return replace(manifest, checks=(*manifest.checks, check))


def _compare(found: np.ndarray, expected: np.ndarray, bound: float, against: str) -> Check:
    error = float(np.sqrt(((found - expected) ** 2).mean()) / expected.std())
    if not error <= bound:
        raise ExportMismatch("logits", error, bound, against)
    return Check(against, "relative_rms_error", round(error, 5), bound)
