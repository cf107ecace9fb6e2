"""Writes weights as a folder in Hugging Face layout, so that peers can be built from them."""

from __future__ import annotations

import json
import struct
from typing import TYPE_CHECKING, Any

import numpy as np

from forerun.errors import UnsupportedError
from forerun.export.sources import expected_shapes
from forerun.export.tokenizer import write_tokenizer

if TYPE_CHECKING:
    from pathlib import Path

    from forerun.export.sources import ModelConfig, WeightSource

_CLASSES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}


def write_hf_folder(source: WeightSource, out: Path) -> Path:
    """Write config.json, model.safetensors (float32) and the tokenizer into a folder.

    Tensors are written one at a time, so the whole model is never in memory.

    Args:
        source: opened weights.
        out: folder, made if needed.

    Raises:
        UnsupportedError: the architecture has no simple Hugging Face configuration here.
    """
    config = _config(source.config)
    out.mkdir(parents=True, exist_ok=True)
    (out / "config.json").write_text(json.dumps(config, indent=1))
    (out / "generation_config.json").write_text(json.dumps(_ids(source.config), indent=1))
    write_tokenizer(source.tokenizer_files(), out / "tokenizer.json")
    (out / "tokenizer_config.json").write_text(json.dumps(_tokenizer_config(source.config, out)))
    _write_safetensors(source, out / "model.safetensors")
    return out


def _config(config: ModelConfig) -> dict[str, Any]:
    plain = not any(config.layer_window) and config.activation == "silu"
    if config.architecture not in _CLASSES or not plain or config.query_scale is not None:
        known = ", ".join(_CLASSES)
        raise UnsupportedError(
            f"weights of architecture {config.architecture!r} are not written for peers; "
            f"known: {known}, without local attention"
        )
    return {
        "architectures": [_CLASSES[config.architecture]],
        "model_type": config.architecture,
        "vocab_size": config.vocab,
        "hidden_size": config.hidden,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.ffn,
        "max_position_embeddings": config.context,
        "rope_theta": config.rope_theta,
        "rope_scaling": config.rope_scaling,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tied,
        "attention_bias": config.attention_bias,
        "hidden_act": "silu",
        "torch_dtype": "float32",
        **_ids(config),
    }


def _ids(config: ModelConfig) -> dict[str, Any]:
    eos = list(config.eos)
    return {"bos_token_id": config.bos, "eos_token_id": eos[0] if len(eos) == 1 else eos}


def _tokenizer_config(config: ModelConfig, out: Path) -> dict[str, Any]:
    tokenizer = json.loads((out / "tokenizer.json").read_text(encoding="utf-8"))
    names = {row["id"]: row["content"] for row in tokenizer.get("added_tokens", [])}
    end = names.get(config.eos[0]) if config.eos else None
    begin = names.get(config.bos) if config.bos is not None else None
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": config.context,
        "bos_token": begin,
        "eos_token": end,
        "pad_token": end,
        "chat_template": config.chat_template,
    }


def _write_safetensors(source: WeightSource, path: Path) -> None:
    shapes = expected_shapes(source.config)
    names = sorted(source.names())
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name in names:
        size = 4 * int(np.prod(shapes[name]))
        header[name] = {
            "dtype": "F32",
            "shape": list(shapes[name]),
            "data_offsets": [offset, offset + size],
        }
        offset += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        for name in names:
            stream.write(np.ascontiguousarray(source.tensor(name), "<f4").data)
