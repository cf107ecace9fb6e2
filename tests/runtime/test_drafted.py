"""Generation with a drafter on a scripted model: the text, the cache and the drafter's own view."""

import dataclasses
import threading

import fakes
import numpy as np
import pytest
from draft_fakes import Bushy, Random, Right, TestDrafter
from hypothesis import given
from hypothesis import strategies as st

from forerun.errors import DrafterError, OptionError, UnsupportedError
from forerun.runtime import sampling
from forerun.runtime.chat import Chat
from forerun.runtime.drafting.choice import Drafters, Means
from forerun.runtime.drafting.fixed import FixedPolicy
from forerun.runtime.drafting.tree import TokenTree
from forerun.runtime.session import Session
from forerun.runtime.types import SamplingParams

PROMPT = [10, 11, 12]


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    return fakes.make_tokenizer(tmp_path_factory.mktemp("bundle"), capacity=64)


@pytest.fixture
def make(parts):
    """Build a session on a fake runner; keyword arguments go to the runner."""
    return lambda **options: build(parts, **options)


def build(parts, capacity=64, chunk=512, budget=4, trees=True, **options):
    manifest, tokenizer = parts
    options.setdefault("never", (fakes.EOS,))
    kv = dataclasses.replace(manifest.kv, capacity=capacity)
    manifest = dataclasses.replace(manifest, kv=kv)
    runner = fakes.FakeRunner(manifest, **options)
    drafters = Drafters(
        manifest, trees=trees, means=lambda: Means(lambda drafter: FixedPolicy(budget))
    )
    return Session(runner, tokenizer, drafters=drafters, prefill_chunk=chunk), runner


def ids_of(events):
    return [event.token for event in events if event.token is not None]


def text_of(events):
    return "".join(event.text for event in events)


def check_in_line(session, runner, drafter=None):
    """Arena, cache, text and drafter agree, so whatever comes next is computed from the text."""
    assert session._cache.ids == runner.arena.rows
    assert session.tokens[: len(runner.arena.rows)] == runner.arena.rows
    assert not session.busy
    if drafter is not None and drafter.ids:
        assert drafter.ids == session.tokens[: len(drafter.ids)]


def drafters_for(text, vocab, seed=0):
    return [
        TestDrafter("silent"),
        Right(text),
        Right([*text[:7], 99, *text[8:]]),
        Random(vocab, seed),
        Bushy(text, vocab, seed),
    ]


PARAMS = {
    "greedy": SamplingParams(),
    "sampled": SamplingParams(temperature=0.8, seed=1),
    "repetition": SamplingParams(repetition_penalty=1.5),
    "presence": SamplingParams(presence_penalty=2.0, temperature=0.8, seed=2),
    "frequency": SamplingParams(frequency_penalty=1.0, top_k=20, temperature=1.1, seed=3),
    "bias": SamplingParams(logit_bias={70: 4.0, 71: -5.0}, temperature=0.7, seed=4),
}


@pytest.mark.parametrize("name", PARAMS)
@pytest.mark.parametrize("trees", [True, False])
def test_the_text_is_that_of_plain_decoding(parts, name, trees):
    options = {"max_tokens": 25, "sampling": PARAMS[name], "logprobs": True}
    plain, _ = build(parts)
    expected = list(plain.generate(PROMPT, **options))
    vocab = parts[0].model.vocab
    for drafter in drafters_for(plain.tokens, vocab):
        session, runner = build(parts, trees=trees, budget=6)
        events = list(session.generate(PROMPT, drafter=drafter, **options))
        assert ids_of(events) == ids_of(expected), drafter.name
        assert [e.logprob for e in events] == [e.logprob for e in expected]
        assert events[-1].finish_reason == "length"
        check_in_line(session, runner, drafter)
        assert trees or all(parents is None for parents in runner.parents)


