import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from forerun.errors import BundleError, OptionError
from forerun.runtime import sampling
from forerun.runtime.noise import gumbel
from forerun.runtime.options import check_params
from forerun.runtime.types import SamplingParams

GREEDY = SamplingParams()
WARM = SamplingParams(temperature=1.0)


def some_logits(seed: int, vocab: int = 40) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 2, vocab).astype(np.float32)


def softmax(x):
    e = np.exp(x - np.max(x))
    return e / e.sum()


PARAMS = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.05, 0.7, 1.0, 2.5]),
    top_k=st.sampled_from([0, 1, 2, 7, 40, 1000]),
    top_p=st.sampled_from([1.0, 0.95, 0.5, 1e-9]),
    min_p=st.sampled_from([0.0, 0.02, 0.5, 1.0]),
    typical_p=st.sampled_from([1.0, 0.9, 0.3]),
    seed=st.integers(0, 2**64 - 1),
)


@given(st.integers(0, 999), PARAMS, st.integers(0, 5000))
def test_draw_is_the_argmax_of_log_p_plus_noise_over_survivors(seed, params, position):
    logits = some_logits(seed)
    kept = sampling.process_logits(logits, params)
    logp = kept.log_probabilities()
    assert math.isclose(np.exp(logp).sum(), 1, rel_tol=1e-9)
    noise = gumbel(params.seed, position, kept.ids)
    expected = int(kept.ids[np.argmax(logp + noise)])
    assert sampling.pick(logits, params, position) == expected


def test_a_lone_survivor_is_drawn_whatever_its_noise():
    # Its noise is then the largest of all, and rounding must not put it below its own bar.
    for position in range(3000):
        lone = sampling.Distribution(np.array([7]), np.array([8.0 + position / 7]))
        assert sampling.draw(lone, 3, position) == 7


@given(st.integers(0, 999), PARAMS)
def test_filters_agree_with_the_plain_definition(seed, params):
    logits = some_logits(seed)
    assert sampling.process_logits(logits, params).ids.tolist() == reference_survivors(
        logits.astype(np.float64), params
    )


@given(st.integers(0, 50), PARAMS)
def test_filters_agree_with_the_plain_definition_on_a_large_vocabulary(seed, params):
    logits = some_logits(seed, 3000)
    params = replace(params, top_p=min(params.top_p, 0.9))
    kept = sampling.process_logits(logits, params).ids.tolist()
    assert kept == reference_survivors(logits.astype(np.float64), params)


def reference_survivors(logits, params):
    """The filters written out over sorted lists, one after the other."""
    scores = {i: z / params.temperature for i, z in enumerate(logits)}

    def probabilities():
        return dict(zip(scores, softmax(np.array(list(scores.values()))), strict=True))

    def cut(order, mass):
        p, total, kept = probabilities(), 0.0, []
        for i in order:
            kept.append(i)
            total += p[i]
            if total >= mass:
                break
        return {i: scores[i] for i in kept}

    def by_probability():
        return sorted(scores, key=lambda i: (-scores[i], i))

    if params.top_k:
        scores = {i: scores[i] for i in by_probability()[: params.top_k]}
    if params.top_p < 1:
        scores = cut(by_probability(), params.top_p)
    if params.min_p:
        p = probabilities()
        edge = params.min_p * max(p.values())
        scores = {i: s for i, s in scores.items() if p[i] >= edge * (1 - 1e-12)}
    if params.typical_p < 1:
        p = probabilities()
        entropy = -sum(v * math.log(v) for v in p.values() if v > 0)
        order = sorted(sorted(scores), key=lambda i: abs(-math.log(p[i]) - entropy))
        scores = cut(order, params.typical_p)
    return sorted(scores)


def test_samples_follow_the_distribution():
    logits = some_logits(5, 12)
    draws = [sampling.pick(logits, replace(WARM, seed=9), i) for i in range(20_000)]
    expected = softmax(logits.astype(np.float64)) * len(draws)
    chi2 = ((np.bincount(draws, minlength=12) - expected) ** 2 / expected).sum()
    assert chi2 < 31.3  # 0.1 % point of chi-square with 11 degrees of freedom


