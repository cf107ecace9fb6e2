"""The whole text runtime on a tiny bundle with a real graph, run by ONNX Runtime."""

import pytest
import tiny

from forerun.errors import (
    BundleError,
    BusyError,
    ContextLimitError,
    OptionError,
    UnsupportedError,
)
from forerun.runtime.load import load
from forerun.runtime.types import SamplingParams

WARM = SamplingParams(temperature=1.0, seed=3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.tiny_bundle("llama", tmp_path_factory.mktemp("tiny"), capacity=64)[1]


@pytest.fixture
def text(folder):
    with load(folder, threads=1) as model:
        yield model


def ids_of(events):
    return [event.token for event in events if event.token is not None]


def test_load_and_generate(text):
    events = list(text.stream("hello", max_tokens=8, logprobs=True))
    assert text.tokenizer.decode(ids_of(events)) == "".join(e.text for e in events)
    assert all(e.logprob <= 0 for e in events[:-1])
    assert events[-1].stats.session_share > 0
    with pytest.raises(UnsupportedError):
        text.chat()


@pytest.mark.parametrize("params", [SamplingParams(), WARM])
def test_reuse_and_chunks_give_the_same_tokens(text, params):
    prompt = list(range(60, 90))
    expected = ids_of(text.stream(prompt, max_tokens=12, sampling=params))
    session = text.session()
    session._chunk = 7
    list(session.generate("something else", max_tokens=9))
    assert ids_of(session.generate(prompt, max_tokens=12, sampling=params)) == expected
    half = prompt + expected[:6]
    assert ids_of(session.generate(half, max_tokens=6, sampling=params)) == expected[6:]
    assert ids_of(session.generate(prompt, max_tokens=12, sampling=params)) == expected


def test_the_context_is_a_limit(text):
    with pytest.raises(ContextLimitError):
        text.generate("x" * 65)
    events = list(text.stream("x" * 60, max_tokens=50))
    assert events[-1].finish_reason in ("context", "stop")
    events = list(text.stream("x" * 60, max_tokens=50, context="slide"))
    assert events[-1].finish_reason in ("length", "stop")


def test_a_bit_flip_in_any_file_is_refused(folder):
    names = [p for p in folder.iterdir() if p.is_file() and p.name != ".verified.json"]
    assert len(names) >= 3
    for path in names:
        data = path.read_bytes()
        for damaged in (data[:-3], bytes([data[0] ^ 1]) + data[1:]):
            path.write_bytes(damaged)
            with pytest.raises(BundleError):
                load(folder, threads=1)
        path.write_bytes(data)
    load(folder, threads=1).close()


def test_a_model_can_be_loaded_with_a_drafter(folder, text, tmp_path, monkeypatch):
    monkeypatch.setenv("FORERUN_HOME", str(tmp_path))
    prompt, options = list(range(60, 80)), {"max_tokens": 30, "stop_ids": ()}
    expected = list(text.session().generate_ids(prompt, **options))
    with load(folder, threads=1, drafter="ngram+recycle", policy="fixed:3") as drafting:
        assert list(drafting.session().generate_ids(prompt, **options)) == expected
        stats = list(drafting.stream(prompt, max_tokens=5))[-1].stats
        assert stats.schedule == "serial" and stats.speedup > 0
        assert list(drafting.stream(prompt, max_tokens=5, drafter="none"))[-1].stats.speedup == 0
    assert list((tmp_path).rglob("costs*")), "the model's step costs are kept"
    for wrong in ({"drafter": "psychic"}, {"policy": "none"}, {"schedule": "none"}):
        with pytest.raises(OptionError, match=r"must be|can be"):
            load(folder, threads=1, **{"drafter": "ngram", **wrong})
    with pytest.raises(OptionError, match="policy"):
        load(folder, threads=1, policy="whatever")
    for wrong in ("fixed:99", "fixed:", "measured:3"):
        with pytest.raises(OptionError, match="the policy is"):
            load(folder, threads=1, policy=wrong)
    with pytest.raises(UnsupportedError, match="cannot draft behind unverified text"):
        load(folder, threads=1, drafter="ngram", schedule="pearl")
    with load(folder, threads=1) as plain:
        assert list(plain.session().generate_ids(prompt, drafter="recycle", **options)) == expected
        first = plain.stream(prompt, max_tokens=5)
        next(first)
        with pytest.raises(BusyError):
            plain.stream(prompt, drafter="ngram")
