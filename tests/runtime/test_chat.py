import dataclasses

import fakes
import pytest

from forerun.errors import ContextLimitError, OptionError, PromptError, TemplateError
from forerun.runtime.chat import Chat
from forerun.runtime.session import Session
from forerun.runtime.types import SamplingParams

WARM = SamplingParams(temperature=1.0, seed=5)
ALTERNATE = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{% endfor %}" + fakes.CHATML
)


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bundle")
    return fakes.make_tokenizer(folder, capacity=200, eos=(fakes.EOS, fakes.END))


@pytest.fixture
def make(parts):
    manifest, tokenizer = parts

    def build(template=fakes.CHATML, capacity=200, runner_options=None, **options):
        kv = dataclasses.replace(manifest.kv, capacity=capacity)
        runner_options = runner_options or {"never": (fakes.EOS, fakes.END)}
        runner = fakes.FakeRunner(dataclasses.replace(manifest, kv=kv), **runner_options)
        return Chat(Session(runner, tokenizer), template, **options), runner

    return build


def say(chat, text, **options):
    return "".join(event.text for event in chat.say(text, **options))


def test_a_conversation_is_remembered(make):
    chat, _ = make(system="Be brief.")
    first = say(chat, "hello", max_tokens=5)
    second = say(chat, "more", max_tokens=5)
    assert chat.messages == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": first},
        {"role": "user", "content": "more"},
        {"role": "assistant", "content": second},
    ]


def test_earlier_turns_are_not_read_again(make):
    chat, runner = make()
    say(chat, "hello", max_tokens=6, sampling=WARM)
    runner.steps.clear()
    said = len(chat.session.tokens)
    events = list(chat.say("again", max_tokens=1))
    assert events[-1].stats.cached_tokens == said - 1
    # Last token of the answer, end of turn, the new turn.
    assert runner.steps == [events[-1].stats.prompt_tokens - said + 1]


@pytest.mark.parametrize("seed", range(8))
def test_generated_ids_are_kept_though_their_text_would_be_cut_otherwise(make, seed):
    """A random model writes tokens that the tokenizer would never choose for that text."""
    chat, _ = make()
    params = dataclasses.replace(WARM, seed=seed)
    say(chat, "hello", max_tokens=10, sampling=params)
    first = list(chat.session.tokens)
    assert chat.session.tokenizer.encode(chat._said.text, add_special=False) != first
    say(chat, "again", max_tokens=1)
    assert chat.session.tokens[: len(first)] == first


def test_after_a_stop_string_the_shown_text_is_what_counts(make, parts):
    script = dict(enumerate(parts[1].encode("a END b")))
    prompt = len(parts[1].encode("<bos><turn>user\nhi<end>\n<turn>assistant\n"))
    script = {prompt + i: t for i, t in script.items()}
    chat, _ = make(runner_options={"script": script, "never": (fakes.END,)})
    assert say(chat, "hi", stop=["END"]) == "a "
    say(chat, "again", max_tokens=1)
    text = chat.session.tokenizer.decode(chat.session.tokens)
    assert "END" not in text and chat.messages[1]["content"] == "a "


def test_a_template_that_changes_the_answer_costs_reuse_only(make):
    trimming = fakes.CHATML.replace("{{ m.content }}", "{{ m.content | trim | upper }}")
    chat, _ = make(trimming)
    say(chat, "hello", max_tokens=6, sampling=WARM)
    events = list(chat.say("again", max_tokens=3))
    assert events[-1].stats.new_tokens == 3
    rendered = chat._render(chat._messages[:-1])
    ids = chat.session.tokenizer.encode(rendered, add_special=False)
    assert chat.session.tokens[: len(ids)] == ids


def test_cancel_keeps_the_partial_answer(make):
    chat, _ = make()
    pieces = []
    for event in chat.say("hello", max_tokens=20, sampling=WARM):
        pieces.append(event.text)
        if len(pieces) == 4:
            chat.cancel()
    assert event.finish_reason == "cancelled"
    assert chat.messages[-1] == {"role": "assistant", "content": "".join(pieces)}
    assert say(chat, "go on", max_tokens=3) is not None
    assert len(chat.messages) == 4


