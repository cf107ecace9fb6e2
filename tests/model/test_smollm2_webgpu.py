"""The real model on a WebGPU device; few tokens, since SwiftShader takes seconds for each."""

import numpy as np
import pytest

from forerun.runtime.drafting.choice import Drafters, Means
from forerun.runtime.drafting.fixed import FixedPolicy
from forerun.runtime.drafting.ngram import NgramDrafter
from forerun.runtime.manifest import load_manifest
from forerun.runtime.open import open_runner
from forerun.runtime.session import Session
from forerun.runtime.tokenizer import Tokenizer

pytestmark = [pytest.mark.model, pytest.mark.gpu]

TEXT = "One two three four one two three four one two three"
TOKENS = 3


@pytest.fixture(scope="module")
def gpu(webgpu, exact):
    runner = open_runner(load_manifest(exact), exact, device=webgpu)
    yield runner
    runner.close()


@pytest.fixture(scope="module")
def ids(exact):
    return Tokenizer(load_manifest(exact), exact).encode(TEXT)


def test_it_says_what_the_cpu_says(gpu, exact, ids):
    cpu = open_runner(load_manifest(exact), exact)
    want, got = cpu.step(ids, want="all"), gpu.step(ids, want="all")
    same = want.argmax(-1) == got.argmax(-1)
    leads = np.diff(np.sort(want, axis=-1)[:, -2:], axis=-1)[:, 0]
    assert same[leads > 1.0].all() and same.mean() >= 0.75
    assert np.abs(got - want).mean() < 0.15 * want.std()
    cpu.close()


def test_drafting_on_the_cpu_does_not_change_its_text(gpu, exact, ids):
    means = Means(lambda drafter: FixedPolicy(3))
    session = Session(
        gpu,
        Tokenizer(gpu.manifest, exact),
        drafters=Drafters(gpu.manifest, lambda name: NgramDrafter(), means=lambda: means),
    )
    said, figures = [], []
    for drafter in ("none", "ngram"):
        events = list(session.generate(ids, max_tokens=TOKENS, drafter=drafter))
        said.append([event.token for event in events if event.token is not None])
        figures.append(events[-1].stats)
    assert said[0] == said[1]
    assert figures[1].accepted > 0 and figures[1].rounds < TOKENS - 1
    assert figures[1].devices == {"target": "webgpu", "draft": "cpu"}
    assert figures[1].verify_ms > figures[1].draft_ms > 0
