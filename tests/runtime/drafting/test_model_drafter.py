"""The draft model, its noise, and the cascade that speeds it up."""

import numpy as np
import pytest
from draft_toys import VOCAB, ToyRunner, plain, verified
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny_bundle

from forerun.errors import BundleError, OptionError
from forerun.runtime import sampling
from forerun.runtime.drafting.ahead import AheadDrafter
from forerun.runtime.drafting.combine import Speculative
from forerun.runtime.drafting.coupled import CoupledPick
from forerun.runtime.drafting.model import ModelDrafter
from forerun.runtime.drafting.ngram import NgramDrafter
from forerun.runtime.drafting.vocab import VocabMap, identity
from forerun.runtime.runner import Runner
from forerun.runtime.types import SamplingParams

IDS = st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=12)
DRAWN = SamplingParams(temperature=0.8, seed=3)


def drafter(runner=None, **options):
    return ModelDrafter(runner or ToyRunner(**options), identity(VOCAB))


def greedy(ids, count):
    """What the toy model says behind `ids`."""
    toy, out = ToyRunner(), list(ids)
    for _ in range(count):
        out.append(int(toy.row(out).argmax()))
    return tuple(out[len(ids) :])


def test_it_drafts_what_its_model_says():
    model = drafter()
    model.begin([1, 2, 3], None)
    tree = model.propose(4)
    assert tree.tokens == greedy([1, 2, 3], 4)
    assert tree.is_chain and set(tree.sources) == {"model"}
    row = ToyRunner().row([1, 2, 3]).astype(np.float64)
    assert np.isclose(tree.confidences[0], np.exp(row.max()) / np.exp(row).sum())
    assert isinstance(model, AheadDrafter)


def test_each_token_is_one_row_and_an_accepted_draft_is_not_read_again():
    runner = ToyRunner()
    model = drafter(runner)
    model.begin([1, 2, 3], None)
    assert model.backlog == 3
    tree = model.propose(3)
    assert runner.steps == [3, 1, 1]
    model.observe(verified(tree, [*tree.tokens, 9]))
    assert model.backlog == 2
    model.propose(1)
    assert runner.steps[3:] == [2]


def test_it_stops_when_told():
    model = drafter()
    model.begin([1, 2, 3], None)
    seen = []
    tree = model.propose(5, lambda value: seen.append(value) or len(seen) < 3)
    assert len(tree) == 3
    assert np.allclose(seen, np.cumprod(tree.confidences))