@given(
    st.lists(st.integers(4, 90), min_size=1, max_size=20),
    st.integers(0, 2**32),
    st.integers(1, 30),
    st.integers(1, 9),
    st.sampled_from(["error", "slide"]),
    st.integers(6, 40),
)
def test_any_length_budget_and_context(parts, prompt, seed, count, budget, context, capacity):
    """Tight contexts, slides, small and large budgets, answers cut anywhere."""
    prompt = prompt[:capacity]
    params = SamplingParams(temperature=0.8, repetition_penalty=1.1, seed=seed)
    options = {"max_tokens": count, "sampling": params, "context": context, "n_keep": 2}
    plain, _ = build(parts, capacity=capacity, chunk=5)
    expected = list(plain.generate(prompt, **options))
    vocab = parts[0].model.vocab
    text = [*prompt, *ids_of(expected)]
    for drafter in (Random(vocab, seed), Bushy(text, vocab, seed), Right(text)):
        session, runner = build(parts, capacity=capacity, chunk=5, budget=budget)
        events = list(session.generate(prompt, drafter=drafter, **options))
        assert ids_of(events) == ids_of(expected)
        assert events[-1].finish_reason == expected[-1].finish_reason
        assert session.tokens == plain.tokens
        # After a slide the drafter takes up the shorter text with the next round only.
        check_in_line(session, runner, drafter if context == "error" else None)


def test_right_drafts_take_fewer_steps(make):
    plain, _ = make()
    expected = ids_of(plain.generate(PROMPT, max_tokens=21))
    session, runner = make()
    drafter = Right(plain.tokens)
    events = list(session.generate(PROMPT, max_tokens=21, drafter=drafter))
    assert ids_of(events) == expected
    # The prompt gives one token, four rounds five each.
    assert runner.steps == [3, 5, 5, 5, 5]
    assert drafter.rounds == [(4, 4)] * 4


def test_a_draft_never_goes_beyond_the_answer(make):
    plain, _ = make()
    plain_ids = ids_of(plain.generate(PROMPT, max_tokens=20))
    for count in range(1, 8):
        session, runner = make()
        drafter = Right([*PROMPT, *plain_ids])
        events = list(session.generate(PROMPT, max_tokens=count, drafter=drafter))
        assert ids_of(events) == plain_ids[:count]
        assert sum(runner.steps) <= len(PROMPT) + count - 1 + (count > 1)
        assert len(runner.arena.rows) == len(PROMPT) + count - 1


def test_rejected_drafts_do_not_shorten_the_answer(make):
    session, _ = make()
    events = list(session.generate(PROMPT, max_tokens=30, drafter=Random(90)))
    assert len(ids_of(events)) == 30 and events[-1].finish_reason == "length"


def test_stop_ids_in_the_middle_of_an_accepted_path(make):
    script = {5: 75, 6: 76, 7: fakes.EOS, 8: 77}
    session, runner = make(script=script)
    first = [*PROMPT, *ids_of(session.generate(PROMPT, max_tokens=2))]
    session, runner = make(script=script)
    drafter = Right([*first, 75, 76, fakes.EOS, 77, 78])
    drafter.text = [*first[:4], *first[4:5], 75, 76, fakes.EOS, 77, 78]
    events = list(session.generate(PROMPT, max_tokens=20, drafter=drafter))
    assert events[-1].finish_reason == "stop"
    assert ids_of(events)[-2:] == [75, 76] and fakes.EOS not in session.tokens
    check_in_line(session, runner, drafter)
    assert drafter.ids == session.tokens


@given(st.integers(0, 60), st.integers(1, 4))
def test_stop_strings_cut_the_text_where_they_begin(parts, at, length):
    plain, _ = build(parts)
    whole = text_of(plain.generate(PROMPT, max_tokens=20))
    text, stop = list(plain.tokens), whole[at % len(whole) :][:length]
    expected = text_of(build(parts)[0].generate(PROMPT, max_tokens=20, stop=[stop]))
    session, runner = build(parts, budget=7)
    drafter = Right(text)
    events = list(session.generate(PROMPT, max_tokens=20, stop=[stop], drafter=drafter))
    assert text_of(events) == expected == whole[: whole.find(stop)]
    assert events[-1].finish_reason == "stop"
    check_in_line(session, runner, drafter)
    # It takes up the text with the first round, which a short answer does not reach.
    assert drafter.ids in ([], session.tokens)


