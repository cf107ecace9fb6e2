"""Every drafter against plain decoding: the same text, and drafts that are worth something."""

import numpy as np
import pytest
from draft_toys import ToyRunner
from fakes import FakeRunner, make_tokenizer

from forerun.runtime.drafting.combine import Chain, Fallback, Speculative, Union
from forerun.runtime.drafting.model import ModelDrafter
from forerun.runtime.drafting.ngram import NgramDrafter
from forerun.runtime.drafting.recycle import RecycleDrafter
from forerun.runtime.drafting.vocab import VocabMap, identity
from forerun.runtime.session import Session
from forerun.runtime.types import SamplingParams

VOCAB = 268


class ShortMemory(FakeRunner):
    """What it says depends on the last two ids alone, so that its text repeats itself."""

    def logits_after(self, ids):
        return np.float32(3) * super().logits_after([token % 40 for token in ids[-2:]])


class Copycat(ToyRunner):
    """A draft model that thinks nearly as the target does."""

    def __init__(self, target, vocab=VOCAB, capacity=512):
        super().__init__(vocab, capacity)
        self.target = target

    def row(self, ids):
        return (self.target.logits_after(ids)[: self.vocab] * 0.8).astype(np.float32)


def drafters(target):
    def model(**options):
        return ModelDrafter(Copycat(target, **options), identity(VOCAB))

    half = VocabMap(np.arange(200), VOCAB, 0)
    return {
        "ngram": lambda: NgramDrafter(),
        "ngram-1": lambda: NgramDrafter(min_match=1),
        "ngram-tree": lambda: NgramDrafter(branches=3),
        "recycle": lambda: RecycleDrafter(VOCAB),
        "recycle-tree": lambda: RecycleDrafter(VOCAB, branches=3),
        "fallback": lambda: Fallback(NgramDrafter(), RecycleDrafter(VOCAB), least=0.5),
        "union": lambda: Union(NgramDrafter(), RecycleDrafter(VOCAB, branches=2)),
        "chain": lambda: Chain(model(), 2, NgramDrafter()),
        "model": model,
        "small-model": lambda: model(capacity=24),
        "model-of-200-ids": lambda: ModelDrafter(Copycat(target, 200), half),
        "cascade": lambda: Speculative(model(), NgramDrafter(1)),
    }


NAMES = list(drafters(None))


@pytest.fixture
def setup(tmp_path):
    manifest, tokenizer = make_tokenizer(tmp_path, capacity=200, vocab=VOCAB)
    return (lambda: ShortMemory(manifest, never=(1,))), tokenizer


def answers(session, params, **options):
    """Three turns on one session, the second of which goes on where the first one ended."""
    texts = []
    for prompt in ([5, 6, 7, 8], None, [5, 6, 9]):
        prompt = prompt or [*session.tokens, 11, 12]
        pairs = session.generate_ids(prompt, max_tokens=50, sampling=params, **options)
        texts.append([token for token, _ in pairs])
    return texts


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(),
        SamplingParams(temperature=0.8, seed=1),
        SamplingParams(temperature=0.8, top_p=0.9, repetition_penalty=1.1, seed=2),
    ],
    ids=["greedy", "sampled", "penalised"],
)
def test_the_text_is_that_of_plain_decoding(setup, name, params):
    make, tokenizer = setup
    plain = answers(Session(make(), tokenizer), params)
    target = make()
    drafter = drafters(target)[name]()
    assert answers(Session(target, tokenizer), params, drafter=drafter) == plain
    assert all(len(text) == 50 for text in plain)


@pytest.mark.parametrize("name", NAMES)
def test_it_saves_steps(setup, name):
    make, tokenizer = setup
    target = make()
    drafter = drafters(target)[name]()
    answers(Session(target, tokenizer), SamplingParams(), drafter=drafter)
    assert len(target.steps) < 130, f"{name}: {len(target.steps)} steps for 150 tokens"


def test_a_sliding_context(setup):
    make, tokenizer = setup

    def text(**options):
        target = make()
        options = {name: value(target) for name, value in options.items()}
        return list(
            Session(target, tokenizer).generate_ids(
                [5, 6, 7], max_tokens=400, context="slide", **options,
                sampling=SamplingParams(temperature=0.7, seed=4),
            )
        )  # fmt: skip

    plain = text()
    for name in ("ngram", "recycle-tree", "model", "small-model", "cascade"):
        assert text(drafter=lambda target, name=name: drafters(target)[name]()) == plain
    assert len(plain) == 400
