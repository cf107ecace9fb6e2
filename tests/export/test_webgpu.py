"""The graphs for GPUs, run on the CPU: the same numbers over the same weights."""

import dataclasses

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from tiny import CONFIGS, tiny_bundle

from forerun.export.webgpu import with_webgpu, without_webgpu, write_webgpu_graphs
from forerun.quant.quantize import quantize
from forerun.runtime.manifest import load_manifest
from forerun.runtime.runner import Runner

IDS = [3, 200, 7, 7, 31, 9, 120, 4, 5, 66]


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return tiny_bundle("llama", tmp_path_factory.mktemp("llama"), capacity=64)


def nodes_of(folder, name, op):
    model = onnx.load(str(folder / name), load_external_data=False)
    return [node for node in model.graph.node if node.op_type == op], model.graph


def steps(runner):
    """Logits of a prompt, of two steps behind it, and of a step after a rewind."""
    parts = [runner.step(IDS, want="all").copy(), runner.step([1]).copy()]
    parts.append(runner.step([2, 3, 4], want="all").copy())
    runner.arena.rewind(5)
    return np.concatenate([*parts, runner.step([8]).copy()])


@pytest.mark.parametrize("arch", CONFIGS)
def test_every_architecture_gives_the_same(arch, tmp_path):
    manifest, folder = tiny_bundle(arch, tmp_path, capacity=64)
    assert "webgpu" in manifest.lowerings and "webgpu-move" in manifest.lowerings
    assert ("webgpu-tree" in manifest.lowerings) == ("cpu-tree" in manifest.lowerings)
    same = [steps(Runner(manifest, folder, threads=1, lowering=f)) for f in ("cpu", "webgpu")]
    np.testing.assert_allclose(*same, atol=2e-4)


@pytest.mark.parametrize("weights", ["int4", "int4-exact", "int8"])
def test_quantized_bundles_have_them_too(weights, llama, tmp_path):
    manifest = quantize(llama[1], tmp_path / "q", weights=weights)
    assert load_manifest(tmp_path / "q") == manifest
    products, graph = nodes_of(tmp_path / "q", "model-webgpu.onnx", "MatMulNBits")
    levels = {a.i for node in products for a in node.attribute if a.name == "accuracy_level"}
    assert products and levels == {0}, "activations stay float32"
    assert not [n for n in graph.node if n.op_type in ("MatMulIntegerToFloat", "QuantizeLinear")]
    cache = manifest.lowerings["webgpu"].inputs["past_key.0"]
    assert cache.dtype == "float32"
    assert {v.type.tensor_type.elem_type for v in graph.input if v.name.startswith("past_")} == {1}
    # The cache of `KVArena` is the CPU's, so an 8-bit one cannot be lent to the other graph.
    plain = dataclasses.replace(manifest, kv=dataclasses.replace(manifest.kv, dtype="float32"))
    got = steps(Runner(plain, tmp_path / "q", threads=1, lowering="webgpu"))
    want = steps(Runner(manifest, tmp_path / "q", threads=1))
    assert np.abs(got - want).mean() < 0.1 * want.std()


def test_no_weights_are_added(llama):
    manifest = llama[0]
    assert sorted(n for n in manifest.files if n.endswith(".bin")) == ["weights.bin"]
    grown = sum(manifest.files[n].bytes for n in ("model-webgpu.onnx", "kv-move.onnx"))
    assert grown < 20_000


def test_attention_does_not_rotate_by_itself(llama):
    found, graph = nodes_of(llama[1], "model-webgpu-tree.onnx", "GroupQueryAttention")
    assert len(found) == 3
    for node in found:
        assert {a.i for a in node.attribute if a.name == "do_rotary"} == {0}
        assert node.input[10] == "bias" and not any(node.input[7:10])
    turned = [n for n in graph.node if n.op_type == "RotaryEmbedding"]
    assert len(turned) == 6 and {n.input[1] for n in turned} == {"positions"}


@pytest.mark.parametrize("hidden", [64, 192])
def test_zero_points_of_odd_rows_are_repacked(hidden, tmp_path):
    _, folder = tiny_bundle("llama", tmp_path, capacity=32, hidden=hidden)
    manifest = quantize(folder, tmp_path / "q", weights="int4-gptq")
    (gather,), graph = nodes_of(tmp_path / "q", "model-webgpu.onnx", "GatherBlockQuantized")
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    zeros = tensors[gather.input[3]]
    assert zeros.data_type == onnx.TensorProto.UINT4
    assert list(zeros.dims) == [258, hidden // 64] == list(numpy_helper.to_array(zeros).shape)
    plain = Runner(manifest, tmp_path / "q", threads=1)
    other = Runner(manifest, tmp_path / "q", threads=1, lowering="webgpu")
    want = plain.step(IDS, want="all").copy()
    assert np.abs(other.step(IDS, want="all") - want).mean() < 0.1 * want.std()


@pytest.mark.parametrize(("op", "attribute"), [("TensorScatter", None), (None, "softcap")])
def test_what_a_gpu_lacks_gives_no_form(op, attribute, llama, tmp_path):
    manifest, folder = llama
    model = onnx.load(str(folder / "model.onnx"), load_external_data=False)
    node = next(n for n in model.graph.node if n.op_type == "GroupQueryAttention")
    if op:
        node.op_type = op
    else:
        node.attribute.append(onnx.helper.make_attribute(attribute, 30.0))
    (tmp_path / "model.onnx").write_bytes(model.SerializeToString())
    forms = {"cpu": manifest.lowerings["cpu"]}
    assert write_webgpu_graphs(tmp_path, forms, manifest.kv) == {}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.onnx"]


def test_taking_them_out_and_putting_them_back(llama):
    manifest, folder = llama
    bare = without_webgpu(manifest)
    assert list(bare.lowerings) == ["cpu", "cpu-tree"]
    assert not [name for name in bare.files if "webgpu" in name or "move" in name]
    assert with_webgpu(folder, bare).lowerings == manifest.lowerings
