import dataclasses
import hashlib
import json

import numpy as np
import onnx
import pytest
from gear_tools import contents, dense_runner, fill, gear_bundle, gear_runner, view
from tiny import tiny_bundle

from forerun.errors import OptionError, UnsupportedError
from forerun.quant.gear import GEAR, gear_layout, with_gear
from forerun.quant.gear_graph import gear_graph, gear_inputs, gear_outputs
from forerun.quant.skip_graph import skipping_lowering, with_skipping
from forerun.runtime.gear.layout import CHUNK
from forerun.runtime.manifest import Manifest
from forerun.runtime.skipping import Fixed, Skip
from forerun.runtime.strict import decode

IDS = np.random.default_rng(3).integers(0, 256, 260)


def hashes(folder):
    return {p.name: hashlib.sha256(p.read_bytes()).digest() for p in folder.iterdir()}


@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3"])
def test_every_way_to_make_queries_is_understood(arch, tmp_path):
    """Packed, with biases, and with norms of their own; one key head or several."""
    dense, views, bundle = gear_bundle(tmp_path, arch=arch)
    plain = dense_runner(bundle, dense)
    for manifest in views.values():
        gear = gear_runner(bundle, manifest)
        gear.step(IDS[:200])
        fill(plain, gear.arena)
        got, want = gear.step(IDS[200:250], want="all"), plain.step(IDS[200:250], want="all")
        np.testing.assert_allclose(got, want, atol=1e-3)
        gear.close()


@pytest.mark.parametrize("rank, outliers", [(1, 0.0), (1, 0.02), (5, 0.0), (16, 0.2)])
@pytest.mark.parametrize("kind", GEAR)
def test_any_rank_and_share_of_outliers(kind, rank, outliers, gear_files):
    manifest, bundle = gear_files
    layout = gear_layout(manifest.kv, kind, rank=rank, outliers=outliers)
    full = with_gear(bundle, manifest, [kind])
    model = onnx.load(str(bundle / "model.onnx"), load_external_data=False)
    form = full.lowerings[f"cpu+{kind}"]
    name = f"model-{kind}-{rank}-{outliers}.onnx"
    (bundle / name).write_bytes(gear_graph(model, layout).SerializeToString())
    full.lowerings[f"cpu+{kind}"] = dataclasses.replace(form, graph=name)
    full.kv_layouts[kind] = layout
    gear, plain = gear_runner(bundle, view(full, kind)), dense_runner(bundle, manifest)
    gear.step(IDS[:150])
    fill(plain, gear.arena)
    assert contents(gear.arena)["key"].shape[2] == 150
    got, want = gear.step(IDS[150:170], want="all"), plain.step(IDS[150:170], want="all")
    np.testing.assert_allclose(got, want, atol=1e-3)
    for runner in (gear, plain):
        runner.close()


@pytest.fixture(scope="module")
def gear_files(tmp_path_factory):
    return tiny_bundle("llama", tmp_path_factory.mktemp("files"), capacity=256)


def test_only_a_small_graph_is_added_and_the_weights_are_shared(gear_files):
    manifest, bundle = gear_files
    for path in bundle.glob("model-gear-*"):
        path.unlink()
    before = hashes(bundle)
    full = with_gear(bundle, manifest)
    after = hashes(bundle)
    added = {f"model-{kind}.onnx" for kind in GEAR}
    assert set(after) - set(before) == added
    assert all(after[name] == digest for name, digest in before.items())
    for name in added:
        model = onnx.load(str(bundle / name), load_external_data=False)
        plain = onnx.load(str(bundle / "model.onnx"), load_external_data=False)
        outside = {
            t.name: [(e.key, e.value) for e in t.external_data] for t in plain.graph.initializer
        }
        for tensor in model.graph.initializer:
            if tensor.external_data:
                assert outside[tensor.name] == [(e.key, e.value) for e in tensor.external_data]
            else:
                assert tensor.ByteSize() < 20_000
        assert not any(n.op_type == "GroupQueryAttention" for n in model.graph.node)
    assert set(full.lowerings) - set(manifest.lowerings) == {
        f"cpu+{kind}{end}" for kind in GEAR for end in ("", "-tree")
    }
    assert all(full.lowerings[f"cpu+{k}"] == full.lowerings[f"cpu+{k}-tree"] for k in GEAR)
    assert full.kv == manifest.kv


