"""What the exporter reads: one description of a decoder and its float32 weights.

GGUF files and folders in Hugging Face layout look alike from here on: Hugging Face's tensor
names, (out, in) matrices, queries and keys in the rotate-half order.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from forerun.errors import SourceError
from forerun.export.arch import arch_of

if TYPE_CHECKING:
    from forerun.export.tokenizer import TokenizerSource

_LIMITS = {
    "vocab": 1 << 24,
    "hidden": 1 << 17,
    "layers": 1024,
    "heads": 1024,
    "kv_heads": 1024,
    "head_dim": 4096,
    "ffn": 1 << 20,
    "context": 1 << 24,
}


@dataclass(frozen=True)
class ModelConfig:
    """Sizes and settings of a decoder, normalised from GGUF metadata or config.json.

    Attributes:
        architecture: Hugging Face `model_type` (``gemma3_text`` is ``gemma3``).
        vocab: rows of the embedding.
        hidden: width of the residual stream.
        layers: number of decoder layers.
        heads: query heads.
        kv_heads: key and value heads.
        head_dim: width of one head.
        ffn: width inside the gated FFN.
        context: longest sequence the model was trained for.
        rope_theta: base of the rotary embedding.
        norm_eps: added to the mean square in every RMS norm.
        tied: the head is the embedding.
        activation: ``silu`` or ``gelu_tanh``.
        layer_window: per layer, True where attention reaches back `sliding_window` tokens only.
        sliding_window: number of tokens a local layer sees, itself included.
        rope_theta_local: base in local layers, if it is another one.
        rope_scaling: Hugging Face's dict, or ``{"rope_type": "factors", "factors": [...]}``
            (divisors of the head_dim / 2 frequencies) from a GGUF file.
        attention_bias: queries, keys and values have a bias.
        query_scale: factor on the attention scores; None is head_dim ** -0.5.
        bos: id that begins a text.
        eos: ids that end an answer.
        add_bos: a text is begun with `bos`.
        generation: sampling defaults of the publisher, by the names of `SamplingParams`.
        chat_template: Jinja text.
        licence: as stated by the source, or ``unknown``.
    """

    architecture: str
    vocab: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    context: int
    rope_theta: float
    norm_eps: float
    tied: bool
    activation: str
    layer_window: tuple[bool, ...]
    sliding_window: int | None = None
    rope_theta_local: float | None = None
    rope_scaling: dict[str, Any] | None = None
    attention_bias: bool = False
    query_scale: float | None = None
    bos: int | None = None
    eos: tuple[int, ...] = ()
    add_bos: bool = False
    generation: dict[str, float] = field(default_factory=dict)
    chat_template: str | None = None
    licence: str = "unknown"


class WeightSource(Protocol):
    """Opened weights; nothing is read from disk before it is asked for."""

    config: ModelConfig
    origin: str

    @property
    def sha256(self) -> str:
        """SHA-256 of the file, or of the list of hashes of a folder's files."""
        ...

    def names(self) -> frozenset[str]:
        """Names of all tensors the model needs, in Hugging Face's scheme."""
        ...

    def tensor(self, name: str) -> np.ndarray:
        """One tensor as float32, (out, in) for matrices.

        Raises:
            SourceError: a value is not finite.
        """
        ...

    def tokenizer_files(self) -> TokenizerSource:
        """What the tokenizer can be taken or rebuilt from."""
        ...


