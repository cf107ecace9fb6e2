"""A KV cache in GEAR's form under SmolLM2-135M with its real weights."""

import os
import shutil

import numpy as np
import pytest
from gear_tools import dense_runner, fill, gear_runner, view

from forerun.devices.home import find_bundle
from forerun.quant.corpus import corpus_pieces
from forerun.quant.gear import GEAR, with_gear
from forerun.runtime.manifest import load_manifest

pytestmark = pytest.mark.model

CONTEXT = 224
KL_BOUND = 0.03


@pytest.fixture(scope="module")
def with_graphs(tmp_path_factory):
    """(manifest with GEAR's layouts, a folder that shares the weights of the installed bundle).

    In float32: activations rounded to 8 bits would blow up the last digit of a sum.
    """
    folder = find_bundle("smollm2-135m:fp32")
    copy = tmp_path_factory.mktemp("gear") / "bundle"

    def link(source, target):
        try:
            os.link(source, target)
        except OSError:
            shutil.copyfile(source, target)

    shutil.copytree(folder, copy, copy_function=link)
    for path in copy.glob("model-gear-*"):
        path.unlink()
    return with_gear(copy, load_manifest(copy)), copy


def log_softmax(x):
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


@pytest.mark.parametrize("kind", GEAR)
def test_a_quarter_of_the_bytes_costs_next_to_nothing(kind, with_graphs):
    manifest, bundle = with_graphs
    ids = corpus_pieces(manifest, bundle, CONTEXT, CONTEXT * 2)[0]
    gear, dense = gear_runner(bundle, view(manifest, kind)), dense_runner(bundle, manifest)
    want = log_softmax(dense.step(ids, want="all"))
    got = log_softmax(gear.step(ids, want="all"))
    behind = slice(64, None)
    kl = (np.exp(want) * (want - got)).sum(-1)[behind].mean()
    assert 1e-6 < kl < KL_BOUND
    layout = manifest.kv_layouts[kind]
    assert layout.nbytes_per_token <= 0.25 * manifest.kv.nbytes_per_token

    # The graph attends to exactly what its cache stands for.
    gear.arena.rewind(200)
    fill(dense, gear.arena)
    apart = np.abs(gear.step(ids[200:201]) - dense.step(ids[200:201]))
    assert apart.max() < 1e-3
    for runner in (gear, dense):
        runner.close()
