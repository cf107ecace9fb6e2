"""An independent forward pass in numpy, against which every exported graph is checked.

It shares the table of facts with the exporter and nothing else: no fused weights, no cache, no
ONNX, explicit masks over the whole sequence.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from forerun.export.arch import (
    ArchSpec,
    attention_scale,
    ffn_norm_name,
    layer_names,
    rotary_tables,
)

if TYPE_CHECKING:
    from forerun.export.arch import LayerNames
    from forerun.export.sources import ModelConfig, WeightSource


def reference_logits(source: WeightSource, arch: ArchSpec, ids: np.ndarray) -> np.ndarray:
    """Logits of every position of a text.

    Args:
        source: the weights; each tensor is read once.
        arch: the row of facts of the architecture.
        ids: int64 [T].

    Returns:
        float32 [T, V].
    """
    c = source.config
    embedding = source.tensor("model.embed_tokens.weight")
    x = embedding[ids]
    if arch.scaled_embedding:
        x = x * np.float32(np.sqrt(c.hidden))
    for layer in range(c.layers):
        x = _layer(source, arch, layer, x)
    x = _rms_norm(x, _norm(source, arch, "model.norm.weight"), c.norm_eps)
    return x @ (embedding if c.tied else source.tensor("lm_head.weight")).T


def _layer(source: WeightSource, arch: ArchSpec, layer: int, x: np.ndarray) -> np.ndarray:
    c, names = source.config, layer_names(layer)
    h = _rms_norm(x, _norm(source, arch, names.input_norm), c.norm_eps)
    h = _attention(source, arch, layer, h)
    if arch.post_norms:
        h = _rms_norm(h, _norm(source, arch, names.post_attention_norm), c.norm_eps)
    x = x + h
    h = _rms_norm(x, _norm(source, arch, ffn_norm_name(arch, layer)), c.norm_eps)
    gate = _ACTIVATIONS[c.activation](_project(source, names, "gate_proj", h))
    h = _project(source, names, "down_proj", gate * _project(source, names, "up_proj", h))
    if arch.post_norms:
        h = _rms_norm(h, _norm(source, arch, names.post_ffn_norm), c.norm_eps)
    return x + h


def _attention(source: WeightSource, arch: ArchSpec, layer: int, x: np.ndarray) -> np.ndarray:
    c, names, length = source.config, layer_names(layer), len(x)
    local = c.layer_window[layer]

    def heads(part: str, count: int) -> np.ndarray:
        return _project(source, names, part, x).reshape(length, count, c.head_dim)

    q, k, v = heads("q_proj", c.heads), heads("k_proj", c.kv_heads), heads("v_proj", c.kv_heads)
    if arch.qk_norm:
        q = _rms_norm(q, _norm(source, arch, names.q_norm), c.norm_eps)
        k = _rms_norm(k, _norm(source, arch, names.k_norm), c.norm_eps)
    q, k = _rotate(q, c, local), _rotate(k, c, local)
    group = c.heads // c.kv_heads
    k, v = np.repeat(k, group, axis=1), np.repeat(v, group, axis=1)
    scores = np.einsum("qhd,khd->hqk", q, k, optimize=True) * np.float32(attention_scale(c))
    row, column = np.arange(length)[:, None], np.arange(length)[None]
    visible = column <= row
    if local and c.sliding_window:
        visible &= row - column < c.sliding_window
    weights = _softmax(np.where(visible, scores, np.float32(-np.inf)))
    mixed = np.einsum("hqk,khd->qhd", weights, v, optimize=True)
    return _project(source, names, "o_proj", mixed.reshape(length, -1))


def _project(source: WeightSource, names: LayerNames, part: str, x: np.ndarray) -> np.ndarray:
    y = x @ source.tensor(getattr(names, part)).T
    bias = names.bias(part)
    return y + source.tensor(bias) if bias in source.names() else y


def _norm(source: WeightSource, arch: ArchSpec, name: str) -> np.ndarray:
    return source.tensor(name) + np.float32(arch.norm_offset)


def _rms_norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + np.float32(eps)) * weight


def _rotate(x: np.ndarray, config: ModelConfig, local: bool) -> np.ndarray:
    cos, sin = (table[:, None] for table in rotary_tables(config, len(x), local))
    low, high = np.split(x, 2, axis=-1)
    return np.concatenate([low * cos - high * sin, high * cos + low * sin], axis=-1)


def _softmax(scores: np.ndarray) -> np.ndarray:
    exp = np.exp(scores - scores.max(-1, keepdims=True))
    return exp / exp.sum(-1, keepdims=True)


def _silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def _gelu_tanh(x: np.ndarray) -> np.ndarray:
    return 0.5 * x * (1 + np.tanh(np.float32(0.7978845608) * (x + 0.044715 * x**3)))


_ACTIVATIONS = {"silu": _silu, "gelu_tanh": _gelu_tanh}