@pytest.mark.parametrize("kind", GEAR)
def test_the_manifest_names_every_port_of_the_graph(kind, gear_files):
    manifest, bundle = gear_files
    full = with_gear(bundle, manifest, [kind])
    form, layout = full.lowerings[f"cpu+{kind}"], full.kv_layouts[kind]
    graph = onnx.load(str(bundle / form.graph), load_external_data=False).graph
    assert {s.name for s in form.inputs.values()} == {v.name for v in graph.input}
    assert {s.name for s in form.outputs.values()} == {v.name for v in graph.output}
    assert gear_inputs(layout).items() <= form.inputs.items()
    assert gear_outputs(layout).items() <= form.outputs.items()
    assert not any(
        name.startswith(("past_", "present_", "seqlens", "total")) for name in form.inputs
    )
    again = decode(Manifest, json.loads(full.to_json()))
    assert set(again.lowerings) == set(full.lowerings)
    assert again.kv_layouts == full.kv_layouts


@pytest.mark.parametrize("arch", ["mistral", "gemma3"])
def test_models_with_a_window_are_refused(arch, tmp_path):
    manifest, bundle = tiny_bundle(arch, tmp_path)
    with pytest.raises(UnsupportedError, match=r"local_window_size = .*another KV layout"):
        with_gear(bundle, manifest)
    assert not list(bundle.glob("model-gear*"))


def test_unknown_kinds_and_graphs_of_other_types_are_refused(gear_files):
    manifest, bundle = gear_files
    with pytest.raises(OptionError, match="'gear-x'"):
        with_gear(bundle, manifest, ["gear-x"])
    half = dataclasses.replace(manifest.kv, dtype="float16", bits=16)
    with pytest.raises(UnsupportedError, match="float16"):
        with_gear(bundle, dataclasses.replace(manifest, kv=half))
    with pytest.raises(UnsupportedError, match="cpu"):
        with_gear(bundle, dataclasses.replace(manifest, lowerings={}))
    model = onnx.load(str(bundle / "model.onnx"), load_external_data=False)
    layout = gear_layout(dataclasses.replace(manifest.kv, layers=7), "gear-kivi")
    with pytest.raises(UnsupportedError, match="3 attentions for 7 layers"):
        gear_graph(model, layout)


def test_a_graph_that_can_skip_still_can(tmp_path):
    """Its weights stand in branches, and its gate is part of the lowering."""
    manifest, bundle = tiny_bundle("llama", tmp_path, capacity=256)
    form, layers = manifest.lowerings["cpu"], manifest.model.layers
    with_skipping(bundle, form.graph)
    able = skipping_lowering(form, layers)
    manifest = dataclasses.replace(manifest, lowerings=manifest.lowerings | {"cpu": able})
    full = with_gear(bundle, manifest)
    gear = gear_runner(bundle, view(full, "gear-kivi"))
    gear.step(IDS[:100])
    whole = gear.step(IDS[100:101]).copy()
    assert gear.ffn_counts == (layers, layers)
    gear.arena.rewind(100)
    gear.skipping = Fixed("static", Skip(np.arange(layers) == 0), 0)
    assert np.abs(gear.step(IDS[100:101]) - whole).max() > 1e-3
    assert gear.ffn_counts[0] < 2 * layers
    gear.close()


def test_the_graph_that_is_given_stays_as_it_is(gear_files):
    manifest, bundle = gear_files
    model = onnx.load(str(bundle / "model.onnx"), load_external_data=False)
    text = model.SerializeToString(deterministic=True)
    gear_graph(model, gear_layout(manifest.kv, "gear-kcvt"))
    assert model.SerializeToString(deterministic=True) == text
    assert CHUNK == 64
