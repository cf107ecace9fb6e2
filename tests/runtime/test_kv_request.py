"""What was asked of the KV cache becomes a manifest, or an error that says what is possible."""

import dataclasses

import numpy as np
import pytest
from tiny import tiny_bundle

from forerun.errors import OptionError
from forerun.quant.kv_graphs import with_layouts
from forerun.runtime.kv_request import KVRequest
from forerun.runtime.layouts import choose_layout, layout_name, layout_on
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
    for rows in (8, 35, 129):
        with pytest.raises(OptionError, match=f"take 36 to 128 rows, got {rows}"):
            KVRequest(window=rows).apply(bundle[0])
    with pytest.raises(OptionError, match="too small"):
        KVRequest(budget="1KB").apply(bundle[0])
    four = dataclasses.replace(bundle[0].kv, dtype="uint8", bits=4)
    forms = bundle[0].lowerings | {"cpu+int4": bundle[0].lowerings["cpu"]}
    both = dataclasses.replace(bundle[0], kv_layouts={"int4": four}, lowerings=forms)
    with pytest.raises(OptionError, match="webgpu runs the KV layout fp32 alone, not int4"):
        KVRequest(layout="int4").apply(both, "webgpu")
    with pytest.raises(OptionError, match="qnn runs the KV layout fp32 alone, not int4"):
        KVRequest(layout="int4").apply(both, "qnn")
    with pytest.raises(OptionError, match="this one is 4-bit: take --kv fp32"):
        KVRequest(layout="int4", window=40).apply(both)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"budget": 64e3}, "kv_budget is 64000.0, of the type float"),
        ({"budget": True}, "of the type bool"),
        ({"window": "64"}, "window is '64', of the type str"),
        ({"window": 64.0}, "of the type float"),
        ({"layout": 8}, "kv is 8, of the type int"),
    ],
)
def test_values_of_another_type_are_refused_by_it(wrong, words):
    with pytest.raises(OptionError, match=words):
        KVRequest(**wrong)


@pytest.fixture(scope="module")
def eight(tmp_path_factory):
    """A bundle that runs 8 bits by itself, has float32 too, and float32 alone on webgpu."""
    manifest, folder = tiny_bundle("llama", tmp_path_factory.mktemp("eight"), capacity=128)
    full = with_layouts(folder, manifest, SCALES, default="int8", names=("fp32", "int8", "int4"))
    return full, folder


SCALES = {
    name: {f"{part}.{layer}": np.full(32, 0.05) for layer in range(3) for part in ("key", "value")}
    for name in ("int8", "int4")
}


def test_a_device_runs_its_own_layout_whatever_the_default_is(eight):
    manifest, _ = eight
    assert (layout_name(manifest.kv), layout_name(layout_on(manifest, "webgpu"))) == (
        "int8",
        "fp32",
    )
    fit = manifest.kv.nbytes_per_token * 128
    full = 4 * fit
    view, line = KVRequest(budget=full).apply(manifest, "webgpu")
    assert "32-bit float, 128 tokens" in line and view.kv.capacity == 128
    with pytest.raises(OptionError, match="the KV cache on webgpu has 128 tokens"):
        KVRequest(budget=3 * fit).apply(manifest, "webgpu")
    with pytest.raises(OptionError, match="webgpu runs the KV layout fp32 alone, not int8"):
        KVRequest(layout="int8").apply(manifest, "webgpu")
    named, _ = KVRequest(layout="fp32").apply(manifest, "webgpu")
    assert named.lowerings["cpu"] == manifest.lowerings["cpu+fp32"]
    assert {"webgpu", "webgpu-tree", "webgpu-move"} <= set(named.lowerings)


def test_where_nothing_is_said_of_the_device_only_forms_that_can_do_it_are_left(eight, bundle):
    manifest, _ = eight
    fit = manifest.kv.nbytes_per_token * 128
    left = {
        name: "webgpu" in KVRequest(**asked).apply_anywhere(manifest).lowerings
        for name, asked in {
            "nothing": {},
            "what the cpu alone can hold": {"budget": fit},
            "enough for all": {"budget": 4 * fit},
            "its layout": {"layout": "fp32"},
            "another layout": {"layout": "int4"},
            "the default of the cpu": {"layout": "int8"},
        }.items()
        if name
    }
    assert [name for name, is_left in left.items() if is_left] == [
        "nothing",
        "enough for all",
        "its layout",
    ]
    windowed = KVRequest(window=40).apply_anywhere(bundle[0])
    assert set(windowed.lowerings) == {"cpu", "cpu-tree"} and windowed.kv.capacity == 40


def test_a_runner_says_which_cache_it_has(eight):
    manifest, folder = eight
    plain, wide = (Runner(manifest, folder, threads=1, lowering=f) for f in ("cpu", "webgpu"))
    assert (plain.manifest.kv.dtype, wide.manifest.kv.dtype) == ("int8", "float32")
    assert wide.arena.nbytes == 4 * plain.arena.nbytes
    own = Runner(choose_layout(manifest, "fp32"), folder, threads=1)
    np.testing.assert_allclose(wide.step([3, 4]), own.step([3, 4]), atol=1e-4)