@pytest.mark.parametrize("stop_after", range(14))
@pytest.mark.parametrize("how", ["cancel", "close"])
def test_an_end_anywhere_leaves_a_session_like_a_fresh_one(make, stop_after, how):
    plain, _ = make()
    list(plain.generate(PROMPT, max_tokens=20))
    session, runner = make()
    drafter = Right(plain.tokens)
    generator = session.generate(PROMPT, max_tokens=20, drafter=drafter)
    said = [next(generator) for _ in range(stop_after)]
    if how == "close":
        generator.close()
    else:
        steps = len(runner.steps)
        session.cancel()
        rest = list(generator)
        assert len(runner.steps) == steps and ids_of(rest) == []
        assert rest[-1].finish_reason == "cancelled"
    assert ids_of(said) == (plain.tokens[3 : 3 + stop_after])
    check_in_line(session, runner, drafter)
    more = [*session.tokens, 50]
    fresh, _ = make()
    assert ids_of(session.generate(more, max_tokens=8, drafter=drafter)) == ids_of(
        fresh.generate(more, max_tokens=8)
    )


def test_a_cancel_while_drafting_runs_no_step(make):
    session, runner = make()

    class Slow(TestDrafter):
        def guess(self, budget, keep_going):
            assert keep_going(0.5)
            session.cancel()
            assert not keep_going(0.5)
            return TokenTree.chain([5], [0.5], self.name)

    events = list(session.generate(PROMPT, max_tokens=20, drafter=Slow()))
    assert len(ids_of(events)) == 1 and events[-1].finish_reason == "cancelled"
    assert runner.steps == [3]
    check_in_line(session, runner)


def test_cancel_from_another_thread_ends_within_a_round(make):
    session, _ = make(delay=0.01)
    threading.Timer(0.05, session.cancel).start()
    events = list(session.generate(PROMPT, max_tokens=60, drafter=Random(90)))
    assert events[-1].finish_reason == "cancelled"


@pytest.mark.parametrize("method", ["begin", "propose", "observe", "rewind"])
def test_a_drafter_that_fails_is_named_and_the_session_goes_on(make, method):
    script = {i: 70 + i for i in range(4, 20)}
    session, runner = make(script=script)
    text = [*PROMPT, 0, *(70 + i for i in range(4, 20))]
    drafter = Right(text, fail_in=method)
    generator = session.generate(PROMPT, max_tokens=12, drafter=drafter)
    with pytest.raises(DrafterError, match=r"drafter right failed .*ZeroDivisionError.*none"):
        if method == "rewind":
            next(generator), next(generator)
            generator.close()
        else:
            list(generator)
    check_in_line(session, runner)
    drafter.fail_in = None
    expected = ids_of(make(script=script)[0].generate(PROMPT, max_tokens=12))
    for again in (drafter, None):
        assert ids_of(session.generate(PROMPT, max_tokens=12, drafter=again)) == expected


def test_a_typed_error_and_an_interrupt_of_a_drafter_stay_what_they_are(make):
    for error in (OptionError, KeyboardInterrupt):
        session, runner = make()
        drafter = Right([], fail_in="propose", error=error)
        with pytest.raises(error, match="out of luck"):
            list(session.generate(PROMPT, max_tokens=5, drafter=drafter))
        check_in_line(session, runner)
        assert drafter.ids == [], "what it knew is forgotten"


def test_ids_that_the_model_lacks_are_the_drafter_s_failure(make):
    session, runner = make()
    drafter = Right([*PROMPT, 0, 10**6])
    with pytest.raises(DrafterError, match="ids go from 0"):
        list(session.generate(PROMPT, max_tokens=5, drafter=drafter))
    assert runner.steps == [3]


@pytest.mark.parametrize("fail_at", range(5))
@pytest.mark.parametrize("late", [False, True])
def test_a_failing_step_leaves_the_session_usable(make, fail_at, late):
    plain, _ = make()
    expected = ids_of(plain.generate(PROMPT, max_tokens=16))
    session, runner = make(fail_at=fail_at, fail_late=late, budget=2)
    drafter = Right(plain.tokens)
    with pytest.raises(RuntimeError, match="went away"):
        list(session.generate(PROMPT, max_tokens=16, drafter=drafter))
    check_in_line(session, runner, drafter)
    assert ids_of(session.generate(PROMPT, max_tokens=16, drafter=drafter)) == expected


