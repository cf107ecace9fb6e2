"""Turn a stream of token ids into text without ever splitting a character.

A tokenizer file lists decoder steps (byte-level, byte fallback, metaspace, ...). Each known step
has a streaming form here, so a token costs a few microseconds whatever the length of the text, and
the pieces put together are what `Tokenizer.decode` gives for the whole. A decoder with an unknown
step is served by decoding a short window again at every token.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable
from typing import Any, Protocol

import tokenizers

_REPLACEMENT = "\ufffd"
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>\Z")
_WINDOW = 16


class Step(Protocol):
    """One streaming decoder step: pieces in, pieces out."""

    def push(self, piece: str) -> list[str]:
        """Take one piece and return what has become certain."""
        ...

    def finish(self) -> list[str]:
        """Return the rest; the stream has ended."""
        ...


class DetokenizerRules:
    """What the detokenizers of one tokenizer share: token texts, special ids, decoder steps.

    Args:
        backend: the loaded tokenizer.
    """

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        self.backend = backend
        self._pieces: dict[int, str | None] = {}
        added = backend.get_added_tokens_decoder().values()
        self._special = {token.content for token in added if token.special}
        self._makers = _step_makers(backend.decoder)

    def piece(self, token: int) -> str | None:
        """The raw text of a token, or None for special and unknown ids, which show as nothing."""
        try:
            return self._pieces[token]
        except KeyError:
            piece = self.backend.id_to_token(token)
            self._pieces[token] = piece = None if piece in self._special else piece
            return piece

    def steps(self) -> list[Step] | None:
        """Fresh decoder steps, or None if a step of this tokenizer has no streaming form."""
        return None if self._makers is None else [make() for make in self._makers]


class StreamingDetokenizer:
    """Text of a growing list of ids; special tokens show as nothing.

    Args:
        rules: from `Tokenizer.detokenizer_rules`.
    """

    def __init__(self, rules: DetokenizerRules) -> None:
        self._piece = rules.piece
        steps = rules.steps()
        self._steps: list[Step] = [_Window(rules.backend)] if steps is None else steps
        self._is_window = steps is None
        self._only = self._steps[0] if len(self._steps) == 1 else None

    def push(self, token: int) -> str:
        """Take the next id and return the text that has become certain, possibly none."""
        piece = self._piece(token)
        if piece is None:
            return ""
        if self._is_window:
            piece = str(token)
        if self._only is not None:
            return "".join(self._only.push(piece))
        pieces = [piece]
        for step in self._steps:
            pieces = [out for each in pieces for out in step.push(each)]
        return "".join(pieces)

    def finish(self) -> str:
        """Return the rest: bytes of an unfinished character show as U+FFFD, as in a full decode."""
        pieces: list[str] = []
        for step in self._steps:
            pieces = [out for each in pieces for out in step.push(each)] + step.finish()
        return "".join(pieces)


class _ByteLevel:
    """Characters that stand for bytes (GPT-2), decoded as UTF-8."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, piece: str) -> list[str]:
        try:
            data = bytes([_CHAR_TO_BYTE[c] for c in piece])
        except KeyError:
            data = piece.encode()
        return [self._decoder.decode(data)]

    def finish(self) -> list[str]:
        return [self._decoder.decode(b"", final=True)]


class _ByteFallback:
    """Runs of tokens like ``<0xE2>``, held until the run ends.

    The reference shows every byte of a run as U+FFFD if the run as a whole is not UTF-8, so no
    part of a run is certain before its end.
    """

    def __init__(self) -> None:
        self._run = bytearray()

    def push(self, piece: str) -> list[str]:
        if match := _BYTE_TOKEN.match(piece):
            self._run.append(int(match[1], 16))
            return []
        return [*self.finish(), piece] if self._run else [piece]

    def finish(self) -> list[str]:
        run, self._run = bytes(self._run), bytearray()
        try:
            return [run.decode()] if run else []
        except UnicodeDecodeError:
            return [_REPLACEMENT * len(run)]


class _Replace:
    """A literal replacement within each token."""

    def __init__(self, pattern: str, content: str) -> None:
        self._pattern, self._content = pattern, content

    def push(self, piece: str) -> list[str]:
        return [piece.replace(self._pattern, self._content)]

    def finish(self) -> list[str]:
        return []


