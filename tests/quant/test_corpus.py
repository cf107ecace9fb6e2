"""The texts of the measure: what they are, and that no one is measured on what calibrated it."""

import hashlib
import re
import tomllib
from pathlib import Path

import numpy as np
import pytest
from tiny import edit_manifest, tiny_bundle

import forerun.quant
from forerun.errors import OptionError
from forerun.quant import corpus
from forerun.quant.calibration import calibration_pieces
from forerun.quant.corpus import CORPUS, TEXTS, corpus_pieces, corpus_text, measured_part
from forerun.runtime.manifest import load_manifest

ROOM = Path(forerun.quant.__file__).parent


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return tiny_bundle("llama", tmp_path_factory.mktemp("corpus"))[1]


def pieces_of(bundle, *args, **kwargs):
    return corpus_pieces(load_manifest(bundle), bundle, *args, **kwargs)


def byte_of_ids():
    """The byte of each id of the tests' tokenizer, in which a byte is one token."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    chars = {chr(b): b for b in plain} | {chr(256 + n): b for n, b in enumerate(others)}
    return [chars[char] for char in sorted(chars)]


BYTES = byte_of_ids()


def text_of(pieces):
    """The bytes of the text that pieces are of."""
    return bytes(BYTES[i] for piece in pieces for i in piece if i < 256)


@pytest.mark.parametrize("name", TEXTS.values())
def test_every_text_is_named_with_its_size_and_hash(name):
    card = (ROOM / "CORPUS.md").read_text("utf-8")
    data = (ROOM / name).read_bytes()
    assert hashlib.sha256(data).hexdigest() in card
    assert re.search(rf"`{name}` \| {len(data):,} \|.*public domain", card)


def test_the_texts_are_a_few_hundred_kilobytes_of_three_kinds():
    sizes = {kind: len(corpus_text(name)) for kind, name in TEXTS.items()}
    assert list(sizes) == ["prose", "reference", "code"]
    assert 200_000 < sum(sizes.values()) < 500_000


def test_the_gate_reads_beginnings_and_calibration_ends_of_prose_and_reference(bundle):
    texts = [corpus_text(name) for name in ("corpus_prose.txt", "corpus_reference.txt")]
    gate = pieces_of(bundle, 256, 512)
    assert [text_of([piece]) for piece in gate] == [text.encode()[:256] for text in texts]
    found = calibration_pieces(load_manifest(bundle), bundle)
    half = len(found) // 2
    ends = [text_of(found[:half]), text_of(found[half:])]
    assert ends == [text.encode()[-len(end) :] for text, end in zip(texts, ends, strict=True)]
    assert [len(end) for end in ends] == [2048, 2048]


@pytest.mark.parametrize("name", TEXTS.values())
def test_measuring_and_calibration_never_share_a_character(name, bundle):
    """Even if both ask for more than there is."""
    text = corpus_text(name)
    border = len(measured_part(text))
    parts = {False: text[:border].encode(), True: text[border:].encode()}
    assert len(parts[False]) == pytest.approx(2 * len(parts[True]), rel=0.02)
    for from_end, part in parts.items():
        found = text_of(pieces_of(bundle, 128, 10**7, from_end=from_end, texts=(name,)))
        # All of it but what is too short for one more piece.
        assert part.startswith(found) and len(part) - len(found) < 128


def test_pieces_begin_with_the_text_or_end_with_it(bundle):
    text = corpus_text("corpus_code.txt").encode()
    for from_end, expected in ((False, text[:512]), (True, text[-512:])):
        pieces = pieces_of(bundle, 64, 512, from_end, texts=("corpus_code.txt",))
        assert [len(piece) for piece in pieces] == [64] * 8
        assert text_of(pieces) == expected


def test_bos_begins_every_piece(bundle, tmp_path):
    other = tiny_bundle("llama", tmp_path)[1]
    edit_manifest(other, lambda m: m["tokenizer"].update(add_bos=True, bos=256))
    pieces = pieces_of(other, 32, 128)
    assert [(piece[0], len(piece)) for piece in pieces] == [(256, 32)] * 4
    prose = corpus_text(CORPUS[0]).encode()
    assert text_of(pieces[:2]) == prose[:62], "no character is lost between pieces"
    ids = corpus.measured_ids(load_manifest(other), other)
    found = corpus.measured_pieces(ids, [256], (32, 64), 600)
    assert {piece.kind for piece in found} == set(TEXTS)
    for piece in found:
        assert piece.ids[0] == 256 and not (piece.ids[1:] == 256).any()
        assert piece.judged == len(piece.ids) // 2 - 1


def test_second_halves_of_each_context_and_each_kind_are_judged():
    ids = {"prose": list(range(1000)), "code": list(range(1000))}
    pieces = corpus.measured_pieces(ids, [], (100, 200), 1600)
    found = {(p.kind, len(p.ids), p.first) for p in pieces}
    assert found == {(k, n, n // 2) for k in ids for n in (100, 200)}
    assert sum(len(p.ids) for p in pieces) == 1600
    first = next(p for p in pieces if len(p.ids) == 200)
    np.testing.assert_array_equal(first.ids, np.arange(200))


def test_too_short_a_text_is_refused_by_name():
    with pytest.raises(OptionError, match="'text' has 99 tokens, fewer than the context of 100"):
        corpus.measured_pieces({"text": list(range(99))}, [], (100,), 100)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "empty"),
        (b" \n ", "empty"),
        (b"abc\xff\xfe", "not UTF-8"),
        (b"PK\0\0text", "not text"),
        (None, "cannot be read"),
    ],
)
def test_a_file_that_is_no_text_is_refused(data, words, tmp_path):
    path = tmp_path / "mine.txt"
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(OptionError, match=words):
        corpus.read_text(path)


def test_a_file_that_is_too_large_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "MAX_TEXT_BYTES", 1 << 20)
    path = tmp_path / "mine.txt"
    path.write_bytes(b"a" * ((1 << 20) + 1))
    with pytest.raises(OptionError, match="over 1 MiB"):
        corpus.read_text(path)


def test_the_package_holds_the_texts_and_what_they_are():
    told = tomllib.loads((ROOM.parent / "pyproject.toml").read_text("utf-8"))
    patterns = told["tool"]["setuptools"]["package-data"]["forerun.quant"]
    found = {path.name for pattern in patterns for path in ROOM.glob(pattern)}
    assert found == {*TEXTS.values(), "CORPUS.md"}
