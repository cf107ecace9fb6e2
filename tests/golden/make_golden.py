"""Write the golden token ids of this folder with llama.cpp, which shares no code with forerun.

Run it in an environment of its own with `xllamacpp`, `gguf` and `tokenizers`:

    python tests/golden/make_golden.py --smollm2 SmolLM2.gguf --gemma3 gemma.gguf

Besides the two models of the catalog it makes tiny ones whose merges ignore word boundaries, so
that the ids show where each kind of pre-tokenizer cuts.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
import tempfile
import unicodedata
import urllib.request
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

HERE = Path(__file__).parent
TEXTS: dict[str, str] = json.loads((HERE / "texts.json").read_text("utf-8"))
SPECIALS = ["<unk>", "<|im_start|>", "<|im_end|>", "<|endoftext|>"]
NORMAL, UNKNOWN, CONTROL, USER, BYTE = 1, 2, 3, 4, 6
NFC = frozenset({"qwen2"})  # normalised by the model's own tokenizer, not by llama.cpp
PRE = ("smollm", "qwen2", "llama-bpe", "gpt-2", "default")


def reference_ids(path: Path, texts: dict[str, str]) -> dict[str, list[int]]:
    """Return what llama.cpp's server makes of each text, without a begin token."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.n_ctx, params.n_parallel, params.port, params.warmup = 256, 1, 0, False
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    server = xllamacpp.Server(params)
    return {name: _tokenize(server.listening_address, text) for name, text in texts.items()}


def _tokenize(address: str, text: str) -> list[int]:
    body = json.dumps({"content": text, "add_special": False, "parse_special": True}).encode()
    request = urllib.request.Request(
        address + "/tokenize", body, {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request) as answer:
        return json.load(answer)["tokens"]


def train(spm: bool, merges: int) -> dict[str, Any]:
    """Train merges over whole texts, spaces and line ends included; return GGUF metadata."""
    tokenizer = Tokenizer(models.BPE())
    if spm:
        tokenizer.normalizer = normalizers.Replace(" ", "\u2581")
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.decoder = decoders.ByteLevel()
    alphabet = [] if spm else pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=merges, initial_alphabet=sorted(alphabet), show_progress=False
    )
    texts = (text for name, text in TEXTS.items() if not name.startswith("specials"))
    tokenizer.train_from_iterator(texts, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    learned = sorted(model["vocab"], key=model["vocab"].__getitem__)
    return _spm(learned) if spm else _bpe(learned, model["merges"])


def _bpe(learned: list[str], merges: Iterable[list[str]]) -> dict[str, Any]:
    return {
        "model": "gpt2",
        "tokens": SPECIALS + learned,
        "token_type": [UNKNOWN] + [CONTROL] * (len(SPECIALS) - 1) + [NORMAL] * len(learned),
        "merges": [" ".join(pair) for pair in merges],
    }


def _spm(learned: list[str]) -> dict[str, Any]:
    singles = [token for token in learned if len(token) == 1]
    unions = [token for token in learned if len(token) > 1]
    user = ["\n\n", "<|user|>"]
    byte = [f"<0x{value:02X}>" for value in range(256)]
    # Some letters are left out, so that byte tokens are needed; as in SentencePiece, every
    # letter of a longer token is a token.
    singles = [token for token in singles if token.isascii() or ord(token) % 3 or token == "\u2581"]
    known = set(singles)
    unions = [token for token in unions if token not in user and known.issuperset(token)]
    rest = user + unions + singles
    return {
        "model": "llama",
        "tokens": SPECIALS + byte + rest,
        "token_type": [UNKNOWN]
        + [CONTROL] * (len(SPECIALS) - 1)
        + [BYTE] * 256
        + [USER] * len(user)
        + [NORMAL] * (len(unions) + len(singles)),
        "scores": [0.0] * (len(SPECIALS) + 256 + len(user))
        + [-float(rank) for rank in range(len(unions) + len(singles))],
    }


def write_tiny(meta: dict[str, Any], pre: str, path: Path, prefix: bool = False) -> None:
    """Write a llama model of one layer with this tokenizer; its weights mean nothing."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(256)
    writer.add_embedding_length(32)
    writer.add_block_count(1)
    writer.add_feed_forward_length(32)
    writer.add_head_count(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model(meta["model"])
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(meta["tokens"])
    writer.add_token_types(meta["token_type"])
    if "merges" in meta:
        writer.add_token_merges(meta["merges"])
    if "scores" in meta:
        writer.add_token_scores(meta["scores"])
    writer.add_add_space_prefix(prefix)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    square, table = np.eye(32, dtype=np.float32), np.ones((len(meta["tokens"]), 32), np.float32)
    shapes = {"token_embd": table, "output": table, "output_norm": square[0]}
    shapes |= {f"blk.0.{name}": square for name in ("attn_q", "attn_k", "attn_v", "attn_output")}
    shapes |= {f"blk.0.{name}": square for name in ("ffn_gate", "ffn_up", "ffn_down")}
    shapes |= {f"blk.0.{name}": square[0] for name in ("attn_norm", "ffn_norm")}
    for name, value in shapes.items():
        writer.add_tensor(f"{name}.weight", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def tiny_ids(meta: dict[str, Any], pre: str, prefix: bool = False) -> dict[str, list[int]]:
    """Return the ids of all texts under one kind of pre-tokenizer."""
    texts = {k: unicodedata.normalize("NFC", t) if pre in NFC else t for k, t in TEXTS.items()}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tiny.gguf"
        write_tiny(meta, pre, path, prefix)
        return reference_ids(path, texts)


def save(name: str, document: dict[str, Any]) -> None:
    """Write one golden file: one line per top-level entry."""
    version = importlib.metadata.version("xllamacpp")
    rows = {"reference": f"llama.cpp, xllamacpp {version}"} | document
    lines = (f"{json.dumps(k)}: {json.dumps(v, separators=(',', ':'))}" for k, v in rows.items())
    (HERE / name).write_text("{" + ",\n".join(lines) + "}\n", "utf-8")


def main() -> None:
    """Write every golden file that the arguments allow."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smollm2", type=Path)
    parser.add_argument("--gemma3", type=Path)
    args = parser.parse_args()
    for name in ("smollm2", "gemma3"):
        path = getattr(args, name)
        if path:
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            save(f"{name}.json", {"sha256": digest, "ids": reference_ids(path, TEXTS)})
    meta = train(spm=False, merges=900)
    save("tiny_bpe.json", {"gguf": meta, "ids": {pre: tiny_ids(meta, pre) for pre in PRE}})
    meta = train(spm=True, merges=1100)
    kinds = {"prefix": True, "plain": False}
    ids = {kind: tiny_ids(meta, "default", prefix) for kind, prefix in kinds.items()}
    save("tiny_spm.json", {"gguf": meta, "ids": ids})


if __name__ == "__main__":
    main()
