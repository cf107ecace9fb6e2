"""The static form of a graph: standard operators, the same weights file, checked like the other."""

import numpy as np
import onnx
import pytest
from tiny import tiny_bundle, tiny_source

from forerun.errors import ExportMismatch, OptionError, UnsupportedError
from forerun.export import npu
from forerun.export.arch import ARCHITECTURES
from forerun.export.export import export_model
from forerun.export.reference import reference_logits
from forerun.export.shorter import FirstLayers
from forerun.quant.quantize import quantize
from forerun.runtime.manifest import load_manifest
from forerun.runtime.static_runner import StaticRunner


@pytest.mark.parametrize(
    "arch, changes", [("llama", {}), ("qwen2", {"tied": False}), ("qwen3", {})]
)
def test_the_static_form_equals_the_reference(arch, changes, tmp_path):
    manifest, folder = tiny_bundle(arch, tmp_path, static=True, **changes)
    assert [check.metric for check in manifest.checks] == ["max_abs_error", "max_abs_error_npu"]
    assert manifest.checks[1].value <= manifest.checks[1].bound
    assert load_manifest(folder) == manifest
    source = tiny_source(arch, tmp_path / "again", **changes)
    ids = np.arange(40) % 200
    static = StaticRunner(manifest, folder, threads=1)
    expected = reference_logits(source, ARCHITECTURES[arch], ids)
    np.testing.assert_allclose(static.step(ids, want="all"), expected, atol=1e-3)


def test_it_has_standard_operators_only_and_no_weights_of_its_own(tmp_path):
    _, plain = tiny_bundle("llama", tmp_path / "plain")
    manifest, folder = tiny_bundle("llama", tmp_path / "static", static=True)
    for name in ("npu", "npu-embed"):
        path = folder / manifest.lowerings[name].graph
        model = onnx.load(path)
        onnx.checker.check_model(model, full_check=True)
        assert {node.domain for node in model.graph.node} == {""}
        assert path.stat().st_size < 100_000
    weights = [bundle / "weights.bin" for bundle in (plain, folder)]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    assert "npu" not in load_manifest(plain).lowerings


def test_every_shape_is_fixed_once_the_width_is(tmp_path):
    manifest, folder = tiny_bundle("llama", tmp_path, static=True)
    model = onnx.load(folder / "model-npu.onnx")
    axes = {"S": 4, "U": 4 * manifest.kv.heads}
    for value in (*model.graph.input, *model.graph.output):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param:
                dim.dim_value = axes[dim.dim_param]
    del model.graph.value_info[:]
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True)
    values = inferred.graph.value_info
    assert len(values) >= len(model.graph.node) - len(model.graph.output)
    free = [v.name for v in values for d in v.type.tensor_type.shape.dim if not d.dim_value]
    assert not free


def test_a_wrong_static_graph_is_found(tmp_path, monkeypatch):
    right = npu.StaticRewriter._rotated
    monkeypatch.setattr(
        npu.StaticRewriter,
        "_rotated",
        lambda self, x, cos, sin, half: right(self, x, sin, cos, half),
    )
    with pytest.raises(ExportMismatch, match="npu"):
        tiny_bundle("llama", tmp_path, static=True)
    assert not (tmp_path / "bundle").exists()


@pytest.mark.parametrize("arch", ["mistral", "gemma3"])
def test_windows_are_refused(arch, tmp_path):
    with pytest.raises(UnsupportedError, match="window"):
        tiny_bundle(arch, tmp_path, static=True)


def test_a_quantized_graph_is_refused(tmp_path):
    _, folder = tiny_bundle("llama", tmp_path)
    quantize(folder, tmp_path / "int8", weights="int8")
    chain = load_manifest(tmp_path / "int8").lowerings["cpu"]
    with pytest.raises(UnsupportedError, match="float32 bundle"):
        npu.write_static_graph(tmp_path / "int8", chain)


def test_quantizing_leaves_the_static_form_behind(tmp_path):
    _, folder = tiny_bundle("llama", tmp_path, static=True)
    manifest = quantize(folder, tmp_path / "int8", weights="int8")
    assert "cpu" in manifest.lowerings and not {"npu", "npu-embed"} & set(manifest.lowerings)
    assert not {"model-npu.onnx", "embed.onnx"} & {p.name for p in (tmp_path / "int8").iterdir()}


def test_the_first_layers_are_a_model_of_their_own(tmp_path):
    source = FirstLayers(tiny_source("llama", tmp_path / "source"), 2)
    manifest = export_model(source, tmp_path / "out", name="x", capacity=32, static=True)
    assert manifest.model.layers == manifest.kv.layers == 2
    assert manifest.source.origin == "test (the first 2 of 3 layers)"
    assert not [name for name in source.names() if name.startswith("model.layers.2.")]
    for layers in (0, 4):
        with pytest.raises(OptionError, match="3 layers"):
            FirstLayers(source._source, layers)