def test_a_policy_is_asked_and_told(make, parts):
    plain, _ = make()
    expected = ids_of(plain.generate(PROMPT, max_tokens=14))
    calls = []

    class Policy(FixedPolicy):
        def budget(self, depth):
            # Every third round is a plain step.
            calls.append(("budget", depth))
            return 0 if len(calls) % 3 == 0 else 3

        def prune(self, tree, draft_seconds, depth):
            assert draft_seconds >= 0
            return tree.take(range(min(len(tree), 2)))

        def observe(self, tree, path, draft_seconds, verify_seconds, depth, new_tokens=()):
            assert len(tree) <= 2 and verify_seconds > 0
            assert len(new_tokens) == len(path) + 1
            calls.append(("observe", depth))

    manifest, tokenizer = parts
    drafters = Drafters(manifest, means=lambda: Means(lambda drafter: Policy()))
    session = Session(fakes.FakeRunner(manifest, never=(1,)), tokenizer, drafters=drafters)
    drafter = Right(plain.tokens)
    assert ids_of(session.generate(PROMPT, max_tokens=14, drafter=drafter)) == expected
    depths = [depth for name, depth in calls if name == "observe"]
    assert depths[0] == 3 and depths == sorted(depths)
    assert {0, 2} <= {drafted for drafted, _ in drafter.rounds} <= {0, 1, 2}


def test_statistics(make):
    plain, _ = make()
    list(plain.generate(PROMPT, max_tokens=21))
    wrong_at = 9
    text = [*plain.tokens[:wrong_at], 98, *plain.tokens[wrong_at + 1 :]]
    session, _ = make(delay=0.002)
    stats = list(session.generate(PROMPT, max_tokens=21, drafter=Right(text)))[-1].stats
    # The prompt gives token 3, the first round 4 to 8; the next draft is wrong at once.
    assert stats.rounds == 5
    assert stats.new_tokens == 21 and stats.tokens_per_round == pytest.approx(20 / 5)
    assert stats.proposed == 4 * 4 + 3 and stats.accepted == 15
    counts = stats.acceptance["right"]
    assert counts[1] == [5, 4] and counts[4] == [4, 3]
    assert sum(p for p, _ in counts.values()) == stats.proposed
    assert sum(a for _, a in counts.values()) == stats.accepted
    assert (stats.drafter, stats.schedule, stats.accept) == ("right", "serial", "match")
    assert stats.devices == {"target": "cpu", "draft": "cpu"}
    assert stats.verify_ms >= 5 * 2 and 0 < stats.draft_ms < stats.verify_ms
    assert stats.speedup == 0.0, "no costs are known"


def test_the_speed_up_is_told_against_plain_steps(make, parts):
    class Costs:
        def step(self, n, depth):
            assert n == 1 and depth >= 3
            return 0.01

    manifest, tokenizer = parts
    plain, _ = make()
    list(plain.generate(PROMPT, max_tokens=21))
    drafters = Drafters(manifest, trees=True, means=lambda: Means(costs=Costs()))
    runner = fakes.FakeRunner(manifest, never=(fakes.EOS,), delay=0.01)
    session = Session(runner, tokenizer, drafters=drafters)
    drafter = Right(plain.tokens)
    stats = list(session.generate(PROMPT, max_tokens=21, drafter=drafter))[-1].stats
    assert stats.speedup == pytest.approx(10 / stats.tpot_ms, rel=1e-6)
    assert stats.speedup > 1


def test_plain_decoding_has_no_rounds_of_a_drafter(make):
    session, _ = make()
    stats = list(session.generate(PROMPT, max_tokens=5, drafter="none"))[-1].stats
    assert (stats.drafter, stats.schedule, stats.proposed) == ("none", "plain", 0)
    assert stats.tokens_per_round == 1 and stats.acceptance == {}


def test_relaxed_acceptance_is_lossy_and_says_so(make):
    plain, _ = make()
    expected = ids_of(plain.generate(PROMPT, max_tokens=20))

    class Second(TestDrafter):
        """Always proposes what the model likes second best."""

        def guess(self, budget, keep_going):
            best = runner.logits_after(self.ids).argsort()[-2]
            return TokenTree.chain([int(best)], [0.5], self.name)

    session, runner = make()
    events = list(session.generate(PROMPT, max_tokens=20, drafter=Second(), accept="relaxed"))
    assert ids_of(events) != expected
    assert events[-1].stats.accept == "relaxed" and events[-1].stats.overruled > 0
    session, runner = make()
    events = list(session.generate(PROMPT, max_tokens=20, drafter=Second()))
    assert ids_of(events) == expected and events[-1].stats.overruled == 0


