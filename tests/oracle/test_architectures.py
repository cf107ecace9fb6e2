"""Every architecture row against transformers, on tiny random models."""

import numpy as np
import pytest
import torch

from forerun.errors import BundleError
from forerun.export.arch import ARCHITECTURES
from forerun.runtime.manifest import load_manifest
from forerun.runtime.runner import Runner

LENGTHS = (1, 2, 11, 12, 13, 40, 100)
COUNT = 32
RELATIVE = 2e-4


@pytest.fixture
def tiny(tiny_model, tiny_name):
    return tiny_model(tiny_name)


@pytest.fixture
def runner(tiny):
    runner = Runner(load_manifest(tiny.bundle), tiny.bundle, threads=1)
    yield runner
    runner.close()


def reference(model, ids):
    with torch.inference_mode():
        return model(input_ids=torch.tensor(ids)[None], use_cache=False).logits[0].numpy()


def rows(runner, ids):
    return runner.step(ids, want="all").reshape(len(ids), -1).copy()


def text(length, seed):
    return np.random.default_rng(seed).integers(3, 259, length)


def close(found, expected, label):
    error, bound = np.abs(found - expected).max(), RELATIVE * expected.std()
    assert error <= bound, f"{label}: differs by {error:.3g}, allowed is {bound:.3g}"


def test_every_row_is_covered(model_types):
    assert {kind.removesuffix("_text") for kind in model_types} == set(ARCHITECTURES)


def test_logits_of_a_prefill(tiny, runner):
    for length in LENGTHS:
        ids = text(length, length)
        runner.arena.rewind(0)
        close(rows(runner, ids), reference(tiny.model, ids), f"{tiny.name}, {length} rows")


def test_logits_in_pieces(tiny, runner):
    ids = text(60, 7)
    expected = reference(tiny.model, ids)
    for widths in ([10, 1, 1, 20, 5, 23], [1] * 60, [59, 1]):
        runner.arena.rewind(0)
        found = [rows(runner, part) for part in np.split(ids, np.cumsum(widths)[:-1])]
        close(np.concatenate(found), expected, f"{tiny.name}, steps of {widths[:3]}...")


def test_a_rewound_cache_gives_the_same(tiny, runner):
    ids, other = text(30, 1), text(30, 2)
    rows(runner, other)
    runner.arena.rewind(0)
    rows(runner, ids[:20])
    rows(runner, other[:8])
    runner.arena.rewind(20)
    close(rows(runner, ids[20:]), reference(tiny.model, ids)[20:], tiny.name)


def test_a_tree_of_rows(tiny, runner):
    history, ids = text(20, 3), text(6, 4)
    parents = [-1, 0, 0, 1, 2, 4]
    if "cpu-tree" not in runner.manifest.lowerings:
        assert getattr(tiny.model.config, "sliding_window", None), "only windows rule trees out"
        with pytest.raises(BundleError, match="cpu-tree"):
            runner.step(ids, parents=parents)
        return
    rows(runner, history)
    found = runner.step(ids, want="all", parents=parents).reshape(len(ids), -1).copy()
    for row in range(len(ids)):
        path, at = [], row
        while at >= 0:
            path.insert(0, ids[at])
            at = parents[at]
        expected = reference(tiny.model, np.concatenate([history, path]))[-1]
        close(found[row], expected, f"{tiny.name}, row {row} of a tree")
    runner.arena.commit([0, 2, 4])
    kept = np.concatenate([history, ids[[0, 2, 4]], text(3, 5)])
    close(rows(runner, kept[-3:]), reference(tiny.model, kept)[-3:], f"{tiny.name}, committed")


def test_greedy_tokens(tiny, runner, oracle):
    prompts = [text(length, 100 + length).tolist() for length in LENGTHS[:-1]]
    expected = [oracle.greedy_torch(tiny.model, [prompt], COUNT)[0] for prompt in prompts]
    found = [oracle.greedy_runner(runner, prompt, COUNT) for prompt in prompts]
    oracle.same_tokens(expected, found, tiny.name, max_ties=1)
