"""Hugging Face's settings files as a `ModelConfig`."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from forerun.errors import SourceError, UnsupportedError
from forerun.export.fields import Fields, read_json
from forerun.export.sources import ModelConfig

_ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
_RENAMED = {"gemma3_text": "gemma3"}
# Settings that change the computation in ways no architecture row knows.
_REFUSED = (
    "quantization_config",
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "mlp_bias",
    "use_bidirectional_attention",
    "text_config",
)
_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "typical_p")
_BOS_CLASSES = ("LlamaTokenizer", "GemmaTokenizer", "CodeLlamaTokenizer")
_GEMMA_PERIOD = 6


def read_config(folder: Path) -> ModelConfig:
    """Normalise config.json, generation_config.json and tokenizer_config.json.

    Raises:
        SourceError: a setting is missing, of another type or out of range.
        UnsupportedError: the architecture or a setting of it is not known here.
    """
    fields = Fields(read_json(folder / "config.json"), str(folder / "config.json"))
    kind: str = fields.text("model_type")
    if kind not in _READERS:
        raise UnsupportedError(
            f"{folder}: no reader for the architecture {kind!r}; "
            f"there is one for {', '.join(_READERS)}, others need --via optimum"
        )
    for key in _REFUSED:
        if fields.raw(key):
            raise UnsupportedError(f"{folder}: {key} is set in config.json; it is not supported")
    sizes = _sizes(fields)
    generation = _optional(folder / "generation_config.json")
    tokenizer = _optional(folder / "tokenizer_config.json")
    settings = sizes | _rotary(fields) | _READERS[kind](fields, sizes["layers"])
    return ModelConfig(
        architecture=_RENAMED.get(kind, kind),
        norm_eps=fields.number("rms_norm_eps", 1e-6),
        bos=_first(fields.raw("bos_token_id"), fields),
        eos=_ends(fields, generation),
        add_bos=_adds_bos(folder, tokenizer),
        generation=_sampling(generation),
        chat_template=_template(folder, tokenizer),
        licence=_licence(folder),
        **settings,
    )


def _sizes(fields: Fields) -> dict[str, Any]:
    heads, hidden = fields.integer("num_attention_heads"), fields.integer("hidden_size")
    layers = fields.integer("num_hidden_layers")
    if heads < 1 or not 0 < layers <= 1 << 16:
        raise fields.error("num_attention_heads, num_hidden_layers", (heads, layers), "counts")
    return {
        "vocab": fields.integer("vocab_size"),
        "hidden": hidden,
        "layers": layers,
        "heads": heads,
        "kv_heads": fields.integer("num_key_value_heads", heads),
        "head_dim": fields.integer("head_dim", hidden // heads),
        "ffn": fields.integer("intermediate_size"),
        "context": fields.integer("max_position_embeddings"),
    }


def _rotary(fields: Fields) -> dict[str, Any]:
    """Base and scaling, from the keys of transformers 4 or from `rope_parameters` of 5."""
    where = f"{fields.where}: rope_parameters"
    table = _object(fields, "rope_parameters")
    local = fields.number("rope_local_base_freq", None)
    if isinstance(table.get("full_attention"), dict):
        local_table = table.get("sliding_attention")
        if isinstance(local_table, dict):
            local = Fields(local_table, where).number("rope_theta", local)
            if local_table.get("rope_type", "default") != "default":
                raise UnsupportedError(f"{where}: scaling of local layers is not supported")
        table = table["full_attention"]
    theta = Fields(table, where).number("rope_theta", fields.number("rope_theta", 10000.0))
    scaling = {key: value for key, value in table.items() if key != "rope_theta"}
    scaling = _scaling(scaling or _object(fields, "rope_scaling"), fields)
    if Fields(table, where).number("partial_rotary_factor", 1.0) != 1.0:
        raise UnsupportedError(f"{fields.where}: partial rotary embedding is not supported")
    return {"rope_theta": theta, "rope_theta_local": local, "rope_scaling": scaling}


def _scaling(raw: dict[str, Any], fields: Fields) -> dict[str, Any] | None:
    kind = raw.get("rope_type", raw.get("type", "default"))
    if not isinstance(kind, str):
        raise fields.error("rope_scaling", raw, "an object with a rope_type")
    for key, value in raw.items():
        if type(value) in (int, float) and not 0 < value < 1e12:
            raise fields.error(f"rope_scaling.{key}", value, "a positive number")
        if key.endswith(("factor", "embeddings")) and type(value) not in (int, float):
            raise fields.error(f"rope_scaling.{key}", value, "a positive number")
    return None if kind == "default" else {**raw, "rope_type": kind}


def _object(fields: Fields, name: str) -> dict[str, Any]:
    value = fields.raw(name)
    if value is not None and not isinstance(value, dict):
        raise fields.error(name, value, "an object")
    return value or {}


def _base(fields: Fields, layers: int, *, tied: bool = False, act: str = "silu") -> dict[str, Any]:
    act = fields.text("hidden_activation", fields.text("hidden_act", act))
    if act not in _ACTIVATIONS:
        raise UnsupportedError(
            f"{fields.where}: activation {act!r} is not one of {', '.join(_ACTIVATIONS)}"
        )
    return {
        "tied": fields.flag("tie_word_embeddings", tied),
        "activation": _ACTIVATIONS[act],
        "attention_bias": fields.flag("attention_bias", False),
        "layer_window": (False,) * layers,
    }


def _windows(fields: Fields, layers: int, default: Callable[[int], bool]) -> dict[str, Any]:
    """`layer_types` if it is there, else `default(layer)`; no window size, no local layers."""
    window = fields.integer("sliding_window", None)
    kinds = fields.raw("layer_types")
    if kinds is None:
        local = tuple(window is not None and default(i) for i in range(layers))
    elif isinstance(kinds, list) and set(kinds) <= {"full_attention", "sliding_attention"}:
        local = tuple(kind == "sliding_attention" for kind in kinds)
    else:
        raise UnsupportedError(f"{fields.where}: layer_types holds kinds that are not supported")
    return {"layer_window": local, "sliding_window": window if any(local) else None}


def _llama(fields: Fields, layers: int) -> dict[str, Any]:
    return _base(fields, layers)


def _mistral(fields: Fields, layers: int) -> dict[str, Any]:
    return _base(fields, layers) | _windows(fields, layers, lambda layer: True)


def _qwen(fields: Fields, layers: int) -> dict[str, Any]:
    if not fields.flag("use_sliding_window", False):
        return _base(fields, layers)
    first = fields.integer("max_window_layers", layers)
    return _base(fields, layers) | _windows(fields, layers, lambda layer: layer >= first)


def _qwen2(fields: Fields, layers: int) -> dict[str, Any]:
    return _qwen(fields, layers) | {"attention_bias": True}


def _gemma3(fields: Fields, layers: int) -> dict[str, Any]:
    period = fields.integer("sliding_window_pattern", _GEMMA_PERIOD)
    if period < 1:
        raise fields.error("sliding_window_pattern", period, "a positive number")
    scalar = fields.number("query_pre_attn_scalar", 256.0)
    if scalar <= 0:
        raise fields.error("query_pre_attn_scalar", scalar, "a positive number")
    found = _base(fields, layers, tied=True, act="gelu_pytorch_tanh")
    found |= _windows(fields, layers, lambda layer: (layer + 1) % period != 0)
    if fields.raw("rope_local_base_freq") is None and fields.raw("rope_parameters") is None:
        found["rope_theta_local"] = 10000.0
    return found | {"query_scale": scalar**-0.5}


_READERS: dict[str, Callable[[Fields, int], dict[str, Any]]] = {
    "llama": _llama,
    "mistral": _mistral,
    "qwen2": _qwen2,
    "qwen3": _qwen,
    "gemma3_text": _gemma3,
}


def _optional(path: Path) -> Fields:
    return Fields(read_json(path) if path.is_file() else {}, str(path))


def _first(value: Any, fields: Fields) -> int | None:
    ids = _ids(value, "bos_token_id", fields)
    return ids[0] if ids else None


def _ends(fields: Fields, generation: Fields) -> tuple[int, ...]:
    found = _ids(generation.raw("eos_token_id"), "eos_token_id", generation)
    return tuple(dict.fromkeys(found + _ids(fields.raw("eos_token_id"), "eos_token_id", fields)))


def _ids(value: Any, name: str, fields: Fields) -> list[int]:
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(item) is int for item in ids):
        raise fields.error(name, value, "a token id or a list of them")
    return ids


def _adds_bos(folder: Path, tokenizer: Fields) -> bool:
    """What the tokenizer does: its own setting, else its template, else the habit of its class."""
    stated = tokenizer.flag("add_bos_token", None)
    if stated is not None:
        return stated
    path = folder / "tokenizer.json"
    after = read_json(path).get("post_processor") if path.is_file() else None
    steps = after.get("processors", [after]) if isinstance(after, dict) else []
    for step in steps if isinstance(steps, list) else []:
        single = step.get("single") if isinstance(step, dict) else None
        if isinstance(single, list) and single:
            return isinstance(single[0], dict) and "SpecialToken" in single[0]
    return tokenizer.text("tokenizer_class", "").removesuffix("Fast") in _BOS_CLASSES


def _sampling(generation: Fields) -> dict[str, float]:
    """Sampling defaults; transformers ignores all but the penalty unless `do_sample` is true."""
    names = _SAMPLING if generation.flag("do_sample", False) else ()
    found = {name: generation.number(name, None) for name in (*names, "repetition_penalty")}
    return {name: value for name, value in found.items() if value is not None}


def _template(folder: Path, tokenizer: Fields) -> str | None:
    path = folder / "chat_template.jinja"
    if path.is_file():
        try:
            return path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            raise SourceError(f"{path} is not UTF-8") from None
    value = tokenizer.raw("chat_template")
    if isinstance(value, list):
        named = {row.get("name"): row.get("template") for row in value if isinstance(row, dict)}
        value = named.get("default")
    if value is not None and not isinstance(value, str):
        raise tokenizer.error("chat_template", value, "a string")
    return value


def _licence(folder: Path) -> str:
    """The `license:` line of the model card's front matter."""
    card = folder / "README.md"
    if not card.is_file():
        return "unknown"
    head = card.read_bytes()[:20000].decode("utf-8", "replace")
    found = re.match(r"---\n.*?^license:\s*([\w.+-]+)\s*$.*?^---", head, re.DOTALL | re.MULTILINE)
    return found.group(1) if found else "unknown"
