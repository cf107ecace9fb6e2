"""The texts of the measure: what they are, and that no one is measured on what calibrated it."""

import hashlib
import re
from pathlib import Path

import numpy as np
import pytest
from tiny import edit_manifest, tiny_bundle

import forerun.quant
from forerun.errors import OptionError
from forerun.quant import corpus
from forerun.quant.corpus import CORPUS, TEXTS, corpus_pieces, corpus_text, measured_part
from forerun.runtime.manifest import load_manifest

ROOM = Path(forerun.quant.__file__).parent


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return tiny_bundle("llama", tmp_path_factory.mktemp("corpus"))[1]


def pieces_of(bundle, *args, **kwargs):
    return corpus_pieces(load_manifest(bundle), bundle, *args, **kwargs)


def text_of(ids):
    return bytes(int(i) for i in ids if i < 256)


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


def test_the_gate_and_calibration_read_what_they_always_did():
    assert CORPUS == ("corpus_prose.txt", "corpus_reference.txt")


def test_measuring_and_calibration_never_share_a_character(bundle):
    """Even if both ask for more than there is."""
    for name in TEXTS.values():
        text = corpus_text(name)
        measured = pieces_of(bundle, 128, 10**7, texts=(name,))
        calibrated = pieces_of(bundle, 128, 10**7, from_end=True, texts=(name,))
        border = len(measured_part(text))
        assert sum(map(len, measured)) <= len(text[:border].encode())
        assert sum(map(len, calibrated)) <= len(text[border:].encode())


def test_pieces_begin_with_the_text_or_end_with_it(bundle):
    begin = pieces_of(bundle, 64, 512, texts=("corpus_code.txt",))
    assert len(begin) == 8 and all(len(piece) == 64 for piece in begin)
    start = b"".join(map(text_of, begin))
    end = b"".join(map(text_of, pieces_of(bundle, 64, 512, True, texts=("corpus_code.txt",))))
    # The tests' tokenizer has a token a byte, but they are numbered otherwise.
    assert len(start) == len(end) == 512 and start != end


def test_bos_begins_every_piece(bundle, tmp_path):
    other = tiny_bundle("llama", tmp_path)[1]
    edit_manifest(other, lambda m: m["tokenizer"].update(add_bos=True, bos=256))
    for piece in pieces_of(other, 32, 128):
        assert piece[0] == 256 and len(piece) == 32
    ids = corpus.measured_ids(load_manifest(other), other)
    for piece in corpus.measured_pieces(ids, [256], (32, 64), 600):
        assert piece.ids[0] == 256 and len(piece.ids) in (32, 64)


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