class _Metaspace:
    """Replacement characters become spaces; the one that leads the text may be dropped."""

    def __init__(self, replacement: str, drops_first: bool) -> None:
        self._replacement, self._drops = replacement, drops_first

    def push(self, piece: str) -> list[str]:
        space, self._drops = "" if self._drops else " ", False
        return [piece.replace(self._replacement, space)]

    def finish(self) -> list[str]:
        return []


class _StripStart:
    """Drop up to `count` leading characters `content`, of each token or of the whole text."""

    def __init__(self, content: str, count: int, whole: bool) -> None:
        self._content, self._count, self._whole = content, count, whole
        self._left = count

    def push(self, piece: str) -> list[str]:
        left = self._left if self._whole else self._count
        cut = 0
        while cut < min(left, len(piece)) and piece[cut] == self._content:
            cut += 1
        if cut == len(piece):
            self._left -= cut
        else:
            self._left = 0
        return [piece[cut:]]

    def finish(self) -> list[str]:
        return []


class _Join:
    """No decoder: tokens with spaces between them."""

    def __init__(self) -> None:
        self._started = False

    def push(self, piece: str) -> list[str]:
        piece = " " + piece if self._started else piece
        self._started = True
        return [piece]

    def finish(self) -> list[str]:
        return []


class _Window:
    """Any decoder: decode a short window of ids again, show what no longer changes.

    Args:
        backend: the tokenizer; pieces are ids as text.
    """

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        self._decode = backend.decode
        self._ids: list[int] = []
        self._shown = ""

    def push(self, piece: str) -> list[str]:
        self._ids.append(int(piece))
        text = self._decode(self._ids)
        if text.endswith(_REPLACEMENT) or not text.startswith(self._shown):
            return []
        new, self._shown = text[len(self._shown) :], text
        if len(self._ids) > _WINDOW:
            self._ids = self._ids[-_WINDOW // 2 :]
            self._shown = self._decode(self._ids)
        return [new]

    def finish(self) -> list[str]:
        text = self._decode(self._ids)
        return [text[len(self._shown) :]] if text.startswith(self._shown) else []


def _step_makers(decoder: Any) -> list[Callable[[], Step]] | None:
    """One maker per step of the decoder, or None if one of them cannot be streamed."""
    if decoder is None:
        return [_Join]
    config = json.loads(decoder.__getstate__())
    rows = config["decoders"] if config["type"] == "Sequence" else [config]
    makers: list[Callable[[], Step]] = []
    fused = False
    for row in rows:
        if row["type"] == "Fuse":
            fused = True
            continue
        maker = _ROWS.get(row["type"], lambda row, fused: None)(row, fused)
        if maker is None:
            return None
        makers.append(maker)
        fused = fused or row["type"] == "ByteLevel"
    return makers


def _replace_maker(row: dict[str, Any], fused: bool) -> Callable[[], Step] | None:
    pattern = row["pattern"].get("String")
    # After a join a longer pattern could lie across two pieces.
    if not pattern or (fused and len(pattern) > 1):
        return None
    return lambda: _Replace(pattern, row["content"])


def _metaspace_maker(row: dict[str, Any], fused: bool) -> Callable[[], Step]:
    return lambda: _Metaspace(row["replacement"], row.get("prepend_scheme", "always") != "never")


def _strip_maker(row: dict[str, Any], fused: bool) -> Callable[[], Step] | None:
    if row["stop"]:
        return None
    return lambda: _StripStart(row["content"], row["start"], fused)


_ROWS: dict[str, Callable[[dict[str, Any], bool], Callable[[], Step] | None]] = {
    "ByteLevel": lambda row, fused: None if fused else _ByteLevel,
    "ByteFallback": lambda row, fused: None if fused else _ByteFallback,
    "Replace": _replace_maker,
    "Metaspace": _metaspace_maker,
    "Strip": _strip_maker,
}


def _char_to_byte() -> dict[str, int]:
    """The GPT-2 table of printable characters that stand for the 256 bytes."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in set(plain)]
    table = {chr(b): b for b in plain}
    return table | {chr(256 + i): b for i, b in enumerate(others)}


_CHAR_TO_BYTE = _char_to_byte()
