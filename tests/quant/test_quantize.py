"""Quantized bundles are measured before they are let out, and leave nothing behind otherwise."""

import dataclasses
import json

import numpy as np
import pytest
from tiny import edit_manifest, tiny_bundle

from forerun.errors import BundleError, ExportMismatch, OptionError, UnsupportedError
from forerun.quant import quantize as module
from forerun.quant.evaluate import evaluate
from forerun.quant.quantize import FORMATS, quantize
from forerun.runtime.manifest import load_manifest
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
    calibrated = quantize(bundle, tmp_path / "gptq").checks[-1].value
    plain = dataclasses.replace(module.FORMATS["int4"], calibrated=False)
    monkeypatch.setitem(module.FORMATS, "int4", plain)
    assert calibrated < 0.9 * quantize(bundle, tmp_path / "plain").checks[-1].value


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
    strict = module.WeightFormat(4, 32, "", (), False, kl_bound=1e-9, bytes_per_weight=1.0)
    monkeypatch.setitem(module.FORMATS, "int4", strict)
    with pytest.raises(ExportMismatch, match="KL"):
        quantize(bundle, tmp_path / "q")
    assert not list(tmp_path.iterdir())


def test_twice_is_refused(bundle, tmp_path):
    quantize(bundle, tmp_path / "q", weights="int8")
    with pytest.raises(UnsupportedError, match="quantized already"):
        quantize(tmp_path / "q", tmp_path / "r")


def test_unknown_format(bundle, tmp_path):
    with pytest.raises(OptionError, match="int4, int4-exact, int8"):
        quantize(bundle, tmp_path / "q", weights="int3")


def test_damaged_input(tmp_path):
    _, folder = tiny_bundle("llama", tmp_path)
    data = bytearray((folder / "weights.bin").read_bytes())
    data[1000] ^= 1
    (folder / "weights.bin").write_bytes(data)
    with pytest.raises(BundleError, match="SHA-256"):
        quantize(folder, tmp_path / "q")
    assert not (tmp_path / "q").exists()


def test_evaluate(bundle, tmp_path):
    quantize(bundle, tmp_path / "q", weights="int8")
    report = evaluate(tmp_path / "q", bundle, context=64, max_tokens=256)
    assert json.loads(json.dumps(report)) == report
    assert report["tokens"] == 256
    assert 0 <= report["kl_mean"] < 0.1 and report["top1_agreement"] > 0.8
    itself = evaluate(bundle, bundle, context=64, max_tokens=256)
    assert itself["kl_mean"] == pytest.approx(0, abs=1e-6) and itself["top1_agreement"] == 1
    assert itself["perplexity"] == pytest.approx(report["perplexity_against"])
    assert evaluate(bundle, context=64, max_tokens=128)["kl_mean"] is None


@pytest.mark.parametrize(("context", "tokens"), [(8, 100), (1000, 4000), (64, 10)])
def test_evaluate_ranges(bundle, context, tokens):
    with pytest.raises(OptionError):
        evaluate(bundle, context=context, max_tokens=tokens)


def test_evaluate_needs_the_same_tokenizer(bundle, tmp_path):
    _, other = tiny_bundle("llama", tmp_path)
    edit_manifest(other, lambda m: m["tokenizer"].update(sha256="0" * 64))
    with pytest.raises(OptionError, match="tokenizers"):
        evaluate(other, bundle)
