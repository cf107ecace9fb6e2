"""A GGUF file as a weight source: metadata to `ModelConfig`, names and orders of Hugging Face."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from forerun.errors import SourceError, UnsupportedError
from forerun.export.fields import Fields
from forerun.export.gguf_file import GGUFFile
from forerun.export.sources import ModelConfig, check_config, check_shapes
from forerun.runtime.manifest import file_sha256

if TYPE_CHECKING:
    from forerun.export.tokenizer import TokenizerSource

_PREFIX = "tokenizer.ggml."
_WHOLE = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_LAYER = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_GEMMA_LAYER = _LAYER | {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_ROPE_FACTORS = "rope_freqs.weight"
_GEMMA_LOCAL_THETA = 10000.0
_GEMMA_PERIOD = 6
_GEMMA_27B_LAYERS = 62
# Keys that change the computation in ways no architecture row knows; absent or zero is fine.
_REFUSED = (
    "expert_count",
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "logit_scale",
    "residual_scale",
    "embedding_scale",
    "attention.clamp_kqv",
    "attention.max_alibi_bias",
)
_SAMPLING = {
    "temp": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "penalty_repeat": "repetition_penalty",
}


class GGUFSource:
    """Weights of a GGUF file; see `WeightSource`.

    Attributes:
        file: the parsed file, for those who want the quantized blocks.
        stored: Hugging Face name to the name in the file.
    """

    def __init__(self, path: Path, name: str | None = None) -> None:
        self.file = GGUFFile(path)
        self.origin = name or path.name
        self._sha256 = ""
        self.config = read_config(self.file)
        self.stored = _names(self.file, self.config)
        shapes = {hf: self.file.tensors[raw].shape for hf, raw in self.stored.items()}
        self._names = check_shapes(self.config, shapes, str(path))

    @property
    def sha256(self) -> str:
        """SHA-256 of the file; computed once."""
        self._sha256 = self._sha256 or file_sha256(self.file.path)
        return self._sha256

    def names(self) -> frozenset[str]:
        """Names of all tensors, in Hugging Face's scheme."""
        return self._names

    def tensor(self, name: str) -> np.ndarray:
        """One tensor as float32, in Hugging Face's order of rows and with its norm weights."""
        values = self.file.tensor(self.stored[name])
        config = self.config
        if config.architecture == "llama" and name.endswith(_PERMUTED):
            return unpermute(values, config.kv_heads if "k_proj" in name else config.heads)
        if config.architecture == "gemma3" and name.endswith("norm.weight"):
            # llama.cpp stores 1 + w, Hugging Face w.
            return values - np.float32(1)
        return values

    def tokenizer_files(self) -> TokenizerSource:
        """The metadata from which tokenizer.json is rebuilt, lists in place of arrays."""
        from forerun.export.tokenizer import TokenizerSource

        found = {
            key[len(_PREFIX) :]: value.tolist() if isinstance(value, np.ndarray) else value
            for key, value in self.file.metadata.items()
            if key.startswith(_PREFIX)
        }
        return TokenizerSource(json_path=None, gguf=found)


_PERMUTED = tuple(f".self_attn.{p}_proj.{kind}" for p in "qk" for kind in ("weight", "bias"))


