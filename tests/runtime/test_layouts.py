"""Which layouts there are, and the choice of one of a bundle's."""

import dataclasses
from pathlib import Path

import pytest
from tiny import tiny_bundle

from forerun.errors import BundleError, OptionError
from forerun.runtime.layouts import (
    LAYOUTS,
    check_layouts,
    choose_layout,
    layout_name,
    layout_on,
    layouts_of,
    lowering_of,
)
from forerun.runtime.manifest import KVLayout
from forerun.runtime.open import open_runner
from forerun.runtime.probe import best_threads

PLAIN = KVLayout(3, 2, 16, 64)


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    """A float32 bundle that also has 4 bits, by its manifest."""
    plain = tiny_bundle("llama", tmp_path_factory.mktemp("llama"), capacity=64)[0]
    forms = plain.lowerings
    own = {
        lowering_of("int4"): dataclasses.replace(forms["cpu"], graph="model-int4.onnx"),
        lowering_of("int4", True): dataclasses.replace(forms["cpu-tree"], graph="four-tree.onnx"),
        lowering_of("gear-kcvt"): dataclasses.replace(forms["cpu"], graph="gear.onnx"),
    }
    layouts = {
        "int4": dataclasses.replace(plain.kv, dtype="uint8", bits=4),
        "gear-kcvt": dataclasses.replace(plain.kv, kind="gear-kcvt", bits=4),
    }
    return dataclasses.replace(
        plain, kv_layouts=layouts, lowerings=forms | own, row_exact=True, kv=plain.kv
    )


def test_every_layout_is_found_by_its_name():
    for name, row in LAYOUTS.items():
        layout = dataclasses.replace(
            PLAIN, kind=row.kind, dtype=row.dtype or "uint8", bits=row.bits or 2
        )
        assert layout_name(layout) == name


@pytest.mark.parametrize(
    "change",
    [{"kind": "turbo"}, {"dtype": "float8"}, {"bits": 2}, {"dtype": "uint8", "bits": 8}],
)
def test_an_unknown_layout_asks_for_an_update(change, manifest):
    odd = dataclasses.replace(PLAIN, **change)
    with pytest.raises(BundleError, match="update forerun"):
        layout_name(odd)
    with pytest.raises(BundleError, match="update forerun"):
        check_layouts(dataclasses.replace(manifest, kv=odd))
    with pytest.raises(BundleError, match="update forerun"):
        choose_layout(dataclasses.replace(manifest, kv_layouts={"int4": odd}), None)


def test_a_layout_must_be_what_it_is_called_and_have_a_graph(manifest):
    wrong = dataclasses.replace(manifest, kv_layouts={"int8": manifest.kv_layouts["int4"]})
    with pytest.raises(BundleError, match="in truth"):
        check_layouts(wrong)
    forms = {n: f for n, f in manifest.lowerings.items() if n != "cpu+int4"}
    with pytest.raises(BundleError, match="no lowering 'cpu\\+int4'"):
        check_layouts(dataclasses.replace(manifest, lowerings=forms))


def test_the_view_runs_the_chosen_layout(manifest):
    assert layouts_of(manifest) == ["fp32", "int4", "gear-kcvt"]
    view = choose_layout(manifest, "int4")
    assert view.kv == manifest.kv_layouts["int4"] and not view.kv_layouts
    assert {n: f.graph for n, f in view.lowerings.items()} == {
        "cpu": "model-int4.onnx",
        "cpu-tree": "four-tree.onnx",
    }
    assert set(choose_layout(manifest, "gear-kcvt").lowerings) == {"cpu"}


@pytest.mark.parametrize("name", [None, "fp32"])
def test_the_default_keeps_its_devices(manifest, name):
    view = choose_layout(manifest, name)
    assert view.kv == manifest.kv and view.lowerings["cpu"].graph == "model.onnx"
    assert "webgpu" in view.lowerings and not any("+" in name for name in view.lowerings)


def test_only_layouts_that_are_row_exact_keep_the_promise(manifest):
    own, *others = layouts_of(manifest)
    assert choose_layout(manifest, own).row_exact, "of its own layout the bundle knows"
    exact = {name: choose_layout(manifest, name).row_exact for name in others}
    assert exact == {"int4": True, "gear-kcvt": False}
    loose = dataclasses.replace(manifest, row_exact=False)
    assert not choose_layout(loose, "int4").row_exact


def test_wrong_names_list_the_right_ones(manifest):
    with pytest.raises(OptionError, match=r"no KV layout 'int5', there are fp32, .*has fp32, int4"):
        choose_layout(manifest, "int5")
    with pytest.raises(OptionError, match="forerun quantize --kv int8"):
        choose_layout(manifest, "int8")
    # There is no option that makes one, for it comes by itself.
    with pytest.raises(OptionError, match="`forerun quantize` of a float32 bundle adds it"):
        choose_layout(manifest, "gear-kivi")
    with pytest.raises(OptionError, match=r"webgpu runs .* fp32 alone, not int5; there are fp32"):
        choose_layout(manifest, "int5", "webgpu")


def test_a_form_says_itself_which_layout_it_runs(manifest):
    assert layout_on(manifest, "webgpu") == manifest.kv == layout_on(manifest, "nothing")
    eight = dataclasses.replace(manifest.kv, dtype="int8", bits=8, group=4)
    of_cpu = dataclasses.replace(manifest, kv=eight)
    assert layout_on(of_cpu, "webgpu") == manifest.kv
    odd = dataclasses.replace(manifest.lowerings["webgpu"].inputs["past_key.0"], dtype="bfloat16")
    form = dataclasses.replace(manifest.lowerings["webgpu"], inputs={"past_key.0": odd})
    forms = manifest.lowerings | {"webgpu": form}
    with pytest.raises(BundleError, match=r"'webgpu' is bfloat16.* update forerun"):
        layout_on(dataclasses.replace(manifest, lowerings=forms), "webgpu")


def test_a_layout_that_only_a_device_has_runs_there_alone(manifest):
    eight = dataclasses.replace(manifest.kv, dtype="int8", bits=8)
    made = dataclasses.replace(manifest, kv=eight, kv_layouts={})
    view = choose_layout(made, "fp32", "webgpu")
    assert view.kv == manifest.kv and set(view.lowerings) == {
        "webgpu",
        "webgpu-move",
        "webgpu-tree",
    }
    with pytest.raises(OptionError, match="allow_fallback needs a graph for the cpu"):
        open_runner(view, Path(), device="webgpu", allow_fallback=True)
    assert best_threads(view) is None
