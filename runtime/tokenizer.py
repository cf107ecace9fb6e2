"""Text to ids and back, by the bundle's own tokenizer file."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import tokenizers

from forerun.errors import BundleError, ContextLimitError, PromptError
from forerun.runtime.detokenizer import DetokenizerRules, StreamingDetokenizer
from forerun.runtime.manifest import Manifest, inside

# Normalizers may shorten a text; none in use does so by more than this.
_NORMALIZER_MARGIN = 4
_ALWAYS_TOKENIZED_CHARS = 1 << 18


class Tokenizer:
    """The tokenizer of one bundle.

    Args:
        manifest: names the tokenizer file and the special ids.
        folder: the bundle.

    Raises:
        BundleError: the file is missing, damaged or not the one the manifest was written for.

    Attributes:
        vocab: number of token ids the model has embeddings for.
        bos: id that begins a text, or None.
        eos: ids that end an answer.
        add_bos: whether a text must begin with `bos`.
        special_ids: ids that control the model and show as no text.
    """

    def __init__(self, manifest: Manifest, folder: Path) -> None:
        info = manifest.tokenizer
        path = inside(Path(folder), info.file)
        entry = manifest.files.get(info.file)
        if entry is not None and info.sha256 and entry.sha256 != info.sha256:
            raise BundleError(
                f"{folder}: {info.file} is not the tokenizer this model was exported with; "
                "pull or export it again"
            )
        self._backend = _load(path)
        self.vocab = manifest.model.vocab
        self.bos, self.eos, self.add_bos = info.bos, info.eos, info.add_bos
        added = self._backend.get_added_tokens_decoder()
        self.special_ids = frozenset(i for i, token in added.items() if token.special)
        self.detokenizer_rules = DetokenizerRules(self._backend)

    def encode(
        self, text: str | bytes, add_special: bool = True, limit: int | None = None
    ) -> list[int]:
        """Turn text into ids.

        Args:
            text: the text; bytes must be UTF-8.
            add_special: put the begin-of-text id in front if the model wants one.
            limit: refuse texts that cannot fit into this many tokens, before tokenizing them.

        Raises:
            PromptError: the text is not UTF-8, or holds a token the model has no embedding for.
            ContextLimitError: the text is certainly longer than `limit` tokens.
        """
        text = as_text(text)
        if limit is not None and len(text) > _ALWAYS_TOKENIZED_CHARS:
            self._check_length(text, limit)
        ids = self._backend.encode(text, add_special_tokens=add_special).ids
        if add_special and self.add_bos and self.bos is not None and ids[:1] != [self.bos]:
            ids.insert(0, self.bos)
        if ids and max(ids) >= self.vocab:
            token = self._backend.id_to_token(max(ids))
            raise PromptError(f"the prompt holds the token {token!r}, which this model cannot read")
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """Turn ids into text; special ids show as nothing."""
        return self._backend.decode(list(ids), skip_special_tokens=True)

    def stream(self) -> StreamingDetokenizer:
        """A fresh detokenizer for one answer."""
        return StreamingDetokenizer(self.detokenizer_rules)

    def token_text(self, token: int | None) -> str:
        """The raw text of one token, special ones included; empty for None and unknown ids."""
        return "" if token is None else self._backend.id_to_token(token) or ""

    def _check_length(self, text: str, limit: int) -> None:
        longest = max(map(len, self._backend.get_vocab()), default=1)
        if len(text) > limit * longest * _NORMALIZER_MARGIN:
            raise ContextLimitError(
                f"the prompt has {len(text)} characters, the context holds {limit} tokens; "
                "shorten the prompt"
            )


def as_text(text: str | bytes) -> str:
    """Return text that can be encoded as UTF-8.

    Raises:
        PromptError: it is not text, or not valid Unicode.
    """
    try:
        if isinstance(text, (bytes, bytearray, memoryview)):
            return bytes(text).decode("utf-8")
        if not isinstance(text, str):
            raise PromptError(f"the prompt must be text, got {type(text).__name__}")
        text.encode("utf-8")
    except UnicodeError as error:
        reason = getattr(error, "reason", "damaged")
        raise PromptError(f"the prompt is not valid UTF-8 ({reason})") from None
    return text


def _load(path: Path) -> tokenizers.Tokenizer:
    try:
        data = path.read_bytes()
        backend = tokenizers.Tokenizer.from_buffer(data)
    except BaseException as error:
        # A damaged file can make the native parser panic, which is not an Exception.
        if isinstance(error, (KeyboardInterrupt, SystemExit, MemoryError)):
            raise
        reason = " ".join(str(error).split())[:200]
        raise BundleError(
            f"{path} is not a readable tokenizer ({reason}); pull or export it again"
        ) from None
    backend.no_truncation()
    backend.no_padding()
    return backend
