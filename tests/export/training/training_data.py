"""Made-up training data."""

import numpy as np

from forerun.export.training.data import TOP, TokenStore

VOCAB, HIDDEN, TAPS = 40, 32, 3
CATEGORIES = ("story", "list")


def make_entry(rng, prompt=4, length=12, held_out=False, category="story"):
    """Arrays and facts of one greedy answer with random contents."""
    top = np.argsort(rng.random((length, VOCAB)))[:, :TOP].astype(np.int32)
    logps = -np.sort(rng.random((length, TOP)) * 3)
    ids = rng.integers(0, VOCAB, length)
    ids[prompt:] = top[prompt - 1 : length - 1, 0]
    top[: prompt - 1] = -1
    states = rng.standard_normal((length, TAPS + 1, HIDDEN))
    arrays = {"ids": ids, "states": states, "top_ids": top, "top_logps": logps}
    facts = {"prompt": prompt, "template": 0, "category": category, "greedy": True}
    return arrays, facts | {"held_out": held_out}


def fill_store(folder, answers=12, seed=0):
    """A store with two held-out answers and some to train on."""
    rng = np.random.default_rng(seed)
    store = TokenStore(folder, TAPS + 1, HIDDEN)
    store.append([make_entry(rng, held_out=True, category=c) for c in CATEGORIES])
    store.append([make_entry(rng, length=8 + i % 5) for i in range(answers)])
    return store