def test_ties_go_to_the_lower_id():
    logits = np.zeros(10, np.float32)
    assert sampling.pick(logits, GREEDY, 0) == 0
    kept = sampling.process_logits(logits, replace(WARM, top_k=3))
    assert kept.ids.tolist() == [0, 1, 2]
    kept = sampling.process_logits(logits, replace(WARM, top_p=0.35))
    assert kept.ids.tolist() == [0, 1, 2, 3]


def test_repetition_penalty_lowers_seen_tokens_of_prompt_and_answer():
    logits = np.array([2.0, 1.9, -1.0, 0.5], np.float32)
    params = SamplingParams(repetition_penalty=2.0)
    out = sampling.adjust_logits(logits, params, [0, 2, 2], answer_start=1)
    assert out.tolist() == pytest.approx([1.0, 1.9, -2.0, 0.5])
    assert sampling.pick(logits, params, 3, [0, 2, 2], 1) == 1
    assert logits[0] == 2.0, "the model's logits must not change"


def test_presence_and_frequency_penalties_count_the_answer_only():
    logits = np.zeros(4, np.float32)
    params = SamplingParams(presence_penalty=0.5, frequency_penalty=0.25)
    out = sampling.adjust_logits(logits, params, [0, 1, 1, 3], answer_start=1)
    assert out.tolist() == pytest.approx([0, -1.0, 0, -0.75])


def test_logit_bias_bans_and_forces():
    logits = some_logits(1)
    best = int(logits.argmax())
    assert sampling.pick(logits, SamplingParams(logit_bias={best: -1e4}), 0) != best
    assert sampling.pick(logits, SamplingParams(logit_bias={17: 1e4}), 0) == 17
    assert sampling.pick(logits, replace(WARM, logit_bias={17: 1e4}), 0) == 17


def test_tiny_temperature_is_greedy_and_does_not_overflow():
    logits = some_logits(3)
    for temperature in (1e-320, 1e-30, 1e-3):
        params = replace(WARM, temperature=temperature)
        assert sampling.pick(logits, params, 4) == int(logits.argmax())


def test_logprob_is_of_the_unprocessed_model():
    logits = some_logits(2)
    expected = np.log(softmax(logits.astype(np.float64)))
    for token in range(len(logits)):
        assert sampling.logprob(logits, token) == pytest.approx(expected[token], abs=1e-5)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("params", [GREEDY, WARM])
def test_damaged_logits_are_an_error(bad, params):
    logits = some_logits(2)
    logits[3] = bad
    with pytest.raises(BundleError, match="not a finite number"):
        sampling.pick(logits, params, 0)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("temperature", "warm"),
        ("top_k", -1),
        ("top_k", 1.5),
        ("top_k", True),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("min_p", -0.1),
        ("min_p", 1.1),
        ("typical_p", 0),
        ("repetition_penalty", 0),
        ("repetition_penalty", -1.0),
        ("presence_penalty", math.nan),
        ("frequency_penalty", math.inf),
        ("seed", -1),
        ("seed", 2**64),
        ("seed", 1.0),
        ("logit_bias", {64: 1.0}),
        ("logit_bias", {-1: 1.0}),
        ("logit_bias", {"1": 1.0}),
        ("logit_bias", {1: math.nan}),
        ("logit_bias", [1]),
    ],
)
def test_values_out_of_range_are_named(name, value):
    with pytest.raises(OptionError, match=name):
        check_params(replace(GREEDY, **{name: value}), 64)


def test_limits_of_the_ranges_are_allowed():
    check_params(SamplingParams(), 64)
    check_params(SamplingParams(2, 10**9, 1, 1.0, 1, 0.5, -2, 2, {0: -100, 63: 100}, 2**64 - 1), 64)