def open_source(path: Path | str, name: str | None = None) -> WeightSource:
    """Open a .gguf file, a folder in Hugging Face layout, or a folder with one .gguf file.

    Args:
        path: file or folder.
        name: shown as the origin instead of the file's name.

    Raises:
        SourceError: there is nothing to read, or what is there is damaged or inconsistent.
        UnsupportedError: the architecture, or a setting of it, is not known here.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        if (path / "config.json").is_file():
            from forerun.export.hf_folder import FolderSource

            return FolderSource(path, name)
        path = _only_gguf(path)
    elif not path.exists():
        raise SourceError(f"{path} does not exist; give a .gguf file or a Hugging Face folder")
    elif path.suffix != ".gguf" and not _has_magic(path):
        raise SourceError(f"{path} is neither a .gguf file nor a folder in Hugging Face layout")
    from forerun.export.gguf_model import GGUFSource

    return GGUFSource(path, name)


def check_config(config: ModelConfig, where: str) -> None:
    """Refuse sizes that contradict each other or are beyond reason.

    Raises:
        SourceError: names the size.
        UnsupportedError: there is no row for the architecture.
    """
    arch_of(config)
    for key, limit in _LIMITS.items():
        if not 1 <= getattr(config, key) <= limit:
            raise SourceError(f"{where}: {key} is {getattr(config, key)}, expected 1 to {limit}")
    window = config.sliding_window
    rules = {
        "heads must be a multiple of kv_heads": config.heads % config.kv_heads == 0,
        "head_dim must be even": config.head_dim % 2 == 0,
        "rope_theta must be positive": min(config.rope_theta, config.rope_theta_local or 1) > 0,
        "norm_eps must lie between 0 and 1": 0 < config.norm_eps < 1,
        "every layer needs a kind of attention": len(config.layer_window) == config.layers,
        "local layers need a sliding window": not any(config.layer_window) or bool(window),
        "the sliding window must be positive": window is None or window > 0,
        "the query scale must be positive": config.query_scale is None or config.query_scale > 0,
        "bos and eos must lie in the vocabulary": all(
            0 <= token < config.vocab for token in (*config.eos, config.bos or 0)
        ),
    }
    for rule, kept in rules.items():
        if not kept:
            raise SourceError(f"{where}: {rule}")


def expected_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor a model of this description must have."""
    arch = arch_of(config)
    hidden, q, kv = config.hidden, config.heads * config.head_dim, config.kv_heads * config.head_dim
    layer: dict[str, tuple[int, ...]] = {
        "self_attn.q_proj.weight": (q, hidden),
        "self_attn.k_proj.weight": (kv, hidden),
        "self_attn.v_proj.weight": (kv, hidden),
        "self_attn.o_proj.weight": (hidden, q),
        "mlp.gate_proj.weight": (config.ffn, hidden),
        "mlp.up_proj.weight": (config.ffn, hidden),
        "mlp.down_proj.weight": (hidden, config.ffn),
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
    }
    if config.attention_bias:
        layer |= {f"self_attn.{p}_proj.bias": (n,) for p, n in zip("qkv", (q, kv, kv), strict=True)}
    if arch.qk_norm:
        layer |= {f"self_attn.{part}_norm.weight": (config.head_dim,) for part in "qk"}
    if arch.post_norms:
        layer |= {f"{when}_feedforward_layernorm.weight": (hidden,) for when in ("pre", "post")}
    shapes = {"model.embed_tokens.weight": (config.vocab, hidden), "model.norm.weight": (hidden,)}
    if not config.tied:
        shapes["lm_head.weight"] = (config.vocab, hidden)
    for index in range(config.layers):
        shapes |= {f"model.layers.{index}.{part}": shape for part, shape in layer.items()}
    return shapes


def check_shapes(
    config: ModelConfig, found: Mapping[str, tuple[int, ...]], where: str
) -> frozenset[str]:
    """Compare the tensors of a source with what its settings promise.

    Returns:
        The names the model needs.

    Raises:
        SourceError: a tensor is missing, has another shape, or nothing would use it.
    """
    wanted = expected_shapes(config)
    if config.attention_bias:
        bias = "model.layers.{}.self_attn.o_proj.bias"
        optional = {bias.format(i): (config.hidden,) for i in range(config.layers)}
        wanted |= {name: shape for name, shape in optional.items() if name in found}
    for name, shape in wanted.items():
        if name not in found:
            raise SourceError(f"{where}: tensor {name} is missing")
        if found[name] != shape:
            raise SourceError(f"{where}: tensor {name} has shape {found[name]}, expected {shape}")
    if extra := sorted(set(found) - set(wanted)):
        # A weight that is silently left out would make it another model.
        raise SourceError(
            f"{where}: tensor {extra[0]} does not belong to a {config.architecture} model "
            "with these settings"
        )
    return frozenset(wanted)


def _only_gguf(folder: Path) -> Path:
    files = sorted(folder.glob("*.gguf"))
    if len(files) != 1:
        raise SourceError(
            f"{folder} holds neither a config.json nor exactly one .gguf file ({len(files)} found)"
        )
    return files[0]


def _has_magic(path: Path) -> bool:
    with open(path, "rb") as stream:
        return stream.read(4) == b"GGUF"
