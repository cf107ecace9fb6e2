"""How each kind of GGUF tokenizer cuts text before merging: rows of data for `tokenizer.json`.

A GGUF file names its kind in `tokenizer.ggml.model` (the algorithm) and `tokenizer.ggml.pre` (the
cut); the patterns themselves are knowledge of the reader. Each row here gives the same cuts as
llama.cpp, which the golden texts under `tests/golden` check.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

_Json = dict[str, Any]

_GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_WORDS_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{digits}"
    r"| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True)
class PreTokenizer:
    """One way to cut text for byte-level BPE.

    Attributes:
        steps: pre-tokenizers of `tokenizer.json`, applied in order.
        normalizer: applied before; None leaves the text as it is.
        ignore_merges: a piece that is a token as a whole is taken without merging.
    """

    steps: tuple[_Json, ...]
    normalizer: _Json | None = None
    ignore_merges: bool = False


def _split(pattern: str) -> _Json:
    return {
        "type": "Split",
        "pattern": {"Regex": pattern},
        "behavior": "Isolated",
        "invert": False,
    }


def byte_level(use_regex: bool) -> _Json:
    """Return the ByteLevel step (or decoder): bytes as printable characters, as in GPT-2."""
    return {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": use_regex,
    }


_GPT2 = PreTokenizer((byte_level(use_regex=True),))
_LLAMA3 = PreTokenizer(
    (_split(_WORDS_PATTERN.format(digits="{1,3}")), byte_level(use_regex=False)),
    ignore_merges=True,
)
# A converter writes "default" when it did not recognise the tokenizer.
_DEFAULT = PreTokenizer(
    (
        _split(r"[\p{P}\$\+<=>\^~\|]+"),
        _split(_GPT2_PATTERN),
        _split(r"\p{N}+"),
        _split(r"[0-9][0-9][0-9]"),
        byte_level(use_regex=False),
    )
)

PRE_TOKENIZERS: dict[str, PreTokenizer] = {
    "smollm": PreTokenizer(
        ({"type": "Digits", "individual_digits": True}, byte_level(use_regex=True))
    ),
    "qwen2": PreTokenizer(
        (_split(_WORDS_PATTERN.format(digits="")), byte_level(use_regex=False)),
        normalizer={"type": "NFC"},
    ),
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "gpt-2": _GPT2,
    "default": _DEFAULT,
}
