"""Scales of a KV cache in 8 and 4 bits, from text that is read once for both.

ONNX Runtime multiplies a quantized cache row by row, so that a step of several rows gives bit for
bit what single rows give, which its float caches do not.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from forerun.quant.calibration import read_caches

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    import onnx

    from forerun.runtime.manifest import Manifest

# Largest code of each layout; codes of 4 bits go from -8 to 7.
LEVELS = {"int8": 127, "int4": 7}
# Of the 4-bit scales that are tried, as a share of the one that clips nothing.
_CLIPS = np.linspace(0.3, 1.05, 31, dtype=np.float32)
_SAMPLED = 512
# The first tokens hold the surplus of attention, so every piece's are among the samples.
_FIRST = 4
_SEED = 0


def calibrate(
    model: onnx.ModelProto,
    manifest: Manifest,
    bundle: Path,
    pieces: list[np.ndarray],
    names: Sequence[str] = tuple(LEVELS),
    progress: Callable[[str, int, int | None], None] | None = None,
) -> dict[str, dict[str, np.ndarray]]:
    """Scales of keys and values per head and channel, for each layout.

    The two channels of a key that rotate into each other share one scale, since at some position
    either can hold all of the pair. In 8 bits nothing that was read is clipped; in 4 bits the
    scale has the least squared error, with keys moved to positions up to the capacity.

    Args:
        model: the graph of the float32 cache, its external weights not loaded.
        manifest: of the bundle.
        bundle: where the weights are.
        pieces: token ids, each int64 [T].
        names: of the layouts, from `LEVELS`.
        progress: called with (stage, done, total).

    Returns:
        Layout name to ``key.N`` and ``value.N`` to float32 [1, heads, 1, head_dim].
    """
    largest: dict[str, np.ndarray] = {}
    samples: dict[str, list[np.ndarray]] = {}
    stride = max(1, sum(map(len, pieces)) // _SAMPLED)
    for caches in read_caches(model, manifest, bundle, pieces, progress):
        for role, rows in caches.items():
            top = _size(role, rows).max(axis=1, keepdims=True)
            largest[role] = np.maximum(largest.get(role, np.float32(1e-6)), top)
            taken = np.concatenate([rows[:, :_FIRST], rows[:, _FIRST::stride]], axis=1)
            samples.setdefault(role, []).append(taken.copy())
    whole: dict[str, np.ndarray] = {
        role: (top / LEVELS["int8"])[None] for role, top in largest.items()
    }
    if "int4" not in names:
        return dict.fromkeys(names, whole)
    clipped = {}
    for role, parts in samples.items():
        rows = np.concatenate(parts, axis=1)
        if role.startswith("key."):
            rows = _moved(rows, manifest, int(role.rpartition(".")[2]))
        clipped[role] = least_error(role, rows, largest[role])[None]
    return {name: clipped if name == "int4" else whole for name in names}


def least_error(role: str, rows: np.ndarray, top: np.ndarray) -> np.ndarray:
    """The 4-bit scale with the least squared error of each channel.

    Args:
        role: ``key.N``, whose channels are taken in pairs, or ``value.N``.
        rows: float32 [heads, T, head_dim].
        top: the largest value of each channel, float32 [heads, 1, head_dim].

    Returns:
        float32 [heads, 1, head_dim].
    """
    levels = LEVELS["int4"]
    best = scale = np.full_like(top, np.inf)
    for clip in _CLIPS:
        tried = top * (clip / levels)
        codes = np.clip(np.rint(rows / tried), -levels - 1, levels)
        error = np.square(rows - codes * tried).mean(axis=1, keepdims=True)
        if role.startswith("key."):
            half = error.shape[-1] // 2
            error = np.tile(error[..., :half] + error[..., half:], 2)
        scale = np.where(error < best, tried, scale)
        best = np.minimum(error, best)
    return scale


def _size(role: str, rows: np.ndarray) -> np.ndarray:
    """What a channel may have to hold; lengths of the pairs that rotate, at both channels."""
    if not role.startswith("key."):
        return np.abs(rows)
    half = rows.shape[-1] // 2
    length = np.hypot(rows[..., :half], rows[..., half:])
    return np.concatenate([length, length], axis=-1)


def _moved(keys: np.ndarray, manifest: Manifest, layer: int) -> np.ndarray:
    """Keys at random later positions; where they are, if the bundle does not say how they turn."""
    if manifest.rotary is None:
        return keys
    frequencies = np.array(manifest.rotary.frequencies[manifest.rotary.layers[layer]])
    places = np.random.default_rng(_SEED).integers(0, manifest.kv.capacity, keys.shape[1])
    angle = places[:, None] * frequencies
    cos, sin = np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)
    half = keys.shape[-1] // 2
    low, high = keys[..., :half], keys[..., half:]
    return np.concatenate([low * cos - high * sin, high * cos + low * sin], axis=-1)
