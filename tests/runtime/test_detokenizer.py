import fakes
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders

from forerun.runtime.detokenizer import DetokenizerRules, StreamingDetokenizer

REPLACE, FALLBACK, FUSE = decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()
BACKENDS = {
    "byte level": fakes.byte_level_backend(),
    "gemma": fakes.spm_backend(),
    "llama": fakes.spm_backend(
        decoders.Sequence([REPLACE, FALLBACK, FUSE, decoders.Strip(" ", 1, 0)])
    ),
    "strip each": fakes.spm_backend(
        decoders.Sequence([REPLACE, decoders.Strip(" ", 1, 0), FALLBACK, FUSE])
    ),
    "metaspace": fakes.spm_backend(decoders.Metaspace()),
    "metaspace, no prefix": fakes.spm_backend(decoders.Metaspace(prepend_scheme="never")),
    "fallback, metaspace": fakes.spm_backend(decoders.Sequence([FALLBACK, decoders.Metaspace()])),
}
NO_DECODER = fakes.spm_backend()
NO_DECODER.decoder = None  # type: ignore[assignment]
BACKENDS["none"] = NO_DECODER
RULES = {name: DetokenizerRules(backend) for name, backend in BACKENDS.items()}


def pieces_of(rules, ids):
    stream = StreamingDetokenizer(rules)
    return [*(stream.push(i) for i in ids), stream.finish()]


@pytest.mark.parametrize("name", BACKENDS)
def test_every_known_decoder_is_streamed_by_its_steps(name):
    assert RULES[name].steps() is not None


@pytest.mark.parametrize("name", BACKENDS)
@given(data=st.data())
def test_pieces_put_together_are_the_decoded_whole(name, data):
    backend = BACKENDS[name]
    size = backend.get_vocab_size()
    # Up to 3 ids past the vocabulary: models pad theirs.
    ids = data.draw(st.lists(st.integers(0, size + 2), max_size=30))
    assert "".join(pieces_of(RULES[name], ids)) == backend.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("name", ["byte level", "gemma", "llama"])
@given(text=st.text(max_size=40))
def test_text_comes_back_and_no_piece_holds_a_partial_character(name, text):
    backend = BACKENDS[name]
    ids = backend.encode(text, add_special_tokens=False).ids
    pieces = pieces_of(RULES[name], ids)
    whole = backend.decode(ids)
    assert "".join(pieces) == whole
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)


def test_a_character_appears_with_its_last_byte():
    backend = BACKENDS["byte level"]
    ids = backend.encode("é😀!").ids
    pieces = pieces_of(RULES["byte level"], ids)
    assert [piece for piece in pieces if piece] == ["é", "😀", "!"]


def test_unfinished_bytes_show_at_the_end_only():
    backend = BACKENDS["byte level"]
    ids = backend.encode("a😀").ids[:-1]
    assert pieces_of(RULES["byte level"], ids) == ["a", "", "\ufffd"]


def test_a_decoder_without_streaming_steps_is_decoded_in_windows():
    backend = fakes.spm_backend(
        decoders.Sequence([REPLACE, FALLBACK, FUSE, decoders.Strip(" ", 0, 1)])
    )
    rules = DetokenizerRules(backend)
    assert rules.steps() is None
    ids = backend.encode("hello hell a é b " * 20 + "€.", add_special_tokens=False).ids
    assert "".join(pieces_of(rules, ids)) == backend.decode(ids)


def test_push_does_not_slow_down_with_length(monkeypatch):
    rules = RULES["byte level"]
    # Nothing is decoded again: the backend is not even asked.
    stream = StreamingDetokenizer(rules)
    for token in (70, 71, 72):
        stream.push(token)
    monkeypatch.setattr(rules, "backend", None)
    assert "".join(stream.push(i % 3 + 70) for i in range(1000))
