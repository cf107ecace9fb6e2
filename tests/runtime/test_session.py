import dataclasses
import threading
import time

import fakes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from forerun.errors import BusyError, ContextLimitError, OptionError, PromptError, UserError
from forerun.runtime.prefix import PrefixCache
from forerun.runtime.session import Session
from forerun.runtime.types import SamplingParams

WARM = SamplingParams(temperature=1.0, seed=5)


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    return fakes.make_tokenizer(tmp_path_factory.mktemp("bundle"), capacity=48)


@pytest.fixture
def make(parts):
    """Build a session on a fake runner; keyword arguments go to the runner."""
    manifest, tokenizer = parts

    def build(capacity=48, chunk=512, **options):
        options.setdefault("never", (fakes.EOS,))
        kv = dataclasses.replace(manifest.kv, capacity=capacity)
        runner = fakes.FakeRunner(dataclasses.replace(manifest, kv=kv), **options)
        return Session(runner, tokenizer, prefill_chunk=chunk), runner

    return build


def ids_of(events):
    return [event.token for event in events if event.token is not None]


def text_of(events):
    return "".join(event.text for event in events)


def check_in_line(session, runner):
    """The arena holds the ids it is believed to hold, a prefix of the session's sequence."""
    assert session._cache.ids == runner.arena.rows
    assert session.tokens[: len(runner.arena.rows)] == runner.arena.rows
    assert not session.busy


# -- laws ----------------------------------------------------------------------


def test_streamed_text_is_the_decoded_answer(make):
    session, _ = make()
    for seed in range(30):
        events = list(
            session.generate("hello", max_tokens=20, sampling=dataclasses.replace(WARM, seed=seed))
        )
        assert text_of(events) == session.tokenizer.decode(ids_of(events))


def test_greedy_takes_the_best_token_at_every_step(make):
    session, runner = make()
    events = list(session.generate("hello", max_tokens=12))
    sequence = session.tokenizer.encode("hello")
    for token in ids_of(events):
        assert token == int(runner.logits_after(sequence).argmax())
        sequence.append(token)
    assert session.tokens == sequence


@given(st.integers(0, 2**64 - 1))
def test_same_seed_same_text(parts, seed):
    manifest, tokenizer = parts
    params = SamplingParams(temperature=1.3, top_p=0.95, seed=seed)
    texts = []
    for chunk in (512, 2):
        session = Session(fakes.FakeRunner(manifest), tokenizer, prefill_chunk=chunk)
        texts.append(ids_of(session.generate("hello w", max_tokens=10, sampling=params)))
    assert texts[0] == texts[1]


def test_another_seed_gives_another_text(make):
    session, _ = make()
    texts = {
        tuple(
            ids_of(
                session.generate(
                    "hello", max_tokens=8, sampling=dataclasses.replace(WARM, seed=seed)
                )
            )
        )
        for seed in range(5)
    }
    assert len(texts) == 5


def test_a_sampled_token_depends_on_its_position_not_on_the_call(make):
    """Stopping after n tokens and going on gives the same text as not stopping."""
    session, _ = make()
    whole = ids_of(session.generate("hello", max_tokens=12, sampling=WARM))
    first = ids_of(session.generate("hello", max_tokens=5, sampling=WARM))
    rest = ids_of(session.generate(session.tokens, max_tokens=7, sampling=WARM))
    assert first + rest == whole


PROMPTS = st.lists(st.integers(4, 90), min_size=1, max_size=30)


@given(st.lists(st.tuples(PROMPTS, st.integers(1, 8), st.integers(0, 8)), max_size=5), PROMPTS)
def test_reused_keys_and_values_change_nothing(parts, earlier, prompt):
    manifest, tokenizer = parts
    runner = fakes.FakeRunner(manifest)
    session = Session(runner, tokenizer, prefill_chunk=7)
    for ids, count, stop_after in earlier:
        generator = session.generate(ids, max_tokens=count, sampling=WARM)
        for _, _event in zip(range(stop_after), generator, strict=False):
            pass
        generator.close()
        check_in_line(session, runner)
    fresh = Session(fakes.FakeRunner(manifest), tokenizer)
    options = {"max_tokens": 6, "sampling": WARM}
    assert ids_of(session.generate(prompt, **options)) == ids_of(fresh.generate(prompt, **options))


