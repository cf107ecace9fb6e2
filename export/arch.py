"""Architectures as rows of facts; all behaviour lives in `graph` and `reference`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from forerun.errors import UnsupportedError

if TYPE_CHECKING:
    from forerun.export.sources import ModelConfig


@dataclass(frozen=True)
class ArchSpec:
    """What distinguishes one family of decoders from another.

    Attributes:
        name: the Hugging Face `model_type`.
        qk_norm: queries and keys are RMS-normalised per head before the rotation.
        post_norms: attention and FFN outputs are normalised before they join the residual.
        norm_offset: added to stored norm weights (Gemma stores w and multiplies with 1 + w).
        scaled_embedding: embeddings are multiplied with the square root of the hidden size.
        rtol: largest error of the exported graph, relative to the spread of the logits.
    """

    name: str
    qk_norm: bool = False
    post_norms: bool = False
    norm_offset: float = 0.0
    scaled_embedding: bool = False
    rtol: float = 5e-4


ARCHITECTURES = {
    row.name: row
    for row in (
        ArchSpec("llama"),
        ArchSpec("mistral"),
        ArchSpec("qwen2"),
        ArchSpec("qwen3", qk_norm=True),
        ArchSpec("gemma3", qk_norm=True, post_norms=True, norm_offset=1.0, scaled_embedding=True),
    )
}


def arch_of(config: ModelConfig) -> ArchSpec:
    """Return the row for a model.

    Raises:
        UnsupportedError: there is no row; the message names those there are.
    """
    try:
        return ARCHITECTURES[config.architecture]
    except KeyError:
        raise UnsupportedError(
            f"no exporter for the architecture {config.architecture!r}; "
            f"there is one for {', '.join(ARCHITECTURES)}, others need --via optimum"
        ) from None


@dataclass(frozen=True)
class LayerNames:
    """Names of the tensors of one decoder layer in Hugging Face's scheme."""

    prefix: str

    def __getattr__(self, part: str) -> str:
        """Return e.g. ``model.layers.0.mlp.gate_proj.weight`` for `gate_proj`."""
        return f"{self.prefix}.{_PARTS[part]}.weight"

    def bias(self, part: str) -> str:
        """Return the name of the bias that belongs to a weight."""
        return f"{self.prefix}.{_PARTS[part]}.bias"


_PARTS = {
    **{f"{p}_proj": f"self_attn.{p}_proj" for p in "qkvo"},
    **{f"{p}_norm": f"self_attn.{p}_norm" for p in "qk"},
    **{f"{p}_proj": f"mlp.{p}_proj" for p in ("gate", "up", "down")},
    "input_norm": "input_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "pre_ffn_norm": "pre_feedforward_layernorm",
    "post_ffn_norm": "post_feedforward_layernorm",
}


def layer_names(layer: int) -> LayerNames:
    """Names of the tensors of layer number `layer`."""
    return LayerNames(f"model.layers.{layer}")


def ffn_norm_name(arch: ArchSpec, layer: int) -> str:
    """Name of the norm before the FFN (Gemma has two norms between attention and FFN)."""
    names = layer_names(layer)
    return names.pre_ffn_norm if arch.post_norms else names.post_attention_norm


def attention_scale(config: ModelConfig) -> float:
    """Factor on the scores of the attention."""
    return config.query_scale or 1.0 / math.sqrt(config.head_dim)


def rotary_tables(config: ModelConfig, capacity: int, local: bool) -> tuple[np.ndarray, np.ndarray]:
    """Cosines and sines of the rotary embedding (Su 2021).

    Returns:
        Two float32 arrays [capacity, head_dim / 2], for the rotate-half pairing.
    """
    angle = np.arange(capacity, dtype=np.float64)[:, None] * rotary_frequencies(config, local)
    return np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)


def rotary_frequencies(config: ModelConfig, local: bool) -> np.ndarray:
    """Radians per position, float64 [head_dim / 2]; local layers may have a theta of their own."""
    theta = config.rope_theta
    scaling = config.rope_scaling
    if local and config.rope_theta_local is not None:
        theta, scaling = config.rope_theta_local, None
    half = np.arange(0, config.head_dim, 2, dtype=np.float64)
    return _scale_frequencies(theta ** (-half / config.head_dim), scaling)


def _scale_frequencies(frequency: np.ndarray, scaling: dict[str, Any] | None) -> np.ndarray:
    if not scaling:
        return frequency
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    try:
        return _ROPE_SCALINGS[kind](frequency, scaling)
    except KeyError as missing:
        if missing.args and missing.args[0] == kind:
            raise UnsupportedError(
                f"rope scaling {kind!r} is not supported; these are: {', '.join(_ROPE_SCALINGS)}"
            ) from None
        raise UnsupportedError(f"rope scaling {kind!r} lacks {missing.args[0]!r}") from None


def _llama3_scaling(frequency: np.ndarray, scaling: dict[str, Any]) -> np.ndarray:
    """Long waves are stretched, short ones kept, those between are blended (Llama 3.1)."""
    factor, old = scaling["factor"], scaling["original_max_position_embeddings"]
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = old * frequency / (2 * math.pi)
    blend = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return frequency * (blend + (1 - blend) / factor)


_ROPE_SCALINGS = {
    "default": lambda frequency, scaling: frequency,
    "factors": lambda frequency, scaling: frequency / np.asarray(scaling["factors"]),
    "linear": lambda frequency, scaling: frequency / scaling["factor"],
    "llama3": _llama3_scaling,
}
