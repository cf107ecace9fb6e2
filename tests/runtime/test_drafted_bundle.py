"""Drafting on a tiny fp32 model with a real graph: same text, same keys and values."""

import numpy as np
import pytest
import tiny
from draft_fakes import Bushy, Random, Right, TestDrafter
from hypothesis import given, settings
from hypothesis import strategies as st

from forerun.runtime.drafting.choice import Drafters, Means
from forerun.runtime.drafting.fixed import FixedPolicy
from forerun.runtime.drafting.tree import TokenTree
from forerun.runtime.manifest import load_manifest
from forerun.runtime.prefix import PrefixCache
from forerun.runtime.runner import Runner
from forerun.runtime.session import Session
from forerun.runtime.tokenizer import Tokenizer
from forerun.runtime.types import SamplingParams

VOCAB, CAPACITY = 258, 96
PENALTIES = {
    "none": {},
    "repetition": {"repetition_penalty": 1.3},
    "presence": {"presence_penalty": 1.5},
    "frequency": {"frequency_penalty": 0.8},
}
TEMPERATURES = [(0.0, 0), (0.8, 1), (0.8, 2), (0.8, 3)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.tiny_bundle("llama", tmp_path_factory.mktemp("tiny"), capacity=CAPACITY)[1]


@pytest.fixture(scope="module")
def runner(folder):
    return Runner(load_manifest(folder), folder, threads=1)


@pytest.fixture(scope="module")
def fresh(folder):
    """A second runner, for what should be."""
    return Runner(load_manifest(folder), folder, threads=1)


@pytest.fixture(scope="module")
def tokenizer(folder):
    return Tokenizer(load_manifest(folder), folder)


def session_on(runner, tokenizer, budget=6, trees=True):
    drafters = Drafters(
        runner.manifest, trees=trees, means=lambda: Means(lambda drafter: FixedPolicy(budget))
    )
    return Session(runner, tokenizer, drafters=drafters)


def keys_and_values(runner):
    length = runner.arena.length
    return np.concatenate([a[0, :, :length] for a in runner.arena.arrays.values()])


def check_cache(runner, fresh, ids):
    """Keys and values are those of reading the ids at once."""
    assert runner.arena.length == len(ids)
    fresh.arena.rewind(0)
    if ids:
        fresh.step(ids, want="none")
        np.testing.assert_allclose(keys_and_values(runner), keys_and_values(fresh), atol=2e-4)


@pytest.mark.parametrize("penalty", PENALTIES)
@pytest.mark.parametrize("temperature, seed", TEMPERATURES)
def test_the_text_is_that_of_plain_decoding(runner, fresh, tokenizer, penalty, temperature, seed):
    params = SamplingParams(temperature=temperature, seed=seed, **PENALTIES[penalty])
    prompt, options = [70, 71, 72, 70, 71], {"max_tokens": 40, "sampling": params, "stop_ids": ()}
    plain = session_on(runner, tokenizer)
    expected = [token for token, _ in plain.generate_ids(prompt, **options)]
    text = [*prompt, *expected]
    wrong = [token if i % 5 else (token + 1) % VOCAB for i, token in enumerate(text)]
    for drafter in (
        TestDrafter("silent"),
        Right(text),
        Right(wrong),
        Random(VOCAB, seed),
        Bushy(text, VOCAB, seed),
    ):
        session = session_on(runner, tokenizer, budget=12)
        found = session.generate_ids(prompt, drafter=drafter, **options)
        assert [token for token, _ in found] == expected, drafter.name
        cached = len(session._cache.ids)
        check_cache(runner, fresh, session.tokens[:cached])


@settings(max_examples=40)
@given(
    st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=20),
    st.integers(0, 2**32),
    st.integers(0, 25),
    st.sampled_from(["close", "cancel"]),
)
def test_after_an_end_anywhere_the_cache_holds_the_text(
    runner, fresh, tokenizer, prompt, seed, stop_after, how
):
    params = SamplingParams(temperature=0.8, seed=seed)
    options = {"max_tokens": 30, "sampling": params, "stop_ids": ()}
    text = [*prompt, *(t for t, _ in session_on(runner, tokenizer).generate_ids(prompt, **options))]
    session = session_on(runner, tokenizer, budget=8)
    source = session.generate_ids(prompt, drafter=Bushy(text, VOCAB, seed), **options)
    for _ in range(stop_after):
        next(source)
    if how == "close":
        source.close()
    else:
        session.cancel()
        assert list(source) == []
    if stop_after:
        assert session.tokens == text[: len(prompt) + stop_after]
    cached = session._cache.ids
    assert cached == session.tokens[: len(cached)]
    check_cache(runner, fresh, cached)
    if stop_after:
        rest = session.generate_ids(session.tokens, drafter=Right(text), **options)
        assert [token for token, _ in rest][:5] == text[len(prompt) + stop_after :][:5]


