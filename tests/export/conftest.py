"""Tiny models of every architecture, written as a GGUF file and as a Hugging Face folder."""

import json
import struct
from types import SimpleNamespace

import numpy as np
import pytest

HIDDEN, FFN, VOCAB, LAYERS, HEADS, KV_HEADS, HEAD_DIM = 64, 96, 48, 2, 4, 2, 16
TOKENS = ["<0>", "<1>", "<2>", *map(chr, range(65, 65 + VOCAB - 4)), "ab"]

HF_TYPES = {
    "llama": {"model_type": "llama"},
    "mistral": {"model_type": "mistral", "sliding_window": 24},
    "qwen2": {"model_type": "qwen2"},
    "qwen3": {"model_type": "qwen3"},
    "gemma3": {
        "model_type": "gemma3_text",
        "hidden_activation": "gelu_pytorch_tanh",
        "sliding_window": 24,
        "query_pre_attn_scalar": HEAD_DIM,
        "rope_local_base_freq": 10000.0,
    },
}
GGUF_PARTS = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
GEMMA_PARTS = GGUF_PARTS | {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}


def random_weights(arch, tied=True, seed=0):
    """float32 weights by Hugging Face name, values of a trained model's size."""
    q, kv = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
    layer = {
        "self_attn.q_proj.weight": (q, HIDDEN),
        "self_attn.k_proj.weight": (kv, HIDDEN),
        "self_attn.v_proj.weight": (kv, HIDDEN),
        "self_attn.o_proj.weight": (HIDDEN, q),
        "mlp.gate_proj.weight": (FFN, HIDDEN),
        "mlp.up_proj.weight": (FFN, HIDDEN),
        "mlp.down_proj.weight": (HIDDEN, FFN),
        "input_layernorm.weight": (HIDDEN,),
        "post_attention_layernorm.weight": (HIDDEN,),
    }
    if arch == "qwen2":
        layer |= {f"self_attn.{p}_proj.bias": (n,) for p, n in (("q", q), ("k", kv), ("v", kv))}
    if arch in ("qwen3", "gemma3"):
        layer |= {f"self_attn.{p}_norm.weight": (HEAD_DIM,) for p in "qk"}
    if arch == "gemma3":
        layer |= {f"{when}_feedforward_layernorm.weight": (HIDDEN,) for when in ("pre", "post")}
    shapes = {"model.embed_tokens.weight": (VOCAB, HIDDEN), "model.norm.weight": (HIDDEN,)}
    if not tied:
        shapes["lm_head.weight"] = (VOCAB, HIDDEN)
    for i in range(LAYERS):
        shapes |= {f"model.layers.{i}.{part}": shape for part, shape in layer.items()}
    rng = np.random.default_rng(seed)
    return {name: rng.normal(0, 0.2, shape).astype(np.float32) for name, shape in shapes.items()}


def permute(weights, heads):
    """What llama.cpp's converter does to query and key rows (`LlamaModel.permute`)."""
    shape = weights.shape
    return weights.reshape(heads, 2, shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(shape)


def gguf_name(name, arch):
    parts = GEMMA_PARTS if arch == "gemma3" else GGUF_PARTS
    whole = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    stem, _, kind = name.rpartition(".")
    if not name.startswith(("model.", "lm_head.")):
        return name
    if stem in whole:
        return f"{whole[stem]}.{kind}"
    _, _, block, part = stem.split(".", 3)
    return f"blk.{block}.{parts[part]}.{kind}"


def write_gguf(path, arch="llama", weights=None, types=None, extra=None, tokens=None):
    """Write a tiny GGUF file; `types` maps a part of a GGUF name to a quantization type."""
    import gguf

    writer = gguf.GGUFWriter(path, arch)
    writer.add_block_count(LAYERS)
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(FFN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_key_length(HEAD_DIM)
    writer.add_value_length(HEAD_DIM)
    writer.add_rope_freq_base(5000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    if arch == "gemma3":
        writer.add_sliding_window(24)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens or TOKENS)
    writer.add_token_types([3] * 3 + [1] * (VOCAB - 3))
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_string("general.license", "apache-2.0")
    for key, value in (extra or {}).items():
        writer.add_key_value(key, value, kind_of(value))
    for name, array in (random_weights(arch) if weights is None else weights).items():
        stored, array = gguf_name(name, arch), stored_values(name, array, arch)
        kind = next((t for part, t in (types or {}).items() if part in stored), None)
        if kind:
            quant = gguf.GGMLQuantizationType[kind]
            writer.add_tensor(stored, gguf.quants.quantize(array, quant), raw_dtype=quant)
        else:
            writer.add_tensor(stored, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def stored_values(name, array, arch):
    if arch == "llama" and ".q_proj." in name:
        return permute(array, HEADS)
    if arch == "llama" and ".k_proj." in name:
        return permute(array, KV_HEADS)
    return array + np.float32(1) if arch == "gemma3" and name.endswith("norm.weight") else array


def kind_of(value):
    import gguf

    types = {str: "STRING", bool: "BOOL", int: "UINT32", float: "FLOAT32"}
    return gguf.GGUFValueType[types[type(value)]]


def safetensors_bytes(tensors, header=None):
    """The bytes of a file; `tensors` maps a name to (dtype, shape, bytes)."""
    rows, data = {}, b""
    for name, (dtype, shape, raw) in tensors.items():
        offsets = [len(data), len(data) + len(raw)]
        rows[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": offsets}
        data += raw
    text = json.dumps(rows if header is None else header).encode()
    return struct.pack("<Q", len(text)) + text + data


def pack(weights):
    return {name: ("F32", w.shape, w.tobytes()) for name, w in weights.items()}


def write_folder(folder, arch="llama", weights=None, files=1, config=None):
    """Write a tiny Hugging Face folder with weights in one or more files."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = random_weights(arch) if weights is None else weights
    settings = {
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "intermediate_size": FFN,
        "max_position_embeddings": 128,
        "rope_theta": 5000.0,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "tie_word_embeddings": "lm_head.weight" not in weights,
        "bos_token_id": 1,
        "eos_token_id": 2,
        **HF_TYPES[arch],
        **(config or {}),
    }
    (folder / "config.json").write_text(json.dumps(settings))
    if files == 1:
        (folder / "model.safetensors").write_bytes(safetensors_bytes(pack(weights)))
        return folder
    names = list(weights)
    table = {}
    for number in range(files):
        file = f"model-{number + 1:05}-of-{files:05}.safetensors"
        part = {name: weights[name] for name in names[number::files]}
        (folder / file).write_bytes(safetensors_bytes(pack(part)))
        table |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": table}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


@pytest.fixture(scope="session")
def tiny():
    """Writers of tiny models: `tiny.gguf`, `tiny.folder`, `tiny.weights`, `tiny.safetensors`."""
    return SimpleNamespace(
        gguf=write_gguf,
        folder=write_folder,
        weights=random_weights,
        safetensors=safetensors_bytes,
        pack=pack,
        architectures=tuple(HF_TYPES),
        layers=LAYERS,
    )
