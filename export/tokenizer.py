"""The `tokenizer.json` of a bundle: taken as it is, or rebuilt from the metadata of a GGUF file.

GGUF knows two kinds that matter here: `gpt2` (byte-level BPE with a list of merges; how text is cut
before merging is in `pretokenizers.PRE_TOKENIZERS`) and `llama` (SentencePiece BPE with a score per
token, as in Gemma and Llama 2; the merges follow from the scores).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from forerun.errors import SourceError, UnsupportedError
from forerun.export.pretokenizers import PRE_TOKENIZERS, byte_level

MAX_TOKENS = 1 << 21
MAX_JSON_BYTES = 256 << 20
MAX_TOKEN_CHARS = 4096
_NORMAL, _UNKNOWN, _CONTROL, _USER, _UNUSED, _BYTE = range(1, 7)
_SPECIAL_TYPES = frozenset({_UNKNOWN, _CONTROL})
_SPACE = "\u2581"


@dataclass(frozen=True)
class TokenizerSource:
    """Where a tokenizer comes from: exactly one of the two is set.

    Attributes:
        json_path: a `tokenizer.json` of the `tokenizers` library.
        gguf: the values of the GGUF keys `tokenizer.ggml.*` without that prefix: `model`, `tokens`,
            `token_type`, and `merges` and `pre` (gpt2) or `scores` and `add_space_prefix` (llama).
    """

    json_path: Path | None = None
    gguf: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class _Vocabulary:
    tokens: list[str]
    types: list[int]
    ids: dict[str, int]


def write_tokenizer(source: TokenizerSource, out: Path) -> None:
    """Write the `tokenizer.json` of a bundle and check that the `tokenizers` library loads it.

    The file adds no begin or end token by itself when rebuilt from GGUF: the manifest says whether
    a text begins with one.

    Args:
        source: a `tokenizer.json`, which is copied byte for byte, or GGUF metadata.
        out: path of the file to write; written last, so that a failure leaves nothing.

    Raises:
        SourceError: the file or the metadata is malformed.
        UnsupportedError: no tokenizer is there, or it is of a kind that is not known here.
    """
    if source.json_path is not None:
        text = _read_json(source.json_path)
        _load(text, str(source.json_path))
    elif source.gguf is not None:
        text = _rebuild(source.gguf)
    else:
        raise UnsupportedError(
            "the source has no tokenizer.json; save one with the tokenizers library (use_fast=True)"
        )
    out.write_bytes(text.encode("utf-8"))


def _read_json(path: Path) -> str:
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise SourceError(f"{path.name} is larger than {MAX_JSON_BYTES >> 20} MiB")
        return path.read_bytes().decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SourceError(f"the tokenizer {path} cannot be read: {error}") from error


def _load(text: str, where: str) -> Any:
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_str(text)
    except Exception as error:  # the library raises plain Exception
        raise SourceError(f"{where} is not a tokenizer: {str(error)[:200]}") from error


def _rebuild(meta: Mapping[str, Any]) -> str:
    model = meta.get("model")
    builder = _BUILDERS.get(model) if isinstance(model, str) else None
    if builder is None:
        raise UnsupportedError(
            f"GGUF tokenizer model {model!r} is not known; known: {', '.join(sorted(_BUILDERS))}"
        )
    vocabulary = _vocabulary(meta)
    document = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": _added_tokens(vocabulary),
        "post_processor": None,
        **builder(meta, vocabulary),
    }
    text = json.dumps(document, ensure_ascii=False)
    tokenizer = _load(text, "the tokenizer metadata of the GGUF file")
    _check_ids(tokenizer, vocabulary)
    return text


def _check_ids(tokenizer: Any, vocabulary: _Vocabulary) -> None:
    size = tokenizer.get_vocab_size(with_added_tokens=True)
    if size != len(vocabulary.tokens):
        raise SourceError(
            f"the tokenizer has {size} tokens after it was rebuilt, the GGUF file lists "
            f"{len(vocabulary.tokens)}"
        )
    for token, number in vocabulary.ids.items():
        if tokenizer.token_to_id(token) != number:
            raise SourceError(f"token {number} ({token!r}) got another id when it was rebuilt")


def _vocabulary(meta: Mapping[str, Any]) -> _Vocabulary:
    tokens = _list(meta, "tokens", str)
    if not 0 < len(tokens) <= MAX_TOKENS:
        raise SourceError(
            f"tokenizer.ggml.tokens has {len(tokens)} entries, allowed 1..{MAX_TOKENS}"
        )
    types = _list(meta, "token_type", int) if "token_type" in meta else [_NORMAL] * len(tokens)
    if len(types) != len(tokens):
        raise SourceError(f"tokenizer.ggml has {len(tokens)} tokens but {len(types)} token types")
    ids = {token: number for number, token in enumerate(tokens)}
    if len(ids) != len(tokens):
        twice = next(token for number, token in enumerate(tokens) if ids[token] != number)
        raise SourceError(f"tokenizer.ggml.tokens has {twice!r} twice")
    for number, (token, kind) in enumerate(zip(tokens, types, strict=True)):
        if not token or len(token) > MAX_TOKEN_CHARS:
            raise SourceError(f"token {number} has {len(token)} characters")
        if not _NORMAL <= kind <= _BYTE:
            raise SourceError(f"token {number} ({token!r}) has the unknown type {kind}")
    return _Vocabulary(tokens, types, ids)


def _list(meta: Mapping[str, Any], key: str, kind: type) -> list[Any]:
    value = meta.get(key)
    if hasattr(value, "tolist"):
        value = value.tolist()  # type: ignore[union-attr]
    if not isinstance(value, Sequence) or isinstance(value, str | bytes):
        raise SourceError(f"tokenizer.ggml.{key} is missing or is not an array")
    for number, item in enumerate(value):
        if not isinstance(item, kind) or isinstance(item, bool):
            raise SourceError(f"tokenizer.ggml.{key}[{number}] is not of type {kind.__name__}")
    return list(value)


def _added_tokens(vocabulary: _Vocabulary) -> list[dict[str, Any]]:
    return [
        {
            "id": number,
            "content": token,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": kind in _SPECIAL_TYPES,
        }
        for number, (token, kind) in enumerate(
            zip(vocabulary.tokens, vocabulary.types, strict=True)
        )
        if kind in _SPECIAL_TYPES or kind == _USER
    ]


def _bpe(vocabulary: _Vocabulary, merges: list[list[str]], **options: Any) -> dict[str, Any]:
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": False,
        **options,
        "vocab": vocabulary.ids,
        "merges": merges,
    }


def _gpt2(meta: Mapping[str, Any], vocabulary: _Vocabulary) -> dict[str, Any]:
    name = meta.get("pre", "default")
    row = PRE_TOKENIZERS.get(name) if isinstance(name, str) else None
    if row is None:
        raise UnsupportedError(
            f"GGUF pre-tokenizer {name!r} is not known; known: {', '.join(sorted(PRE_TOKENIZERS))}"
        )
    merges = [_merge(rule, vocabulary.ids) for rule in _list(meta, "merges", str)]
    steps = list(row.steps)
    return {
        "normalizer": row.normalizer,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps} if steps[1:] else steps[0],
        "decoder": byte_level(use_regex=True),
        "model": _bpe(vocabulary, merges, ignore_merges=row.ignore_merges),
    }


def _merge(rule: str, ids: dict[str, int]) -> list[str]:
    pair = rule.split(" ")
    if len(pair) != 2 or not all(pair):
        raise SourceError(f"tokenizer.ggml.merges has {rule[:80]!r}, which is not two tokens")
    missing = [part for part in (*pair, "".join(pair)) if part not in ids]
    if missing:
        raise SourceError(f"the merge {rule[:80]!r} needs {missing[0]!r}, which is not a token")
    return pair


def _llama(meta: Mapping[str, Any], vocabulary: _Vocabulary) -> dict[str, Any]:
    scores = _list(meta, "scores", float)
    if len(scores) != len(vocabulary.tokens):
        raise SourceError(
            f"tokenizer.ggml has {len(vocabulary.tokens)} tokens but {len(scores)} scores"
        )
    if any(math.isnan(score) for score in scores):
        raise SourceError("tokenizer.ggml.scores has a NaN")
    prefix = bool(meta.get("add_space_prefix", True))
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
    prepend = {"type": "Prepend", "prepend": _SPACE}
    unknown = next((t for t, kind in _pairs(vocabulary) if kind == _UNKNOWN), None)
    options = {
        "unk_token": unknown,
        "fuse_unk": True,
        "byte_fallback": _has_bytes(vocabulary),
    }
    return {
        "normalizer": (
            {"type": "Sequence", "normalizers": [prepend, replace]} if prefix else replace
        ),
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": _llama_decoders(prefix)},
        "model": _bpe(vocabulary, _merges_from_scores(vocabulary, scores), **options),
    }


def _pairs(vocabulary: _Vocabulary) -> zip[tuple[str, int]]:
    return zip(vocabulary.tokens, vocabulary.types, strict=True)


def _has_bytes(vocabulary: _Vocabulary) -> bool:
    named = sum(f"<0x{value:02X}>" in vocabulary.ids for value in range(256))
    if named not in (0, 256):
        raise SourceError(f"the tokenizer has {named} of the 256 byte tokens <0x00>..<0xFF>")
    return named == 256


def _llama_decoders(prefix: bool) -> list[dict[str, Any]]:
    decoders: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if prefix:
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return decoders


def _merges_from_scores(vocabulary: _Vocabulary, scores: list[float]) -> list[list[str]]:
    """Return the merges, best first, that build each token from every two tokens it consists of.

    SentencePiece merges the neighbours whose union has the best score; BPE merges by rank. Ranking
    the unions by score gives the same ids. Within one score the order of the parts' ids decides,
    as in the converter of `transformers` (`SentencePieceExtractor`).
    """
    ids, ranked = vocabulary.ids, []
    for token, kind in _pairs(vocabulary):
        if kind != _NORMAL or len(token) < 2:
            continue
        cuts = [
            (ids[token[:cut]], ids[token[cut:]])
            for cut in range(1, len(token))
            if token[:cut] in ids and token[cut:] in ids
        ]
        ranked.extend((-scores[ids[token]], *cut) for cut in sorted(cuts))
    ranked.sort(key=lambda row: row[0])
    names = vocabulary.tokens
    return [[names[left], names[right]] for _, left, right in ranked]


_BUILDERS: dict[str, Callable[[Mapping[str, Any], _Vocabulary], dict[str, Any]]] = {
    "gpt2": _gpt2,
    "llama": _llama,
}