def test_closing_the_stream_keeps_the_partial_answer(make):
    chat, _ = make()
    stream = chat.say("hello", max_tokens=20, sampling=WARM)
    said = next(stream).text + next(stream).text
    stream.close()
    assert chat.messages[-1] == {"role": "assistant", "content": said}
    say(chat, "go on", max_tokens=3)


def test_a_stream_that_is_never_started_says_nothing(make):
    chat, _ = make()
    chat.say("hello").close()
    assert chat.messages == []


def test_errors_leave_the_conversation_as_it_was(make):
    chat, _ = make(ALTERNATE, capacity=60)
    say(chat, "hello", max_tokens=2)
    before = chat.messages
    for text, options, error in [
        ("x" * 100, {}, ContextLimitError),
        (b"\xff", {}, PromptError),
        ("hi", {"max_tokens": 0}, OptionError),
    ]:
        with pytest.raises(error):
            chat.say(text, **options)
    assert chat.messages == before
    assert len(list(chat.say("ok", max_tokens=2))) == 3


def test_a_failing_step_leaves_the_conversation_as_it_was(make):
    chat, _ = make(runner_options={"fail_at": 2})
    with pytest.raises(RuntimeError):
        say(chat, "hello", max_tokens=8)
    assert chat.messages == []
    say(chat, "hello", max_tokens=8)


def test_a_full_context_is_an_error_or_the_oldest_turns_go(make):
    chat, _ = make(ALTERNATE, capacity=100)
    with pytest.raises(ContextLimitError):
        for _ in range(20):
            say(chat, "hello world", max_tokens=4)
    turns = len(chat.messages)
    say(chat, "hello world", max_tokens=4, context="slide")
    assert len(chat.messages) <= turns
    assert chat.messages[0]["role"] == "user"
    for _ in range(10):
        say(chat, "hello world", max_tokens=30, context="slide")
    with pytest.raises(ContextLimitError):
        chat.say("x" * 200, context="slide")


def test_reset_keeps_the_system_message(make):
    chat, _ = make(system="a")
    say(chat, "hello", max_tokens=2)
    chat.reset()
    assert chat.messages == [{"role": "system", "content": "a"}]
    chat.system = None
    assert chat.messages == []
    first = say(chat, "hello", max_tokens=4)
    assert first == say(make()[0], "hello", max_tokens=4)


def test_an_earlier_conversation_can_go_on(make):
    chat, _ = make()
    say(chat, "hello", max_tokens=4)
    copy, _ = make(messages=chat.messages)
    assert copy.messages == chat.messages
    say(copy, "more", max_tokens=3)
    with pytest.raises(TemplateError, match="alternate"):
        make(ALTERNATE, messages=[{"role": "assistant", "content": "x"}])


def test_a_reset_during_an_answer_forgets_it(make):
    chat, _ = make()
    stream = chat.say("hello", max_tokens=9)
    next(stream)
    chat.reset()
    chat.cancel()
    list(stream)
    assert chat.messages == []


def test_a_slide_keeps_the_system_message(make):
    chat, runner = make(capacity=80, system="Be brief.")
    list(chat.say("hello", max_tokens=120, context="slide"))
    kept = chat.session.tokenizer.encode("<bos><turn>system\nBe brief.<end>\n<turn>user\n")
    assert runner.arena.rows[: len(kept)] == kept


def test_ctrl_c_in_a_step_keeps_the_partial_answer(make):
    chat, runner = make()
    stream = chat.say("hello", max_tokens=9)
    said = next(stream).text

    def interrupted(ids, want="last"):
        raise KeyboardInterrupt

    chat.session._cache._step = interrupted
    with pytest.raises(KeyboardInterrupt):
        next(stream)
    assert chat.messages[-1] == {"role": "assistant", "content": said}
    chat.session._cache._step = runner.step
    say(chat, "go on", max_tokens=2)


def test_messages_are_a_copy(make):
    chat, _ = make()
    say(chat, "hello", max_tokens=2)
    chat.messages[0]["content"] = "changed"
    assert chat.messages[0]["content"] == "hello"
