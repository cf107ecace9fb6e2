"""A model that drafts for itself with blocks skipped: the same text, and the same cache."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny_bundle

from forerun.errors import UnsupportedError
from forerun.quant.gear import with_gear
from forerun.quant.skip_graph import skipping_lowering, with_skipping
from forerun.runtime.drafting.accept import MatchWalk
from forerun.runtime.drafting.choice import Drafters, Means
from forerun.runtime.drafting.fixed import FixedPolicy
from forerun.runtime.drafting.rounds import DraftRounds
from forerun.runtime.drafting.skip import SkipDrafter, draft_rule, open_skip
from forerun.runtime.gear.runner import GearRunner
from forerun.runtime.layouts import choose_layout
from forerun.runtime.manifest import SkipLevel, Skipping
from forerun.runtime.prefix import PrefixCache
from forerun.runtime.runner import Runner
from forerun.runtime.session import Session
from forerun.runtime.skipping import Fixed, Skip
from forerun.runtime.tokenizer import Tokenizer
from forerun.runtime.types import SamplingParams

LAYERS = 6
FOUND = Skipping(
    1, 5, (0.9,) * LAYERS, (3, 2, 4, 1), (SkipLevel(0.1, 0.9, 1), SkipLevel(0.3, 0.5, 2))
)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    changes = {"layers": LAYERS, "layer_window": (False,) * LAYERS}
    made, folder = tiny_bundle("llama", tmp_path_factory.mktemp("self"), capacity=96, **changes)
    form = skipping_lowering(made.lowerings["cpu"], with_skipping(folder, "model.onnx"))
    forms = made.lowerings | {"cpu": form}
    return dataclasses.replace(made, lowerings=forms, skipping=FOUND), folder


@pytest.fixture(scope="module")
def runner(bundle):
    return Runner(*bundle, threads=1)


@pytest.fixture(scope="module")
def tokenizer(bundle):
    return Tokenizer(*bundle)


def rule_of(layers):
    flags = np.ones(LAYERS, bool)
    flags[list(layers)] = False
    return Fixed("test", Skip(flags), 0)


@settings(max_examples=15, deadline=None)
@given(
    st.lists(st.integers(0, 255), min_size=1, max_size=8),
    st.sets(st.integers(1, LAYERS - 2)),
    st.sampled_from([0.0, 0.9]),
)
def test_the_text_is_that_of_plain_decoding(runner, tokenizer, prompt, layers, temperature):
    options = {
        "max_tokens": 24,
        "sampling": SamplingParams(temperature=temperature, seed=3),
        "stop_ids": (),
    }
    runner.skipping = None
    plain = [t for t, _ in Session(runner, tokenizer).generate_ids(prompt, **options)]
    drafter = SkipDrafter(runner, rule_of(layers))
    session = Session(runner, tokenizer)
    assert [t for t, _ in session.generate_ids(prompt, drafter=drafter, **options)] == plain
    more = [*session.tokens, 7]
    again = [t for t, _ in session.generate_ids(more, drafter=drafter, **options)]
    assert again == [t for t, _ in Session(runner, tokenizer).generate_ids(more, **options)]
    assert runner.skipping is None


def test_a_draft_leaves_cache_and_rule_as_they_were(runner):
    runner.arena.rewind(0)
    text = [1, 2, 3, 4, 5]
    runner.step(text[:-1])
    before = {role: a[:, :, :4].copy() for role, a in runner.arena.arrays.items()}
    kept = rule_of([2])
    runner.skipping = kept
    drafter = SkipDrafter(runner, rule_of([1, 2, 3]))
    drafter.begin(text)
    ran = runner.ffn_counts[0]
    assert len(drafter.propose(5)) == 5
    assert runner.ffn_counts[0] - ran == 5 * (LAYERS - 3)
    assert runner.skipping is kept and runner.arena.length == 4
    for role, array in before.items():
        np.testing.assert_array_equal(runner.arena.arrays[role][:, :, :4], array)
    asked = []
    assert len(drafter.propose(5, lambda value: bool(asked.append(value)))) == 1
    assert len(asked) == 1 and 0 < asked[0] <= 1
    runner.skipping = None


def test_without_skipping_every_draft_is_accepted(runner):
    cache, rounds = PrefixCache(runner), []
    cache.feed([9, 8], "none")
    drafter = SkipDrafter(runner, rule_of([]))
    turns = DraftRounds(cache, drafter, FixedPolicy(4), MatchWalk())
    text = [9, 8, 7]
    for _ in range(5):
        rounds.append([token for token, _ in turns.round(text, greedy, 20)])
        text += rounds[-1]
    assert [len(said) for said in rounds] == [5] * 5
    assert runner.arena.length == len(text) - 1
    assert turns.tally.accepted == turns.tally.proposed == 20


def greedy(logits, tokens):
    return int(logits.argmax())


def test_a_cache_that_is_not_in_line_gets_no_draft(runner):
    runner.arena.rewind(0)
    runner.step([1, 2])
    drafter = SkipDrafter(runner, rule_of([2]))
    drafter.begin([1, 2, 3, 4, 5])
    assert len(drafter.propose(4)) == 0
    drafter.rewind(3)
    assert len(drafter.propose(4)) == 4
    assert len(drafter.propose(0)) == 0


def test_it_opens_only_where_it_can_work(runner):
    assert open_skip(runner).name == "skip"
    assert draft_rule(runner.manifest, 0.3).choose(0).tau == 0.5
    # The nearest level, since a draft that skips more than asked for harms nothing.
    assert draft_rule(runner.manifest, 0.25).choose(0).tau == 0.5
    fixed = draft_rule(runner.manifest, 0.5).choose(0)
    assert np.flatnonzero(~fixed.flags).tolist() == [2, 3, 4]

    class Other:
        device, can_skip = "cpu", True
        manifest = dataclasses.replace(runner.manifest, skipping=None)

    with pytest.raises(UnsupportedError, match="quantize its float32 bundle with --skipping"):
        open_skip(Other())


def test_a_form_that_cannot_skip_is_refused_before_anything_is_drafted(runner, bundle):
    manifest, folder = bundle
    other = Runner(manifest, folder, threads=1, lowering="webgpu")
    assert runner.can_skip and not other.can_skip
    other.device = "webgpu"
    with pytest.raises(UnsupportedError, match="for webgpu cannot; run it on the cpu"):
        open_skip(other)


def on_gear(folder, kind):
    """A runner on GEAR whose graph can skip, and its tokenizer."""
    changes = {"layers": LAYERS, "layer_window": (False,) * LAYERS, "context": 512}
    made, folder = tiny_bundle("llama", folder, capacity=320, **changes)
    form = skipping_lowering(made.lowerings["cpu"], with_skipping(folder, "model.onnx"))
    forms = made.lowerings | {"cpu": form}
    able = dataclasses.replace(made, lowerings=forms, skipping=FOUND)
    gear = GearRunner(choose_layout(with_gear(folder, able), kind), folder, threads=1)
    return gear, Tokenizer(made, folder)


def test_a_tree_on_gear_skips_nothing_that_the_step_before_skipped(tmp_path):
    gear, _ = on_gear(tmp_path, "gear-kivi")
    gear.step(list(range(10)))
    tree = {"want": "all", "parents": [-1, 0]}
    whole = gear.step([7, 8], **tree).copy()
    gear.arena.rewind(10)
    before, gear.skipping = gear.skipping, rule_of([2, 3])
    gear.step([7])
    gear.skipping = before
    gear.arena.rewind(10)
    np.testing.assert_array_equal(gear.step([7, 8], **tree), whole)
    gear.close()


def test_an_empty_cache_behind_a_broken_draft_hides_no_error(runner, monkeypatch):
    runner.arena.rewind(0)
    runner.step([1, 2, 3])
    drafter = SkipDrafter(runner, rule_of([2]))
    drafter.begin([1, 2, 3, 4])

    def broken(*args, **options):
        runner.arena.rewind(0)
        raise KeyboardInterrupt

    monkeypatch.setattr(runner, "step", broken)
    with pytest.raises(KeyboardInterrupt):
        drafter.propose(4)


@pytest.mark.parametrize("kind", ["gear-kcvt", "gear-kivi"])
def test_a_cache_in_gears_form_is_given_back_too(tmp_path, kind):
    """Drafts may reach over the end of a chunk, whose rows are kept until the next one ends."""
    gear, tokenizer = on_gear(tmp_path, kind)
    prompt = list(range(50))
    options = {"max_tokens": 240, "stop_ids": ()}
    plain = [t for t, _ in Session(gear, tokenizer).generate_ids(prompt, **options)]
    drafters = Drafters(gear.manifest, means=lambda: Means(lambda drafter: FixedPolicy(16)))
    session = Session(gear, tokenizer, drafters=drafters)
    drafted = session.generate_ids(prompt, drafter=open_skip(gear), **options)
    assert [t for t, _ in drafted] == plain
    gear.close()
