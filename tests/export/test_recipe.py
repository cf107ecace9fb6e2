"""A changed graph comes with a new revision, or `pull` would keep bundles that lack it."""

import dataclasses
import hashlib
import json

import onnx
import pytest
from onnx import AttributeProto, helper
from tiny import CONFIGS, edit_manifest, tiny_bundle

from forerun.errors import BundleError
from forerun.export import recipe
from forerun.export.recipe import RECIPE, is_outdated
from forerun.quant import quantize as quantize_module
from forerun.quant.quantize import FORMATS, quantize
from forerun.runtime.manifest import load_manifest

# What tiny bundles of this revision look like. See `test_other_graphs_are_another_revision`.
REVISION = 3
SHAPES = {
    "llama": "f42a56d7e959",
    "mistral": "a2d80902b12a",
    "qwen2": "f08eee9292e1",
    "qwen3": "db1bf9965c3d",
    "gemma3": "e30e5c63106a",
    "int4": "f52787e5d817",
    "int4-fast": "5daa8c7787f0",
    "int4-exact": "f07af2857938",
    "int8": "4df2147c5313",
    "int8-rows": "b2c60724a899",
}

_PLAIN = (AttributeProto.INT, AttributeProto.INTS, AttributeProto.STRING)


def file_facts(path):
    """What a graph is made of, without weights and whatever the onnx package adds."""
    model = onnx.load(str(path), load_external_data=False)
    opsets = sorted([o.domain, o.version] for o in model.opset_import)
    return [path.name, opsets, *graph_facts(model.graph)]


def graph_facts(graph):
    values = [[value_fact(v) for v in values] for values in (graph.input, graph.output)]
    weights = sorted([t.name, t.data_type, list(t.dims)] for t in graph.initializer)
    return [values, [node_fact(node) for node in graph.node], weights]


def node_fact(node):
    attributes = sorted((a.name, attribute_fact(a)) for a in node.attribute)
    return [node.domain, node.op_type, list(node.input), list(node.output), attributes]


def attribute_fact(attribute):
    if attribute.type == AttributeProto.GRAPH:
        return graph_facts(attribute.g)
    return str(helper.get_attribute_value(attribute) if attribute.type in _PLAIN else None)


def value_fact(value):
    kind = value.type.tensor_type
    return [value.name, kind.elem_type, [d.dim_param or d.dim_value for d in kind.shape.dim]]


def form_facts(form):
    roles = [
        {role: [spec.name, spec.dtype, list(spec.shape)] for role, spec in specs.items()}
        for specs in (form.inputs, form.outputs)
    ]
    return [form.graph, *roles]


def shape_of(folder):
    """A short hash of all that the runtime sees of a bundle except for the weights."""
    manifest = load_manifest(folder)
    facts = [
        [file_facts(path) for path in sorted(folder.glob("*.onnx"))],
        {name: form_facts(form) for name, form in manifest.lowerings.items()},
        [manifest.kv.heads, manifest.kv.head_dim, manifest.kv.dtype, manifest.kv.bits],
        [manifest.taps, manifest.row_exact],
    ]
    text = json.dumps(facts, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


@pytest.fixture(scope="module")
def float_bundle(tmp_path_factory):
    return tiny_bundle("llama", tmp_path_factory.mktemp("llama"), static=True)[1]


@pytest.mark.parametrize("name", [*CONFIGS, *FORMATS])
def test_other_graphs_are_another_revision(name, float_bundle, tmp_path):
    folder = float_bundle
    if name in FORMATS:
        quantize(float_bundle, folder := tmp_path / "q", weights=name)
    elif name != "llama":
        folder = tiny_bundle(name, tmp_path, static=not CONFIGS[name].sliding_window)[1]
    found = shape_of(folder)
    assert load_manifest(folder).recipe == RECIPE
    assert REVISION == RECIPE, f"store REVISION = {RECIPE} here, and {found!r} for {name}"
    assert SHAPES.get(name) == found, (
        f"bundles of {name} differ from those that users have: raise RECIPE in export/recipe.py "
        f"and store this hash here: {found!r}"
    )


def test_the_hash_sees_an_output_that_is_gone(float_bundle):
    path = float_bundle / "model.onnx"
    before, data = shape_of(float_bundle), path.read_bytes()
    model = onnx.load(str(path), load_external_data=False)
    del model.graph.output[-1]
    path.write_bytes(model.SerializeToString())
    assert shape_of(float_bundle) != before
    # Another way to write down the same graph.
    model = onnx.load_from_string(data)
    model.producer_version, model.doc_string = "2", "the same"
    path.write_bytes(model.SerializeToString(deterministic=True))
    assert shape_of(float_bundle) == before
    path.write_bytes(data)


def test_bundles_of_before_are_outdated_and_load(float_bundle, tmp_path, monkeypatch):
    manifest = load_manifest(float_bundle)
    assert not is_outdated(manifest)
    assert not is_outdated(dataclasses.replace(manifest, recipe=RECIPE + 1))
    edit_manifest(float_bundle, lambda data: data.pop("recipe"))
    try:
        old = load_manifest(float_bundle)
        assert old.recipe == 0 and is_outdated(old)
        old.check_files(float_bundle)
        made = quantize(float_bundle, tmp_path / "q", weights="int8")
        assert made.recipe == 0, "what the float32 bundle lacks, the quantized one lacks"
        edit_manifest(float_bundle, lambda data: data.update(recipe="1"))
        with pytest.raises(BundleError, match="recipe"):
            load_manifest(float_bundle)
    finally:
        edit_manifest(float_bundle, lambda data: data.update(recipe=RECIPE))
    monkeypatch.setattr(recipe, "RECIPE", RECIPE + 1)
    assert is_outdated(manifest)
    monkeypatch.setattr(quantize_module, "RECIPE", RECIPE - 1)
    assert quantize(float_bundle, tmp_path / "r", weights="int8").recipe == RECIPE - 1
