"""Drafting with real weights on the row-exact bundle: the text never changes, to the last bit."""

import numpy as np
import pytest
from draft_fakes import Random

import forerun
from forerun import SamplingParams
from forerun.runtime.drafting.registry import DRAFTERS
from forerun.runtime.manifest import load_manifest
from forerun.runtime.runner import Runner

pytestmark = pytest.mark.model

PROMPTS = (
    "Rewrite this with Anna instead of Peter: Peter went to the market. Peter bought apples.",
    "How do I make new friends in a big city?",
)
DRAWS = [SamplingParams(), *(SamplingParams(temperature=0.8, seed=seed) for seed in (1, 2, 3))]


@pytest.fixture(scope="module")
def text(exact):
    with forerun.load(exact, drafter="none", policy="fixed:4") as text:
        yield text


def tokens(text, prompt, params, drafter):
    text.session().reset()
    events = text.stream(prompt, max_tokens=40, sampling=params, drafter=drafter)
    return [event.token for event in events if event.token is not None]


NAMES = [name for name, row in DRAFTERS.items() if name != "none" and not row.skips]


@pytest.mark.parametrize("drafter", NAMES)
def test_every_drafter_leaves_the_text_as_it_is(drafter, text):
    for prompt in PROMPTS:
        for params in DRAWS:
            plain = tokens(text, prompt, params, "none")
            assert tokens(text, prompt, params, drafter) == plain, (prompt, params)


def test_a_random_drafter_leaves_the_text_as_it_is(text):
    for params in DRAWS:
        plain = tokens(text, PROMPTS[0], params, "none")
        assert tokens(text, PROMPTS[0], params, Random(200)) == plain, params


def test_rows_together_are_bit_equal_to_rows_alone(exact):
    runner = Runner(load_manifest(exact), exact)
    ids = np.random.default_rng(1).integers(0, 49000, 60)
    alone = np.concatenate([runner.step([token]).copy() for token in ids])
    for counts in ([60], [4] * 15, [1, 2, 3, 5, 8, 13, 16, 12]):
        runner.arena.rewind(0)
        start = 0
        for count in counts:
            rows = runner.step(ids[start : start + count], want="all")
            np.testing.assert_array_equal(rows, alone[start : start + count])
            start += count
    runner.close()