@st.composite
def trees(draw):
    count = draw(st.integers(1, 10))
    parents = tuple(draw(st.integers(-1, node - 1)) for node in range(count))
    tokens = tuple(draw(st.integers(0, VOCAB - 1)) for _ in range(count))
    return TokenTree(tokens, parents, (0.5,) * count, ("test",) * count)


# A generation verifies behind at least one token of its prompt.
HISTORIES = st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=30)


@settings(max_examples=40)
@given(HISTORIES, st.integers(0, VOCAB - 1), trees())
def test_every_path_of_a_tree_is_that_path_run_as_a_chain(runner, fresh, history, anchor, tree):
    runner.arena.rewind(0)
    runner.step(history, want="none")
    rows = [anchor, *tree.tokens]
    logits = runner.step(rows, want="all", parents=tree.row_parents()).copy()
    for node in range(len(tree)):
        path = tree.path_to(node)
        fresh.arena.rewind(0)
        chain = [*history, anchor, *(tree.tokens[n] for n in path)]
        expected = fresh.step(chain, want="all")[len(history) :]
        np.testing.assert_allclose(logits[[0, *(n + 1 for n in path)]], expected, atol=2e-3)


class Steps:
    """Random work on a cache, with the ids it should hold beside it."""

    def __init__(self, runner):
        self.cache = PrefixCache(runner)
        self.ids = [3]
        self.cache.feed([3])

    def feed(self, data):
        ids = data.draw(st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=5))
        self.cache.feed(ids)
        self.ids += ids

    def chain(self, data):
        ids = data.draw(st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=5))
        kept = data.draw(st.integers(0, len(ids)))
        self.cache.try_rows(ids)
        self.cache.accept(ids[:kept])
        self.ids += ids[:kept]

    def tree(self, data):
        tree = data.draw(trees())
        anchor = data.draw(st.integers(0, VOCAB - 1))
        path = tree.path_to(data.draw(st.integers(-1, len(tree) - 1)))
        self.cache.try_rows([anchor, *tree.tokens], tree.row_parents())
        kept = [anchor, *(tree.tokens[node] for node in path)]
        self.cache.accept(kept, [0, *(node + 1 for node in path)])
        self.ids += kept

    def broken_off(self, data):
        tree = data.draw(trees())
        parents = data.draw(st.sampled_from([None, tree.row_parents()]))
        self.cache.try_rows([0, *tree.tokens], parents)
        self.cache.settle()

    def rewind(self, data):
        length = data.draw(st.integers(1, len(self.ids)))
        self.cache.rewind(length)
        del self.ids[length:]

    def common(self, data):
        other = [*self.ids[: data.draw(st.integers(2, len(self.ids) + 1))], 5, 6]
        kept = self.cache.keep_common(other)
        del self.ids[kept:]


OPERATIONS = ("feed", "chain", "tree", "broken_off", "rewind", "common")


@settings(max_examples=40)
@given(st.data())
def test_any_sequence_of_steps_is_a_fresh_prefill_of_what_is_kept(runner, fresh, data):
    steps = Steps(runner)
    for name in data.draw(st.lists(st.sampled_from(OPERATIONS), max_size=8)):
        getattr(steps, name)(data)
        assert steps.cache.ids == steps.ids
        assert runner.arena.length == len(steps.ids)
    check_cache(runner, fresh, steps.ids)
    after = runner.step([7]).copy()
    fresh.arena.rewind(0)
    np.testing.assert_allclose(after, fresh.step([*steps.ids, 7]), atol=2e-3)


def test_chains_run_on_the_plain_graph_and_trees_only_where_allowed(folder, tokenizer):
    class Wide(TestDrafter):
        proposes_trees = True

        def guess(self, budget, keep_going):
            return TokenTree((1, 2, 3), (-1, -1, 1), (0.2, 0.9, 0.5), ("wide",) * 3)

    runner = Runner(load_manifest(folder), folder, threads=1)
    for drafter, trees_on in ((Random(VOCAB), True), (Wide(), False)):
        session = session_on(runner, tokenizer, trees=trees_on)
        list(session.generate("hello", max_tokens=10, drafter=drafter))
        assert runner._tree is None
    stats = list(session.generate("hello", max_tokens=10, drafter=Wide()))[-1].stats
    assert set(stats.acceptance["wide"]) == {1, 2}, "the best chain is two deep"
    assert stats.acceptance["wide"][1][0] - stats.acceptance["wide"][2][0] in (0, 1)
    list(session_on(runner, tokenizer).generate("hello", max_tokens=10, drafter=Wide()))
    assert runner._tree is not None