@pytest.mark.parametrize("stop_after", range(12))
@pytest.mark.parametrize("how", ["cancel", "close"])
def test_cancel_at_any_step_leaves_a_session_like_a_fresh_one(make, stop_after, how):
    session, runner = make(chunk=2)
    generator = session.generate("hello world", max_tokens=10, sampling=WARM)
    said = []
    for _ in range(stop_after):
        said.append(next(generator))
    if how == "close":
        generator.close()
    else:
        steps = len(runner.steps)
        session.cancel()
        rest = list(generator)
        assert len(runner.steps) - steps == 0
        if rest:
            assert [e.token for e in rest] == [None]
            assert rest[0].finish_reason == "cancelled"
            assert text_of(said + rest) == session.tokenizer.decode(ids_of(said))
    if stop_after:
        check_in_line(session, runner)
    fresh, _ = make()
    more = session.tokens + session.tokenizer.encode("!")
    assert ids_of(session.generate(more, max_tokens=8)) == ids_of(
        fresh.generate(more, max_tokens=8)
    )


# -- KV reuse ------------------------------------------------------------------


def test_the_common_prefix_is_not_run_again(make):
    session, runner = make()
    list(session.generate("hello world", max_tokens=3))
    runner.steps.clear()
    events = list(session.generate([*session.tokens, 70, 71], max_tokens=1))
    # The last token of the answer was never fed; it and the two new ones run.
    assert runner.steps == [3]
    assert events[-1].stats.cached_tokens == len(session.tokens) - 1 - 3


def test_the_same_prompt_again_runs_one_row(make):
    session, runner = make()
    first = ids_of(session.generate("hello world", max_tokens=3))
    runner.steps.clear()
    assert ids_of(session.generate("hello world", max_tokens=3)) == first
    assert runner.steps == [1, 1, 1]


def test_sessions_on_one_runner_do_not_mix(make, parts):
    _, runner = make()
    cache = PrefixCache(runner)
    a, b = (Session(runner, parts[1], cache=cache) for _ in range(2))
    expected = {p: ids_of(make()[0].generate(p, max_tokens=4)) for p in ("hello", "hell no")}
    for _ in range(2):
        assert ids_of(a.generate("hello", max_tokens=4)) == expected["hello"]
        assert ids_of(b.generate("hell no", max_tokens=4)) == expected["hell no"]


# -- prefill -------------------------------------------------------------------


def test_long_prompts_are_read_in_chunks_with_progress(make):
    session, runner = make(chunk=4)
    seen = []
    prompt = list(range(10, 21))
    list(session.generate(prompt, max_tokens=1, on_prefill=lambda *a: seen.append(a)))
    assert runner.steps == [4, 4, 3]
    assert seen == [(0, 11), (4, 11), (8, 11), (11, 11)]


def test_a_cancel_during_the_prompt_takes_effect_at_the_next_chunk(make):
    session, runner = make(chunk=4)

    def on_prefill(done, total):
        if done == 4:
            session.cancel()

    events = list(session.generate(list(range(10, 21)), on_prefill=on_prefill))
    assert [e.finish_reason for e in events] == ["cancelled"]
    assert events[0].stats.new_tokens == 0
    assert runner.steps == [4]
    assert runner.arena.length == 4


def test_an_error_in_the_progress_callback_leaves_the_session_usable(make):
    session, runner = make(chunk=4)

    def broken(done, total):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        list(session.generate("hello", on_prefill=broken))
    check_in_line(session, runner)
    assert ids_of(session.generate("hello", max_tokens=2))


