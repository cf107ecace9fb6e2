"""The KV cache in 8 bits: scales from built-in text, and the attention that reads it.

ONNX Runtime multiplies a quantized cache row by row, so that a step of several rows gives bit for
bit what single rows give, which its float caches do not.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import numpy as np

from forerun.quant.calibration import read_caches

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    import onnx

    from forerun.export.writer import GraphWriter
    from forerun.runtime.manifest import Lowering, Manifest, TensorSpec

_LEVELS = 127
# Places of the scales among the inputs of GroupQueryAttention.
_SCALES_FROM = 12
ATTRIBUTES = {
    "kv_cache_bit_width": 8,
    "k_quant_type": "PER_CHANNEL",
    "v_quant_type": "PER_CHANNEL",
}


def calibrate_scales(
    model: onnx.ModelProto,
    manifest: Manifest,
    bundle: Path,
    pieces: list[np.ndarray],
    progress: Callable[[str, int, int | None], None] | None = None,
) -> dict[str, np.ndarray]:
    """Scales of keys and values per head and channel.

    The two channels of a key that rotate into each other get the scale of their joint length,
    since any of them can hold all of it at some position.

    Args:
        model: the float32 graph, its external weights not loaded.
        manifest: of the bundle.
        bundle: where the weights are.
        pieces: token ids, each int64 [T].
        progress: called with (stage, done, total).

    Returns:
        ``key.N`` and ``value.N`` to float32 [1, heads, 1, head_dim].
    """
    largest: dict[str, np.ndarray] = {}
    for caches in read_caches(model, manifest, bundle, pieces, progress):
        for role, rows in caches.items():
            size = _pair_length(rows) if role.startswith("key.") else np.abs(rows)
            top: np.ndarray = size.max(axis=1, keepdims=True)
            largest[role] = np.maximum(largest.get(role, top), top)
    return {role: (np.maximum(v, 1e-6) / _LEVELS)[None] for role, v in largest.items()}


def scale_inputs(writer: GraphWriter, layer: int, scales: dict[str, np.ndarray]) -> list[str]:
    """Store the scales of a layer; names of the inputs for keys and values."""
    roles = (f"key.{layer}", f"value.{layer}")
    return [writer.constant(f"scale.{role}", scales[role].astype(np.float32)) for role in roles]


def with_scales(inputs: list[str], scales: list[str]) -> list[str]:
    """Inputs of GroupQueryAttention with the scales in their places."""
    return [*inputs, *[""] * (_SCALES_FROM - len(inputs)), *scales]


def in_eight_bits(manifest: Manifest) -> Manifest:
    """The manifest of the same bundle with an 8-bit KV cache."""
    layout = dataclasses.replace(manifest.kv, dtype="int8", bits=8)
    forms = {name: _form(form) for name, form in manifest.lowerings.items()}
    return dataclasses.replace(manifest, kv=layout, lowerings=forms)


def is_cache(name: str) -> bool:
    """Whether a graph input or output is part of the cache, by its role's name."""
    return name.startswith(("past_", "present_"))


def _form(form: Lowering) -> Lowering:
    return dataclasses.replace(form, inputs=_specs(form.inputs), outputs=_specs(form.outputs))


def _specs(specs: dict[str, TensorSpec]) -> dict[str, TensorSpec]:
    return {
        role: dataclasses.replace(spec, dtype="int8") if is_cache(role) else spec
        for role, spec in specs.items()
    }


def _pair_length(keys: np.ndarray) -> np.ndarray:
    """Lengths of the pairs that rotate, at both channels; float32 [heads, T, head_dim]."""
    half = keys.shape[-1] // 2
    length = np.hypot(keys[..., :half], keys[..., half:])
    return np.concatenate([length, length], axis=-1)
