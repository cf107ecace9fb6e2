"""What was asked of the KV cache becomes a manifest, or an error that says what is possible."""

import dataclasses

import pytest
from tiny import tiny_bundle

from forerun.errors import OptionError
from forerun.runtime.kv_request import KVRequest
from forerun.runtime.runner import Runner


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return tiny_bundle("llama", tmp_path_factory.mktemp("llama"), capacity=128)


def test_nothing_asked_changes_nothing(bundle):
    assert KVRequest().apply(bundle[0]) == (bundle[0], "")
    assert KVRequest().arena(bundle[0]) is None


@pytest.mark.parametrize("budget", ["60KB", 60_000])
def test_a_budget_sets_the_capacity(bundle, budget):
    manifest, line = KVRequest(budget=budget).apply(bundle[0])
    assert manifest.kv.capacity == 60_000 // bundle[0].kv.nbytes_per_token == 78
    assert Runner(manifest, bundle[1], threads=1).arena.nbytes <= 60_000
    assert "32-bit float, 78 tokens" in line


def test_a_window_gets_its_arena(bundle):
    request = KVRequest(window=40)
    manifest, _ = request.apply(bundle[0])
    runner = Runner(manifest, bundle[1], threads=1, arena=request.arena(manifest))
    for token in range(100):
        runner.step([token])
    assert runner.arena.length == 100 and runner.arena.nbytes == manifest.kv.nbytes


def test_what_contradicts_itself(bundle):
    with pytest.raises(OptionError, match="give one"):
        KVRequest(budget="64MB", window=512)
    with pytest.raises(OptionError, match="64MiB"):
        KVRequest(budget="lots")
    with pytest.raises(OptionError, match="on the cpu"):
        KVRequest(window=40).apply(bundle[0], "webgpu")
    with pytest.raises(OptionError, match="1 to 128"):
        KVRequest(window=129).apply(bundle[0])
    with pytest.raises(OptionError, match="too small"):
        KVRequest(budget="1KB").apply(bundle[0])
    four = dataclasses.replace(bundle[0].kv, dtype="uint8", bits=4)
    forms = bundle[0].lowerings | {"cpu+int4": bundle[0].lowerings["cpu"]}
    both = dataclasses.replace(bundle[0], kv_layouts={"int4": four}, lowerings=forms)
    with pytest.raises(OptionError, match="runs the layout fp32 alone"):
        KVRequest(layout="int4").apply(both, "webgpu")
