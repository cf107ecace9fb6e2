import pytest

pytest.importorskip("torch")

from itertools import islice

import numpy as np
import torch
from tiny import tiny_bundle

from forerun.errors import UnsupportedError
from forerun.export.training import prompts
from forerun.export.training.target import TAP_FINAL, TorchTarget
from forerun.export.training.write import Sampling, write_data
from forerun.runtime.runner import Runner

TAPS = (1, 2, TAP_FINAL)
SAMPLING = Sampling(new_tokens=6)


@pytest.fixture(scope="module")
def target(target_bundle):
    return TorchTarget(target_bundle.folder, taps=TAPS, dtype=torch.float32)


@torch.inference_mode()
def test_it_computes_what_the_bundle_does(target, target_bundle):
    ids = np.random.default_rng(0).integers(0, 256, 40)
    runner = Runner(target_bundle.manifest, target_bundle.folder)
    expected = np.array(runner.step(ids, want="all")).reshape(40, -1)
    runner.close()
    states = target.forward(torch.from_numpy(ids)[None], 0, torch.tensor([0]), target.cache(1, 40))
    found = target.logits(states[0, :, -1]).numpy()
    assert np.abs(found - expected).max() < 1e-3 * expected.std()


@torch.inference_mode()
def test_padding_and_steps_change_nothing(target):
    ids = torch.from_numpy(np.random.default_rng(1).integers(0, 256, (1, 20)))
    whole = target.forward(ids, 0, torch.tensor([0]), target.cache(1, 20))
    pads = torch.tensor([5, 0])
    padded = torch.cat([torch.zeros(1, 5, dtype=torch.long), ids], 1)
    other = torch.randint(0, 256, (1, 25))
    cache = target.cache(2, 30)
    both = torch.cat([padded, other])
    parts = [target.forward(both[:, :18], 0, pads, cache)]
    parts += [target.forward(both[:, i : i + 1], i, pads, cache) for i in range(18, 25)]
    assert torch.allclose(torch.cat(parts, 1)[0, 5:], whole[0], atol=1e-4)


def read_back(target_bundle, folder, weights):
    """(bundle in that form, the one it was made from), as training reads them."""
    from forerun.export.training.weights import BundleWeights
    from forerun.quant.formats import FORMATS
    from forerun.quant.weights import WeightStore

    manifest = target_bundle.manifest
    store = WeightStore(manifest, target_bundle.folder, FORMATS[weights], lambda *a: None)
    store.write(folder)
    (folder / "manifest.json").write_text(manifest.to_json())
    return BundleWeights(folder), BundleWeights(target_bundle.folder)


def test_quantized_weights_are_read_as_they_are_meant(target_bundle, tmp_path):
    small, exact = read_back(target_bundle, tmp_path, "int8")
    for label in ("qkv.0", "down.2"):
        a, b = small.matrix(label), exact.matrix(label)
        assert a.shape == b.shape and 0 < np.abs(a - b).max() < 0.02 * np.abs(b).max()
    assert np.abs(small.head() - exact.head()).max() < 0.02 * np.abs(exact.head()).max()


@pytest.mark.parametrize("weights", ["int4", "int4-fast", "int4-exact"])
def test_so_are_those_in_4_bits(target_bundle, tmp_path, weights):
    small, exact = read_back(target_bundle, tmp_path, weights)
    for label in ("qkv.0", "gate_up.1", "down.2"):
        a, b = small.matrix(label), exact.matrix(label)
        # What the rounding itself leaves is a tenth; codes in a wrong place leave more than all.
        assert a.shape == b.shape and 0 < np.linalg.norm(a - b) < 0.25 * np.linalg.norm(b)
    a, b = small.head(), exact.head()
    assert np.linalg.norm(a - b) < 0.25 * np.linalg.norm(b)


@pytest.mark.parametrize(("arch", "why"), [("gemma3", "sliding"), ("qwen2", "llama")])
def test_other_kinds_of_models_are_refused(tmp_path, arch, why):
    _, folder = tiny_bundle(arch, tmp_path)
    with pytest.raises(UnsupportedError, match=why):
        TorchTarget(folder)


def test_answers_are_written_and_gone_on_with(target, target_bundle, tmp_path, monkeypatch):
    monkeypatch.setattr(prompts, "_HELD_OUT_PER_TEMPLATE", 1)

    def write(folder, tokens):
        return write_data(
            target, target_bundle.folder, folder, tokens=tokens, batch=8, sampling=SAMPLING
        )

    whole, parts = write(tmp_path / "a", 250), write(tmp_path / "b", 60)
    assert 60 <= parts.answer_tokens < whole.answer_tokens
    parts = write(tmp_path / "b", 250)
    assert parts.answers == whole.answers
    for name in ("ids", "top_ids", "states"):
        assert np.array_equal(parts.array(name), whole.array(name)), name
    check_answers(target, whole)


def check_answers(target, store):
    """States and labels are those of a plain run; greedy answers follow the argmax."""
    seen = {a.greedy for a in islice(store.answers, 40)}
    assert seen == {True, False} and store.answers[0].held_out
    for answer in store.answers[::7]:
        part = slice(answer.start, answer.start + answer.length)
        ids = torch.from_numpy(store.array("ids")[part].astype(np.int64))[None]
        with torch.inference_mode():
            cache = target.cache(1, answer.length)
            states = target.forward(ids, 0, torch.tensor([0]), cache)[0]
            logps = torch.log_softmax(target.logits(states[:, -1]), -1).numpy()
        assert np.allclose(store.array("states")[part], states.numpy(), rtol=2e-3, atol=2e-3)
        top = store.array("top_ids")[part]
        assert (top[: answer.prompt - 1] == -1).all()
        labelled = np.arange(answer.prompt - 1, answer.length)
        best = np.take_along_axis(logps[labelled], top[labelled].astype(np.int64), 1)
        assert np.allclose(best, store.array("top_logps")[part][labelled], atol=5e-3)
        assert np.allclose(best[:, 0], logps[labelled].max(-1), atol=1e-4)
        if answer.greedy:
            assert np.array_equal(ids[0, answer.prompt :].numpy(), top[answer.prompt - 1 : -1, 0])