@pytest.mark.parametrize(
    "options, text",
    [
        ({"drafter": "psychic"}, "psychic"),
        ({"drafter": Random(9), "accept": "anything"}, "match, relaxed"),
        ({"accept": "relaxed"}, "needs a drafter"),
        ({"drafter": "none", "accept": "relaxed"}, "needs a drafter"),
    ],
)
def test_bad_options_are_refused_before_compute(make, options, text):
    session, runner = make()
    with pytest.raises(OptionError, match=text):
        session.generate(PROMPT, **options)
    assert runner.steps == []


def test_a_drafter_that_reads_hidden_states_needs_a_model_that_gives_them(make):
    session, runner = make()
    drafter = TestDrafter("head")
    drafter.needs_features = True
    with pytest.raises(UnsupportedError, match="head reads hidden states"):
        session.generate(PROMPT, drafter=drafter)
    assert runner.steps == []


def test_features_reach_a_drafter_that_needs_them(parts):
    class Reader(Right):
        needs_features = True

        def begin(self, ids, features):
            super().begin(ids, features)
            assert features.tolist() == [[token] for token in ids[:-1]][-len(features) :]

        def observe(self, outcome):
            assert outcome.features.tolist() == [[token] for token in outcome.row_tokens]
            super().observe(outcome)

    class Tapped(fakes.FakeRunner):
        """Its features are the ids of the rows."""

        def step(self, ids, **options):
            self.rows = ids
            return super().step(ids, **options)

        def features(self):
            return np.array(self.rows, np.float32)[:, None]

    manifest, tokenizer = parts
    plain, _ = build(parts)
    expected = ids_of(plain.generate(PROMPT, max_tokens=20))
    runner = Tapped(dataclasses.replace(manifest, taps=(0,)), never=(fakes.EOS,))
    session = Session(runner, tokenizer, prefill_chunk=2)
    events = session.generate(PROMPT, max_tokens=20, drafter=Reader([*PROMPT, *expected]))
    assert ids_of(events) == expected


def test_a_drafter_is_told_how_the_model_draws_also_after_a_slide(make):
    """One that draws alike from the same logits is always right, so it knows the positions."""

    class Alike(TestDrafter):
        def configure(self, params, skipped):
            self.params, self.skipped = params, skipped

        def guess(self, budget, keep_going):
            logits = runner.logits_after(self.ids)
            token = sampling.pick(logits, self.params, len(self.ids) + self.skipped)
            return TokenTree.chain([token], [1.0], self.name)

    session, runner = make(capacity=20)
    params = SamplingParams(temperature=1.2, seed=9)
    options = {"max_tokens": 60, "sampling": params, "context": "slide"}
    drafter = Alike()
    events = list(session.generate(PROMPT, drafter=drafter, **options))
    assert drafter.skipped > 20 and len(drafter.rounds) > 20
    assert all(proposed == accepted for proposed, accepted in drafter.rounds)
    assert ids_of(events) == ids_of(make(capacity=20)[0].generate(PROMPT, **options))


def test_ids_can_be_drafted_too(make):
    plain, _ = make()
    expected = list(plain.generate_ids(PROMPT, max_tokens=9))
    session, runner = make()
    found = list(session.generate_ids(PROMPT, max_tokens=9, drafter=Right(plain.tokens)))
    assert found == expected and len(runner.steps) == 3


def test_a_chat_reuses_the_cache_and_the_drafter_follows(parts):
    talks = []
    for drafter in (None, Random(90), Bushy([], 90)):
        session, runner = build(parts, capacity=64)
        chat = Chat(session, fakes.CHATML)
        events = [list(chat.say(text, max_tokens=6, drafter=drafter)) for text in ("he", "ll")]
        check_in_line(session, runner, drafter)
        assert events[1][-1].stats.cached_tokens > 8
        talks.append(chat.messages)
    assert talks[0] == talks[1] == talks[2]