# -- how an answer ends --------------------------------------------------------


def test_the_stop_id_ends_the_answer_and_is_not_part_of_it(make):
    session, _ = make(script={3: 75, 4: 76, 5: fakes.EOS})
    events = list(session.generate([10, 11, 12], max_tokens=9))
    assert ids_of(events) == [75, 76]
    assert events[-1].finish_reason == "stop"
    assert events[-1].stats.new_tokens == 2
    assert session.tokens == [10, 11, 12, 75, 76]


def test_other_stop_ids_can_be_given(make):
    session, _ = make(script={3: 75, 4: 76})
    generator = session.generate_ids([10, 11, 12], stop_ids=[76])
    assert next(generator) == (75, None)
    with pytest.raises(StopIteration) as end:
        next(generator)
    assert end.value.value == "stop"


def test_an_answer_that_ends_at_once_is_only_a_closing_event(make):
    session, _ = make(script={3: fakes.EOS})
    events = list(session.generate([10, 11, 12]))
    assert len(events) == 1 and events[0].token is None and events[0].text == ""
    assert events[0].stats.tpot_ms == 0


def test_max_tokens(make):
    session, runner = make()
    events = list(session.generate("hello", max_tokens=1))
    assert len(ids_of(events)) == 1
    assert events[-1].finish_reason == "length"
    assert len(runner.steps) == 1, "the last token needs no step of its own"


@given(st.integers(1, 12), st.integers(0, 40), st.integers(1, 5))
def test_stop_strings_cut_the_text_where_they_begin(parts, count, at, length):
    manifest, tokenizer = parts
    plain = Session(fakes.FakeRunner(manifest, never=(fakes.EOS,)), tokenizer)
    whole = text_of(plain.generate("hello", max_tokens=12, sampling=WARM))
    stop = whole[at % len(whole) :][:length]
    session = Session(fakes.FakeRunner(manifest, never=(fakes.EOS,)), tokenizer)
    events = list(session.generate("hello", max_tokens=12, sampling=WARM, stop=[stop]))
    assert text_of(events) == whole[: whole.find(stop)]
    assert events[-1].finish_reason == "stop"
    assert stop not in text_of(events)


def test_text_held_for_a_stop_string_comes_with_the_closing_event(make, parts):
    h, e = parts[1].encode("xe")[0], parts[1].encode("e")[0]
    session, _ = make(script={3: h, 4: e})
    events = list(session.generate([10, 11, 12], max_tokens=2, stop=["xenon"]))
    assert [event.text for event in events] == ["", "", "xe"]
    assert events[-1].finish_reason == "length"


def test_log_probabilities(make):
    session, runner = make()
    events = list(session.generate("hello", max_tokens=4, logprobs=True))
    sequence = session.tokenizer.encode("hello")
    for event in events[:-1]:
        logits = runner.logits_after(sequence).astype(float)
        expected = logits[event.token] - np.log(np.exp(logits).sum())
        assert event.logprob == pytest.approx(expected, abs=1e-5)
        sequence.append(event.token)
    assert events[-1].logprob is None
    assert all(e.logprob is None for e in session.generate("hello", max_tokens=2))


def test_penalties_see_prompt_and_answer(make):
    session, _ = make()
    params = SamplingParams(repetition_penalty=1e4, presence_penalty=100)
    ids = ids_of(session.generate("hello", max_tokens=30, sampling=params))
    assert len(set(ids)) == len(ids)


# -- context -------------------------------------------------------------------


def test_a_prompt_over_the_context_is_refused_before_compute(make):
    session, runner = make(capacity=16)
    with pytest.raises(ContextLimitError, match="17 tokens, the context holds 16"):
        session.generate([10] * 17)
    with pytest.raises(ContextLimitError):
        session.generate("z" * 40, context="slide")
    assert runner.steps == [] and session.tokens == []
    assert ids_of(session.generate("hello", max_tokens=2))


