"""The texts that quality is measured on, and how they are cut into pieces of token ids.

Measurements read a text from its beginning, calibration from its end, and neither goes beyond its
own part, so that nothing is measured on text it was calibrated on. `CORPUS.md` names the sources.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from forerun.errors import OptionError
from forerun.runtime.manifest import inside

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from forerun.runtime.manifest import Manifest

CORPUS = ("corpus_prose.txt", "corpus_reference.txt")
TEXTS = {"prose": CORPUS[0], "reference": CORPUS[1], "code": "corpus_code.txt"}
"""Kinds of text that `evaluate` reads; the gate and calibration read `CORPUS`."""

# The rest of each text is for calibration.
_MEASURED_SHARE = 2 / 3
# More characters a token than any text here has.
CHARS_PER_TOKEN = 8
MAX_TEXT_BYTES = 64 << 20


@dataclass(frozen=True)
class Piece:
    """Token ids that are read from an empty cache, and which of them are judged.

    Attributes:
        kind: of the text.
        ids: int64 [T].
        first: number of the first row whose prediction of the next token counts.
    """

    kind: str
    ids: np.ndarray
    first: int = 0

    @property
    def judged(self) -> int:
        """Rows that count; the last one predicts what the piece does not hold."""
        return len(self.ids) - 1 - self.first


def load_tokenizer(manifest: Manifest, folder: Path) -> Tokenizer:
    """Open a bundle's tokenizer."""
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(inside(folder, manifest.tokenizer.file)))


def corpus_text(name: str) -> str:
    """Read a built-in text by the name of its file."""
    return resources.files("forerun.quant").joinpath(name).read_text(encoding="utf-8")


def measured_part(text: str) -> str:
    """Return the part of a text that calibration leaves alone."""
    return text[: int(len(text) * _MEASURED_SHARE)]


def corpus_pieces(
    manifest: Manifest,
    folder: Path,
    context: int,
    max_tokens: int,
    from_end: bool = False,
    texts: tuple[str, ...] = CORPUS,
) -> list[np.ndarray]:
    """Cut built-in texts into pieces of `context` tokens, beginning with the BOS if used.

    Args:
        manifest: of the bundle whose tokenizer is used.
        folder: of that bundle.
        context: tokens of a piece.
        max_tokens: of all pieces, as much of each text.
        from_end: take the ends of the texts, for calibration, not their beginnings.
        texts: names of the files.

    Raises:
        OptionError: no text has that many tokens.
    """
    tokenizer, bos = load_tokenizer(manifest, folder), bos_ids(manifest)
    width = context - len(bos)
    budget = max(1, max_tokens // context // len(texts))
    room = budget * width * CHARS_PER_TOKEN
    pieces: list[np.ndarray] = []
    for name in texts:
        text = corpus_text(name)
        border = len(measured_part(text))
        text = text[border:][-room:] if from_end else text[:border][:room]
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        ids = ids[-budget * width :] if from_end else ids
        pieces += _cut(ids, bos, width, budget)
    if not pieces:
        raise OptionError(
            f"the built-in text has fewer than {context} tokens in this tokenizer; "
            "give a smaller context"
        )
    return pieces


def measured_ids(manifest: Manifest, folder: Path, text: Path | None = None) -> dict[str, list]:
    """Token ids of the texts that `evaluate` reads, by kind, without BOS.

    Args:
        manifest: of the bundle whose tokenizer is used.
        folder: of that bundle.
        text: a file of the user's that is read in place of the built-in texts.

    Raises:
        OptionError: the file is missing, too large, not UTF-8, empty, or not text.
    """
    tokenizer = load_tokenizer(manifest, folder)
    if text is None:
        texts = {kind: measured_part(corpus_text(name)) for kind, name in TEXTS.items()}
    else:
        texts = {"text": read_text(text)}
    return {k: tokenizer.encode(t, add_special_tokens=False).ids for k, t in texts.items()}


def measured_pieces(
    ids: dict[str, list], bos: list[int], contexts: tuple[int, ...], max_tokens: int
) -> list[Piece]:
    """Cut texts into pieces of several lengths, whose second halves are judged.

    So every judged token has at least half a context before it, and the figures of a long
    context are of what only a long context shows.

    Args:
        ids: of each kind of text.
        bos: ids that begin every piece.
        contexts: tokens of a piece.
        max_tokens: of all pieces, as much for each context and each kind.

    Raises:
        OptionError: a text has fewer tokens than a context.
    """
    pieces: list[Piece] = []
    for context in contexts:
        width = context - len(bos)
        budget = max(1, max_tokens // context // (len(contexts) * len(ids)))
        for kind, found in ids.items():
            cuts = _cut(found, bos, width, budget)
            if not cuts:
                raise OptionError(
                    f"the text {kind!r} has {len(found)} tokens, fewer than the context of "
                    f"{context}; give a smaller --context or a longer text"
                )
            pieces += [Piece(kind, cut, context // 2) for cut in cuts]
    return pieces


def read_text(path: Path) -> str:
    """Read a text file of the user's.

    Raises:
        OptionError: it is missing, too large, not UTF-8, empty, or not text.
    """
    try:
        data = _read_bounded(path)
        text = data.decode("utf-8")
    except OSError as error:
        raise OptionError(f"{path} cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise OptionError(f"{path} is not UTF-8 text (byte {error.start}); convert it") from None
    if not text.strip():
        raise OptionError(f"{path} is empty; the measure needs at least one context of text")
    if "\0" in text:
        raise OptionError(f"{path} is not text: it holds zero bytes")
    return text


def _read_bounded(path: Path) -> bytes:
    with open(path, "rb") as stream:
        data = stream.read(MAX_TEXT_BYTES + 1)
    if len(data) > MAX_TEXT_BYTES:
        raise OptionError(f"{path} has over {MAX_TEXT_BYTES >> 20} MiB; a part of it is enough")
    return data


def bos_ids(manifest: Manifest) -> list[int]:
    """Ids that begin a text of this model: its BOS, or nothing."""
    bos = manifest.tokenizer.bos
    return [bos] if manifest.tokenizer.add_bos and bos is not None else []


def _cut(ids: list[int], bos: list[int], width: int, budget: int) -> list[np.ndarray]:
    starts = range(0, len(ids) - width + 1, width)[:budget]
    return [np.array(bos + ids[start : start + width], np.int64) for start in starts]