@given(IDS, st.lists(st.tuples(st.integers(0, 3), st.integers(1, 40), IDS), max_size=6))
@settings(max_examples=40)
def test_any_history_proposes_what_a_fresh_drafter_does(ids, events):
    model = drafter(capacity=200)
    model.begin(ids, None)
    for kind, number, more in events:
        if kind == 0:
            ids = ids[:number]
            model.rewind(len(ids))
        elif kind == 1:
            ids = ids + more
            model.observe(plain(*more))
        elif kind == 2:
            model.next_tokens(more, 2)
        else:
            ids = [*ids[: number // 2], *more]
            model.begin(ids, None)
    assert model.propose(3).tokens == greedy(ids, 3)


def test_text_beyond_its_capacity_is_read_from_the_newest_half():
    runner = ToyRunner(capacity=16, follow=lambda token: (token + 1) % VOCAB)
    model = drafter(runner)
    text = list(range(40))
    model.begin(text[:12], None)
    for end in range(12, 40):
        tree = model.propose(3)
        assert tree.tokens == tuple((text[end - 1] + i) % VOCAB for i in (1, 2, 3))
        model.observe(plain(text[end]))
    # Read again now and then, not with every token.
    assert sum(rows > 3 for rows in runner.steps) <= 5
    model.rewind(5)
    assert model.propose(2).tokens == (5, 6)
    model.begin(text, None)
    assert model.propose(2).tokens == (40, 41)


def test_no_room_for_what_is_ahead_ends_the_draft():
    model = drafter(capacity=16)
    model.begin([1, 2, 3], None)
    assert model.next_tokens(list(range(30)), 1) == ([], [])
    assert model.propose(2).tokens == greedy([1, 2, 3], 2)
    with pytest.raises(OptionError, match="room for 8 tokens"):
        drafter(capacity=8)


def test_a_step_that_broke_off_leaves_it_usable():
    runner = ToyRunner()
    model = drafter(runner)
    model.begin([1, 2, 3], None)
    model.propose(2)
    runner.fail_at = len(runner.steps)
    model.observe(plain(9, 9))
    with pytest.raises(RuntimeError):
        model.propose(2)
    assert model.propose(2).tokens == greedy([1, 2, 3, 9, 9], 2)
    model.close()
    assert runner.closed


def test_several_first_tokens_are_the_best_ones():
    model = drafter()
    model.begin([4, 5], None)
    tokens, chances = model.next_tokens([6], 3)
    row = ToyRunner().row([4, 5, 6])
    assert tokens == np.argsort(-row)[:3].tolist()
    assert sorted(chances, reverse=True) == chances and 0 < sum(chances) < 1


def test_at_a_temperature_it_draws_the_targets_very_token():
    """A drafter that knows the target's distribution proposes the target's draws."""
    params = SamplingParams(temperature=0.9, top_k=20, top_p=0.9, seed=11)
    model, toy = drafter(), ToyRunner()
    for skipped in (0, 5):
        model.configure(params, skipped)
        ids = [1, 2, 3]
        model.begin(ids, None)
        for token in model.propose(8).tokens:
            assert token == sampling.pick(toy.row(ids), params, len(ids) + skipped)
            ids.append(token)
        assert len(ids) == 11


def test_penalties_and_bias_are_applied():
    params = SamplingParams(repetition_penalty=3.0, presence_penalty=2.0, logit_bias={7: 4.0})
    model, toy = drafter(), ToyRunner()
    model.configure(params)
    ids = [7, 8, 7, 9]
    model.begin(ids, None)
    for token in model.propose(6).tokens:
        assert token == sampling.pick(toy.row(ids), params, len(ids), ids, 3)
        ids.append(token)
    assert len(ids) == 10


def test_another_vocabulary_is_mapped_by_id():
    to_target = np.array([40, 41, 42, 43, 49])
    runner = ToyRunner(vocab=5, follow=lambda token: (token + 1) % 4)
    model = ModelDrafter(runner, VocabMap(to_target, VOCAB, 4))
    model.begin([40, 41], None)
    assert model.propose(3).tokens == (42, 43, 40)
    model.begin([40, 7], None)
    model.propose(1)
    assert runner.arena.rows == [0, 4]
    assert model.next_tokens([], 2)[0][0] == 41


def test_the_row_of_unknown_tokens_is_never_proposed():
    runner = ToyRunner(vocab=5, follow=lambda token: 4)
    model = ModelDrafter(runner, VocabMap(np.array([40, 41, 42, 43]), VOCAB, 4))
    penalties = SamplingParams(repetition_penalty=1.5, frequency_penalty=0.1)
    for params in (SamplingParams(), DRAWN, penalties):
        model.configure(params)
        model.begin([40, 7, 8], None)
        assert set(model.propose(4).tokens) <= {40, 41, 42, 43}
        assert runner.arena.rows[:3] == [0, 4, 4]


def test_noise_is_that_of_the_targets_id():
    logits = np.zeros(5, np.float32)
    pick = CoupledPick(VocabMap(np.arange(5) + 30, VOCAB, 0))
    pick.configure(DRAWN)
    full = np.full(VOCAB, -100, np.float32)
    full[30:35] = 0
    for position in range(20):
        assert pick.choose(logits, position)[0] == [sampling.pick(full, DRAWN, position)]


def test_coupled_draws_are_accepted_nearly_as_often_as_the_laws_overlap():
    rng = np.random.default_rng(0)
    hits = overlap = 0.0
    pick = CoupledPick(identity(300))
    sure = []
    for position in range(600):
        target = rng.normal(0, 2, 300).astype(np.float32)
        draft = target + rng.normal(0, 0.7, 300).astype(np.float32)
        params = SamplingParams(temperature=1.0, seed=position)
        pick.configure(params)
        tokens, confidences = pick.choose(draft, position)
        hit = tokens[0] == sampling.pick(target, params, position)
        hits += hit
        sure.append((confidences[0], hit))
        p, q = (np.exp(x - x.max()) / np.exp(x - x.max()).sum() for x in (target, draft))
        overlap += np.minimum(p, q).sum()
    assert hits > 0.8 * overlap
    sure.sort()
    low, high = (np.mean([hit for _, hit in part]) for part in (sure[:200], sure[-200:]))
    assert high > low + 0.2


def test_wrong_maps_are_named():
    with pytest.raises(BundleError, match=r"outside the target's 0\.\.9"):
        VocabMap(np.array([3, 10]), 10, 0)
    with pytest.raises(BundleError, match="twice"):
        VocabMap(np.array([3, 3]), 10, 0)
    with pytest.raises(BundleError, match="unknown id 3"):
        VocabMap(np.array([3, 4]), 10, 3)


@pytest.mark.parametrize("params", [SamplingParams(), DRAWN])
@given(st.lists(st.integers(0, 3), min_size=1, max_size=20), st.integers(1, 9))
@settings(max_examples=40)
def test_a_cascade_proposes_what_its_model_alone_does(params, ids, budget):
    alone, runner = drafter(), ToyRunner()
    cascade = Speculative(drafter(runner), NgramDrafter(min_match=1), most=3)
    proposals = []
    for one in (alone, cascade):
        if one is alone:
            one.configure(params)
        else:
            one.configure(params, 0)
        one.begin(ids, None)
        first = one.propose(budget)
        one.observe(verified(first, [*first.tokens[:2], 17]))
        proposals.append((first, one.propose(budget)))
    for mine, other in zip(*proposals, strict=True):
        assert mine.tokens == other.tokens
        assert np.allclose(mine.confidences, other.confidences, atol=1e-6)


def test_a_cascade_needs_fewer_steps_of_its_model():
    runner = ToyRunner(follow=lambda token: token % 5 + 1)
    cascade = Speculative(drafter(runner), NgramDrafter(), most=4)
    cascade.begin([1, 2, 3, 4, 5, 1, 2], None)
    tree = cascade.propose(10)
    assert tree.tokens == (3, 4, 5, 1, 2, 3, 4, 5, 1, 2)
    assert runner.steps == [11, 5][: len(runner.steps)]
    assert set(tree.sources) == {"model"}
    asked = []
    cascade.propose(10, lambda value: asked.append(value) or False)
    assert len(asked) == 1


def test_a_cascade_takes_a_model_only():
    with pytest.raises(OptionError, match="a model of its own"):
        Speculative(NgramDrafter(), NgramDrafter())
    with pytest.raises(OptionError, match="got 0"):
        Speculative(drafter(), NgramDrafter(), most=0)


def test_a_real_bundle_drafts(tmp_path):
    manifest, folder = tiny_bundle("llama", tmp_path, capacity=64)
    model = ModelDrafter(Runner(manifest, folder, threads=1, spin=False), identity(258))
    cascade_runner = Runner(manifest, folder, threads=1, spin=False)
    cascade = Speculative(ModelDrafter(cascade_runner, identity(258)), NgramDrafter(1))
    ids = [5, 6, 7, 5, 6]
    target = Runner(manifest, folder, threads=1, spin=False)
    expected = list(ids)
    for _ in range(6):
        target.arena.rewind(0)
        expected.append(int(target.step(expected)[0].argmax()))
    for one in (model, cascade):
        one.begin(ids, None)
        assert one.propose(6).tokens == tuple(expected[5:])
        one.close()