def test_at_a_full_context_the_answer_ends(make):
    session, runner = make(capacity=16)
    events = list(session.generate([10] * 12, max_tokens=10**9))
    assert events[-1].finish_reason == "context"
    # The last token needs no row of its own.
    assert len(ids_of(events)) == 5 and runner.arena.length == 16
    events = list(session.generate([10] * 16, max_tokens=5))
    assert len(ids_of(events)) == 1 and events[-1].finish_reason == "context"


@pytest.mark.parametrize("capacity", [1, 2, 5, 16])
def test_sliding_keeps_the_first_and_the_newest_tokens(make, capacity):
    session, runner = make(capacity=capacity, chunk=3)
    events = list(session.generate([10], max_tokens=60, context="slide", n_keep=2))
    assert len(ids_of(events)) == 60 and events[-1].finish_reason == "length"
    assert runner.arena.length <= capacity
    check_in_line(session, runner)
    assert (
        session.tokens[: min(2, capacity // 2)] == [10, ids_of(events)[0]][: min(2, capacity // 2)]
    )


def test_after_a_slide_the_model_sees_the_shortened_sequence(make):
    session, runner = make(capacity=16)
    ids = ids_of(session.generate(list(range(10, 20)), max_tokens=8, context="slide", n_keep=2))
    # 10 + 6 fill the context; the 7th answer token is one too many.
    sequence = [*range(10, 20), *ids[:7]]
    kept = sequence[:2] + sequence[-7:]
    assert ids[7] == int(runner.logits_after(kept).argmax())


def test_cancel_during_a_slide(make):
    session, runner = make(capacity=16, chunk=2)
    generator = session.generate([10] * 15, max_tokens=30, context="slide")
    next(generator), next(generator)
    session.cancel()
    assert [e.finish_reason for e in generator] == ["cancelled"]
    check_in_line(session, runner)


# -- bad input -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "options", "error"),
    [
        ("", {}, PromptError),
        (b"", {}, PromptError),
        ([], {}, PromptError),
        (b"\xff", {}, PromptError),
        ("\ud800", {}, PromptError),
        ([-1], {}, PromptError),
        ([10**9], {}, PromptError),
        (["a"], {}, PromptError),
        ([1.5], {}, PromptError),
        (5, {}, PromptError),
        (None, {}, PromptError),
        ("hi", {"max_tokens": 0}, OptionError),
        ("hi", {"max_tokens": -1}, OptionError),
        ("hi", {"max_tokens": 1.5}, OptionError),
        ("hi", {"max_tokens": True}, OptionError),
        ("hi", {"n_keep": -1}, OptionError),
        ("hi", {"context": "grow"}, OptionError),
        ("hi", {"stop": [""]}, OptionError),
        ("hi", {"sampling": SamplingParams(top_p=2)}, OptionError),
    ],
)
def test_bad_input_is_refused_in_the_call_and_nothing_changes(make, prompt, options, error):
    session, runner = make()
    list(session.generate("hello", max_tokens=2))
    before, steps = list(session.tokens), list(runner.steps)
    with pytest.raises(error) as caught:
        session.generate(prompt, **options)
    assert "\n" not in str(caught.value) and caught.value.exit_code == 2
    assert session.tokens == before and runner.steps == steps
    assert ids_of(session.generate("hello", max_tokens=2))


def test_bad_chunk():
    with pytest.raises(OptionError, match="prefill_chunk"):
        Session(fakes.FakeRunner(fakes.make_manifest()), None, prefill_chunk=0)  # type: ignore


@pytest.mark.parametrize("fail_at", range(6))
@pytest.mark.parametrize("late", [False, True])
def test_a_failing_step_leaves_the_session_usable(make, fail_at, late):
    session, runner = make(chunk=4, fail_at=fail_at, fail_late=late)
    with pytest.raises(RuntimeError, match="went away"):
        list(session.generate(list(range(10, 20)), max_tokens=10))
    check_in_line(session, runner)
    fresh, _ = make()
    prompt = list(range(10, 20))
    assert ids_of(session.generate(prompt, max_tokens=10)) == ids_of(
        fresh.generate(prompt, max_tokens=10)
    )


# -- one at a time, and cancel -------------------------------------------------


def test_a_second_generation_while_one_runs_is_refused(make):
    session, _ = make()
    first = session.generate("hello", max_tokens=5)
    waiting = session.generate("hell", max_tokens=5)
    next(first)
    with pytest.raises(BusyError, match="still running"):
        session.generate("world")
    with pytest.raises(BusyError):
        next(waiting)
    with pytest.raises(UserError):
        session.reset()
    assert len(ids_of(first)) == 4, "the running one is not disturbed"
    assert ids_of(session.generate("world", max_tokens=2))


def test_a_generation_that_is_never_started_blocks_nothing(make):
    session, _ = make()
    waiting = session.generate("hello", max_tokens=5)
    assert ids_of(session.generate("hello", max_tokens=2))
    waiting.close()
    assert ids_of(session.generate("hello", max_tokens=2))


def test_cancel_without_a_generation_does_not_hurt_the_next(make):
    session, _ = make()
    session.cancel()
    list(session.generate("hello", max_tokens=2))
    session.cancel()
    assert len(ids_of(session.generate("hello", max_tokens=3))) == 3


def test_cancel_before_the_first_token_counts(make):
    session, runner = make()
    generator = session.generate("hello", max_tokens=2)
    session.cancel()
    assert [e.finish_reason for e in generator] == ["cancelled"]
    assert runner.steps == []


def test_cancel_from_another_thread_takes_one_step(make):
    session, _ = make(delay=0.02)
    timer = threading.Timer(0.1, session.cancel)
    timer.start()
    started = time.perf_counter()
    events = list(session.generate("hello", max_tokens=40))
    assert events[-1].finish_reason == "cancelled"
    assert time.perf_counter() - started < 0.5
    assert 0 < len(ids_of(events)) < 40


def test_reset(make):
    session, runner = make()
    list(session.generate("hello", max_tokens=2))
    session.reset()
    assert session.tokens == [] and runner.arena.length == 0


# -- statistics ----------------------------------------------------------------


def test_statistics_count_our_time_and_not_the_consumer_s(make):
    session, _ = make(delay=0.01)
    events = []
    for event in session.generate([10, 11, 12], max_tokens=5):
        events.append(event)
        time.sleep(0.02)
    stats = events[-1].stats
    assert (stats.prompt_tokens, stats.new_tokens, stats.rounds) == (3, 5, 4)
    assert 10 <= stats.ttft_ms < 20
    assert 10 <= stats.tpot_ms < 20
    assert stats.session_share > 0.8
    assert stats.decode_tok_s == pytest.approx(1000 / stats.tpot_ms)
    assert 0 < stats.prefill_tok_s < 300
    assert stats.peak_rss_mb > 10
    assert stats.devices == {"target": "cpu", "draft": None}
    assert (stats.drafter, stats.proposed, stats.accepted) == ("none", 0, 0)


def test_the_loop_costs_little_besides_the_step(parts):
    """Guards against work over the vocabulary or the text so far sneaking into the greedy loop."""
    manifest, tokenizer = parts
    big = dataclasses.replace(manifest, kv=dataclasses.replace(manifest.kv, capacity=4096))
    runner = fakes.FakeRunner(big)
    logits = runner.logits_after([1])[None].repeat(1, axis=0)
    logits[0, 70] += 50
    runner.logits_after = lambda ids: logits[0]  # type: ignore[method-assign]
    session = Session(runner, tokenizer)
    best = min(list(session.generate([10], max_tokens=400))[-1].stats.tpot_ms for _ in range(5))
    assert best < 0.1