def unpermute(values: np.ndarray, heads: int) -> np.ndarray:
    """Undo llama.cpp's interleaved rotary order of query and key rows.

    Args:
        values: float32 [heads * head_dim, in] or [heads * head_dim], pairs (2i, 2i + 1).
        heads: number of heads in the rows.

    Returns:
        The same rows with pairs (i, i + head_dim / 2).
    """
    shape = values.shape
    paired = values.reshape(heads, shape[0] // heads // 2, 2, -1)
    return np.ascontiguousarray(paired.swapaxes(1, 2)).reshape(shape)


def read_config(file: GGUFFile) -> ModelConfig:
    """Normalise the metadata of a GGUF file.

    Raises:
        SourceError: a key is missing, of another type or out of range.
        UnsupportedError: the architecture or a setting of it is not known here.
    """
    general = Fields(file.metadata, str(file.path), "general.")
    arch = general.text("architecture")
    if arch not in _READERS:
        raise UnsupportedError(
            f"{file.path}: no reader for the GGUF architecture {arch!r}; "
            f"there is one for {', '.join(_READERS)}"
        )
    fields = Fields(file.metadata, str(file.path), f"{arch}.")
    for key in _REFUSED:
        if fields.raw(key):
            raise UnsupportedError(f"{file.path}: {arch}.{key} is set, which is not supported")
    if fields.flag("attention.causal", True) is not True:
        raise UnsupportedError(f"{file.path}: attention is not causal; not a text generator")
    sizes = _sizes(file, fields)
    settings = sizes | _rotary(file, fields, sizes) | _READERS[arch](fields, sizes)
    config = ModelConfig(
        architecture=arch,
        norm_eps=fields.number("attention.layer_norm_rms_epsilon"),
        attention_bias="blk.0.attn_q.bias" in file.tensors,
        tied="output.weight" not in file.tensors,
        licence=general.text("license", "unknown"),
        generation=_sampling(file),
        **_tokens(file),
        **settings,
    )
    check_config(config, str(file.path))
    return config


def _sizes(file: GGUFFile, fields: Fields) -> dict[str, Any]:
    hidden = fields.integer("embedding_length")
    layers = fields.integer("block_count")
    heads = _uniform(fields, "attention.head_count")
    if heads < 1:
        raise fields.error("attention.head_count", heads, "a positive number")
    head_dim = fields.integer("attention.key_length", hidden // heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if fields.integer(key, head_dim) != head_dim:
            raise UnsupportedError(
                f"{file.path}: {fields.prefix}{key} differs from the head size {head_dim}"
            )
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None:
        raise SourceError(f"{file.path}: tensor token_embd.weight is missing")
    return {
        "vocab": embedding.shape[0],
        "hidden": hidden,
        "layers": layers,
        "heads": heads,
        "kv_heads": _uniform(fields, "attention.head_count_kv", heads),
        "head_dim": head_dim,
        "ffn": _uniform(fields, "feed_forward_length"),
        "context": fields.integer("context_length"),
    }


def _uniform(fields: Fields, name: str, default: int | None = None) -> int:
    """An integer that may be stored per layer if all layers agree."""
    value = fields.raw(name)
    if isinstance(value, np.ndarray):
        if not value.size or value.dtype.kind not in "iu" or value.min() != value.max():
            raise UnsupportedError(f"{fields.where}: {fields.prefix}{name} differs by layer")
        return int(value[0])
    return fields.integer(name) if default is None else fields.integer(name, default)


def _rotary(file: GGUFFile, fields: Fields, sizes: dict[str, Any]) -> dict[str, Any]:
    scaling = None
    kind = fields.text("rope.scaling.type", "none")
    if kind != "none":
        scaling = {"rope_type": kind, "factor": fields.number("rope.scaling.factor")}
    if _ROPE_FACTORS in file.tensors:
        factors = file.tensor(_ROPE_FACTORS)
        if scaling or factors.shape != (sizes["head_dim"] // 2,) or factors.min() <= 0:
            raise UnsupportedError(f"{file.path}: {_ROPE_FACTORS} does not fit the head size")
        scaling = {"rope_type": "factors", "factors": factors.tolist()}
    return {"rope_theta": fields.number("rope.freq_base", 10000.0), "rope_scaling": scaling}


def _plain(fields: Fields, sizes: dict[str, Any]) -> dict[str, Any]:
    window = fields.integer("attention.sliding_window", 0) or None
    windows = (window is not None,) * _layers(sizes)
    return {"activation": "silu", "sliding_window": window, "layer_window": windows}


def _gemma3(fields: Fields, sizes: dict[str, Any]) -> dict[str, Any]:
    layers = _layers(sizes)
    width = sizes["hidden"] // sizes["heads"] if layers == _GEMMA_27B_LAYERS else sizes["head_dim"]
    if width < 1:
        raise fields.error("attention.key_length", width, "a positive number")
    return {
        "activation": "gelu_tanh",
        "sliding_window": fields.integer("attention.sliding_window"),
        "layer_window": tuple((i + 1) % _GEMMA_PERIOD != 0 for i in range(layers)),
        "rope_theta_local": _GEMMA_LOCAL_THETA,
        "query_scale": width**-0.5,
    }


def _layers(sizes: dict[str, Any]) -> int:
    # Absurd counts are refused by check_config; until then they must not cost memory.
    return max(0, min(sizes["layers"], 1 << 16))


_READERS = {"llama": _plain, "qwen2": _plain, "qwen3": _plain, "gemma3": _gemma3}


def _tokens(file: GGUFFile) -> dict[str, Any]:
    fields = Fields(file.metadata, str(file.path), _PREFIX)
    ends = [fields.integer(f"{kind}_token_id", None) for kind in ("eos", "eot", "eom")]
    return {
        "bos": fields.integer("bos_token_id", None),
        "eos": tuple(dict.fromkeys(token for token in ends if token is not None)),
        "add_bos": fields.flag("add_bos_token", fields.text("model", "") == "llama"),
        "chat_template": Fields(file.metadata, str(file.path)).text(
            "tokenizer.chat_template", None
        ),
    }


def _sampling(file: GGUFFile) -> dict[str, float]:
    fields = Fields(file.metadata, str(file.path), "general.sampling.")
    found = {ours: fields.number(name, None) for name, ours in _SAMPLING.items()}
    return {name: value for name, value in found.items() if value is not None}


def _names(file: GGUFFile, config: ModelConfig) -> dict[str, str]:
    """Map Hugging Face names to the names in the file; unknown ones keep their own."""
    table = _GEMMA_LAYER if config.architecture == "gemma3" else _LAYER
    stored = {}
    for name in file.tensors:
        head, _, kind = name.rpartition(".")
        block, _, part = head.partition(".")[2].partition(".")
        if head.startswith("blk.") and part in table:
            stored[f"model.layers.{block}.{table[part]}.{kind}"] = name
        elif name != _ROPE_FACTORS:
            stored[f"{_WHOLE.get(head, head)}.{kind}"] = name
    if len(stored) != len(file.tensors) - (_ROPE_FACTORS in file.tensors):
        raise SourceError(f"{file.path}: two tensors stand for the same weight")
    return stored
