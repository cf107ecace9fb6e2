import dataclasses

import fakes
import pytest

from forerun.errors import BundleError, ContextLimitError, PromptError
from forerun.runtime.manifest import FileEntry
from forerun.runtime.tokenizer import Tokenizer


@pytest.fixture
def tokenizer(tmp_path):
    return fakes.make_tokenizer(tmp_path)[1]


def test_encode_and_decode(tokenizer):
    ids = tokenizer.encode("hello wörld 😀")
    assert tokenizer.decode(ids) == "hello wörld 😀"
    assert tokenizer.encode(b"hello") == tokenizer.encode("hello")
    assert tokenizer.special_ids == {0, 1, 2, 3}


def test_special_tokens_in_text_become_ids_and_show_as_nothing(tokenizer):
    ids = tokenizer.encode("a<end>b")
    assert fakes.END in ids and len(ids) == 3
    assert tokenizer.decode(ids) == "ab"
    assert tokenizer.token_text(fakes.END) == "<end>"
    assert tokenizer.token_text(None) == tokenizer.token_text(10**6) == ""


def test_begin_of_text_is_put_in_front_once(tmp_path):
    _, tokenizer = fakes.make_tokenizer(tmp_path, add_bos=True)
    plain = tokenizer.encode("hi", add_special=False)
    assert tokenizer.encode("hi") == [fakes.BOS, *plain]
    assert tokenizer.encode("<bos>hi") == [fakes.BOS, *plain]


@pytest.mark.parametrize("bad", [b"\xff\xfe", b"a\xe2\x82", "\ud800", "a\udfff"])
def test_text_that_is_not_utf8_is_refused(tokenizer, bad):
    with pytest.raises(PromptError, match="UTF-8"):
        tokenizer.encode(bad)


def test_only_text_is_encoded(tokenizer):
    with pytest.raises(PromptError, match="must be text"):
        tokenizer.encode(17)


def test_zero_bytes_and_odd_characters_are_text(tokenizer):
    text = "\x00\u200b\ufeff\U0010ffff\r\n"
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_tokens_without_embedding_are_refused(tmp_path):
    _, full = fakes.make_tokenizer(tmp_path)
    _, small = fakes.make_tokenizer(tmp_path, vocab=full.vocab - 1)
    with pytest.raises(PromptError, match="<tool é>"):
        small.encode("a <tool é>")


def test_a_hopelessly_long_text_is_refused_before_it_is_tokenized(tokenizer):
    with pytest.raises(ContextLimitError, match="characters"):
        tokenizer.encode("a" * 20_000_000, limit=100)
    assert len(tokenizer.encode("a" * 300_000, limit=300_000)) == 300_000


@pytest.mark.parametrize("cut", [0, 1, 100, 2000])
def test_a_truncated_file_is_a_bundle_error(tmp_path, cut):
    manifest, _ = fakes.make_tokenizer(tmp_path)
    path = tmp_path / "tokenizer.json"
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(BundleError, match="not a readable tokenizer"):
        Tokenizer(manifest, tmp_path)


def test_a_missing_or_foreign_file_is_a_bundle_error(tmp_path):
    manifest, _ = fakes.make_tokenizer(tmp_path)
    with pytest.raises(BundleError):
        Tokenizer(manifest, tmp_path / "nowhere")
    files = {"tokenizer.json": FileEntry(1, "0" * 64)}
    with pytest.raises(BundleError, match="not the tokenizer"):
        Tokenizer(dataclasses.replace(manifest, files=files), tmp_path)


def test_a_path_outside_the_bundle_is_refused(tmp_path):
    manifest = fakes.make_manifest(tokenizer="../tokenizer.json")
    with pytest.raises(BundleError, match="leaves the bundle"):
        Tokenizer(manifest, tmp_path)


def test_truncation_in_the_file_is_ignored(tmp_path):
    backend = fakes.byte_level_backend()
    backend.enable_truncation(3)
    _, tokenizer = fakes.make_tokenizer(tmp_path, backend)
    assert tokenizer.decode(tokenizer.encode("a long text")) == "a long text"
