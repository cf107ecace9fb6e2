"""Quantized bundles are measured before they are let out, and leave nothing behind otherwise."""

import dataclasses

import numpy as np
import pytest
from tiny import tiny_bundle

from forerun.errors import BundleError, ExportMismatch, OptionError, UnsupportedError
from forerun.quant import quantize as module
from forerun.quant.gate import Limits, QualityMismatch
from forerun.quant.quantize import FORMATS, Wish, quantize
from forerun.runtime.layouts import LAYOUTS, choose_layout, layouts_of
from forerun.runtime.manifest import load_manifest
from forerun.runtime.open import open_runner
from forerun.runtime.runner import Runner


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fp32")
    return tiny_bundle("llama", folder, capacity=256)[1]


@pytest.mark.parametrize("weights", FORMATS)
def test_quantize(weights, bundle, tmp_path):
    stages = []
    manifest = quantize(
        bundle, tmp_path / "q", weights=weights, progress=lambda *a: stages.append(a[0])
    )
    assert load_manifest(tmp_path / "q") == manifest
    assert manifest.quantization.method == weights
    assert manifest.checks[-1].metric == "kl_mean"
    assert {"quantize", "evaluate"} <= set(stages)
    weight_file = manifest.files["weights.bin"].bytes
    assert weight_file < load_manifest(bundle).files["weights.bin"].bytes * (0.5)
    again = quantize(bundle, tmp_path / "again", weights=weights)
    assert again.files == manifest.files, "the same input gives the same bytes"


def test_calibration_lowers_the_divergence(bundle, tmp_path, monkeypatch):
    calibrated = quantize(bundle, tmp_path / "gptq", weights="int4-gptq").checks[-1].value
    plain = dataclasses.replace(
        module.PLAIN_FORMATS["int4-gptq"], method="least4-64", table="least4-64"
    )
    monkeypatch.setitem(module.PLAIN_FORMATS, "int4-gptq", plain)
    least = quantize(bundle, tmp_path / "plain", weights="int4-gptq").checks[-1].value
    assert calibrated < 0.9 * least


def test_int8_is_close_and_int4_is_not_as_close(bundle, tmp_path):
    kl = {w: quantize(bundle, tmp_path / w, weights=w).checks[-1].value for w in ("int4", "int8")}
    assert kl["int8"] < 0.2 * kl["int4"]


@pytest.mark.parametrize("weights", ["int4-exact", "int8"])
def test_rows_hardly_depend_on_each_other(weights, bundle, tmp_path):
    """In blocks of 32 the products are exact; the float32 attention differs in the last bits."""
    manifest = quantize(bundle, tmp_path / "q", weights=weights)
    ids = np.random.default_rng(0).integers(0, 200, 8)
    runner = Runner(manifest, tmp_path / "q", threads=1)
    wide = runner.step(ids, want="all").copy()
    runner.arena.rewind(0)
    single = np.concatenate([runner.step([t]).copy() for t in ids])
    np.testing.assert_allclose(wide, single, atol=1e-4)


def test_gate_refuses(bundle, tmp_path, monkeypatch):
    strict = dataclasses.replace(module.FORMATS["int4"], kl_bound=1e-9)
    monkeypatch.setitem(module.FORMATS, "int4", strict)
    with pytest.raises(ExportMismatch, match="KL"):
        quantize(bundle, tmp_path / "q")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "limits", [Limits(9.0, top1=1.0), Limits(9.0, perplexity_ratio=1e-3), Limits(1e-9)]
)
def test_limits_that_were_given_count(limits, bundle, tmp_path):
    with pytest.raises(QualityMismatch) as caught:
        quantize(bundle, tmp_path / "q", weights=Wish("int8", limits=limits))
    assert any(row[-1] == "NOT KEPT" for row in caught.value.rows)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kv", ["fp16", "int8", "int4"])
def test_the_default_cache_is_what_was_wished(kv, bundle, tmp_path):
    manifest = quantize(bundle, tmp_path / "q", weights=Wish("fp32", kv))
    assert layouts_of(manifest)[0] == kv and set(layouts_of(manifest)) == set(LAYOUTS)
    assert manifest.quantization.method == "none"
    for name in LAYOUTS:
        runner = open_runner(choose_layout(manifest, name), tmp_path / "q", threads=1)
        assert np.isfinite(runner.step([1, 2, 3])).all()
        runner.close()


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"weights": "int8", "budget": 10**6}, "has none"),
        ({"weights": "fp32"}, "nothing would change"),
        ({"kv": "gear-kivi"}, "chosen when a bundle is loaded"),
        ({"kv": "int3"}, "fp32, fp16, int8, int4"),
    ],
)
def test_wishes_that_make_no_sense(fields, words):
    with pytest.raises(OptionError, match=words):
        Wish(**fields)


def test_a_budget_that_is_too_small_says_what_works(bundle, tmp_path):
    with pytest.raises(OptionError, match="the smallest that works is"):
        quantize(bundle, tmp_path / "q", weights=Wish("int4", budget=1000))
    assert not list(tmp_path.iterdir())


def test_twice_is_refused(bundle, tmp_path):
    quantize(bundle, tmp_path / "q", weights="int8")
    with pytest.raises(UnsupportedError, match="quantized already"):
        quantize(tmp_path / "q", tmp_path / "r")


def test_unknown_format(bundle, tmp_path):
    with pytest.raises(OptionError, match="int4, int4-fast, int4-exact, int8, int8-rows"):
        quantize(bundle, tmp_path / "q", weights="int3")


def test_damaged_input(tmp_path):
    _, folder = tiny_bundle("llama", tmp_path)
    data = bytearray((folder / "weights.bin").read_bytes())
    data[1000] ^= 1
    (folder / "weights.bin").write_bytes(data)
    with pytest.raises(BundleError, match="SHA-256"):
        quantize(folder, tmp_path / "q")
    assert not (tmp_path / "q").exists()
