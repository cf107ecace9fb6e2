"""A tiny random source of weights for each architecture, and bundles made from it."""

import json
from dataclasses import dataclass, field, replace

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from forerun.export.arch import ARCHITECTURES, ffn_norm_name, layer_names
from forerun.export.export import export_model
from forerun.export.sources import ModelConfig
from forerun.export.tokenizer import TokenizerSource

BASE = ModelConfig(
    architecture="llama",
    vocab=258,
    hidden=64,
    layers=3,
    heads=4,
    kv_heads=2,
    head_dim=16,
    ffn=96,
    context=256,
    rope_theta=10000.0,
    norm_eps=1e-5,
    tied=True,
    activation="silu",
    layer_window=(False, False, False),
    eos=(257,),
    bos=256,
)

CONFIGS = {
    "llama": BASE,
    "mistral": replace(
        BASE, architecture="mistral", tied=False, sliding_window=9, layer_window=(True,) * 3
    ),
    "qwen2": replace(BASE, architecture="qwen2", attention_bias=True),
    "qwen3": replace(BASE, architecture="qwen3", kv_heads=1),
    "gemma3": replace(
        BASE,
        architecture="gemma3",
        activation="gelu_tanh",
        sliding_window=7,
        layer_window=(True, True, False),
        rope_theta=1e6,
        rope_theta_local=1e4,
        query_scale=0.3,
    ),
}


def byte_tokenizer() -> Tokenizer:
    """One token a byte, then BOS and EOS."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<bos>", "<eos>"])
    return tokenizer


@dataclass
class TinySource:
    """Random weights with the names that the architecture's row expects."""

    config: ModelConfig
    tokenizer: TokenizerSource
    seed: int = 0
    origin: str = "test"
    sha256: str = ""
    tensors: dict[str, np.ndarray] = field(default_factory=dict)

    def __post_init__(self):
        c, arch = self.config, ARCHITECTURES[self.config.architecture]
        rng = np.random.default_rng(self.seed)

        def put(name, *shape, scale=0.3):
            self.tensors[name] = (rng.standard_normal(shape) * scale).astype(np.float32)

        put("model.embed_tokens.weight", c.vocab, c.hidden, scale=1.0)
        put("model.norm.weight", c.hidden)
        if not c.tied:
            put("lm_head.weight", c.vocab, c.hidden)
        widths = {"q_proj": c.heads * c.head_dim, "k_proj": c.kv_heads * c.head_dim}
        widths["v_proj"] = widths["k_proj"]
        for layer in range(c.layers):
            n = layer_names(layer)
            for part, width in widths.items():
                put(getattr(n, part), width, c.hidden)
                if c.attention_bias:
                    put(n.bias(part), width)
            put(n.o_proj, c.hidden, c.heads * c.head_dim)
            put(n.gate_proj, c.ffn, c.hidden)
            put(n.up_proj, c.ffn, c.hidden)
            put(n.down_proj, c.hidden, c.ffn)
            norms = [n.input_norm, n.post_attention_norm, ffn_norm_name(arch, layer)]
            norms += [n.post_ffn_norm] if arch.post_norms else []
            for name in norms:
                put(name, c.hidden)
            if arch.qk_norm:
                put(n.q_norm, c.head_dim)
                put(n.k_norm, c.head_dim)

    def names(self):
        return frozenset(self.tensors)

    def tensor(self, name):
        return self.tensors[name]

    def tokenizer_files(self):
        return self.tokenizer


def tiny_source(arch: str, folder, **changes) -> TinySource:
    """A source whose tokenizer is saved in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "tokenizer.json"
    byte_tokenizer().save(str(path))
    config = replace(CONFIGS[arch], **changes)
    return TinySource(config, TokenizerSource(json_path=path, gguf=None))


def tiny_bundle(arch: str, folder, *, capacity=128, hidden_states=False, static=False, **changes):
    """Export a tiny model; returns (manifest, folder of the bundle)."""
    source = tiny_source(arch, folder / "source", **changes)
    out = folder / "bundle"
    manifest = export_model(
        source,
        out,
        name=f"tiny-{arch}",
        capacity=capacity,
        hidden_states=hidden_states,
        static=static,
    )
    return manifest, out


def edit_manifest(folder, change) -> None:
    """Load manifest.json as plain data, let `change` edit it, write it back."""
    path = folder / "manifest.json"
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))
