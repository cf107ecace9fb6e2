import subprocess
import sys

import fakes
import pytest

from forerun.errors import BundleError, OptionError, PromptError, UnsupportedError
from forerun.runtime.load import load
from forerun.runtime.manifest import seal
from forerun.runtime.text import Text
from forerun.runtime.types import SamplingParams


@pytest.fixture
def parts(tmp_path):
    options = {"temperature": 0.7, "top_k": 50.0, "top_p": 0.9}
    return fakes.make_tokenizer(tmp_path, capacity=100, generation=options)


@pytest.fixture
def text(parts):
    return Text(fakes.FakeRunner(parts[0]), parts[1], fakes.CHATML)


@pytest.fixture
def base(parts):
    return Text(fakes.FakeRunner(parts[0]), parts[1])


def test_generate_is_the_joined_stream(text):
    events = list(text.stream("hello", max_tokens=5))
    assert text.generate("hello", max_tokens=5) == "".join(e.text for e in events)
    assert events[-1].stats.new_tokens == 5


def test_the_chat_template_is_applied_unless_raw(text):
    list(text.stream("hi", max_tokens=1, system="s"))
    prompt = text.tokenizer.decode(text._session.tokens[:-1])
    assert prompt == "system\ns\nuser\nhi\nassistant\n"
    list(text.stream("hi", max_tokens=1, raw=True))
    assert text._session.tokens[:-1] == text.tokenizer.encode("hi")
    list(text.stream([70, 71], max_tokens=1))
    assert text._session.tokens[:-1] == [70, 71]


def test_a_base_model_continues_the_text(base):
    list(base.stream("hi", max_tokens=1))
    assert base._session.tokens[:-1] == base.tokenizer.encode("hi")
    with pytest.raises(UnsupportedError, match="base model"):
        base.chat()
    with pytest.raises(OptionError, match="system"):
        base.stream("hi", system="s")


@pytest.mark.parametrize("prompt", ["", b"", b"\xff", []])
def test_bad_prompts(text, base, prompt):
    for model in (text, base):
        with pytest.raises(PromptError):
            model.generate(prompt)
        assert model.generate("hi", max_tokens=1) is not None


def test_chat_and_sessions_share_one_model(text):
    chat = text.chat("Be brief.")
    alone = Text(text._runner.__class__(text.manifest), text.tokenizer, fakes.CHATML)
    expected = [event.token for event in alone.chat("Be brief.").say("hello", max_tokens=5)]
    list(text.stream("between", max_tokens=3))
    assert [event.token for event in chat.say("hello", max_tokens=5)] == expected
    session = text.session()
    assert list(session.generate("hello", max_tokens=2))[-1].finish_reason == "length"


def test_suggested_sampling(text, parts):
    assert text.suggested == SamplingParams(temperature=0.7, top_k=50, top_p=0.9)


def test_cancel_and_close(text):
    with text:
        stream = text.stream("hello", max_tokens=50)
        next(stream)
        text.cancel()
        assert [e.finish_reason for e in stream] == ["cancelled"]
    assert text._runner.closed


@pytest.mark.parametrize("threads", [0, -1, 1.5, "2", 10**9, True])
def test_bad_threads_are_refused_before_anything_is_read(threads):
    with pytest.raises(OptionError, match="threads"):
        load("nowhere", threads=threads)


def test_a_bundle_of_another_kind_is_refused(tmp_path, parts):
    import dataclasses

    (tmp_path / "model.onnx").write_bytes(b"x")
    seal(tmp_path, dataclasses.replace(parts[0], kind="speech"))
    with pytest.raises(UnsupportedError, match="speech"):
        load(tmp_path)


def test_a_damaged_bundle_is_refused(tmp_path, parts):
    (tmp_path / "model.onnx").write_bytes(b"x")
    seal(tmp_path, parts[0])
    (tmp_path / "tokenizer.json").write_bytes(b"{}")
    with pytest.raises(BundleError, match=r"tokenizer\.json has 2 bytes instead"):
        load(tmp_path)


def test_import_is_light():
    code = (
        "import sys, forerun, forerun.runtime.text; "
        "heavy = {'onnxruntime', 'jinja2', 'onnx', 'torch', 'forerun.export', 'forerun.quant'}; "
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
