"""Quantized bundles are measured before they are let out, and leave nothing behind otherwise."""

import dataclasses

import numpy as np
import onnx
import pytest
from tiny import tiny_bundle

from forerun.errors import (
    BundleError,
    ExportMismatch,
    OptionError,
    SourceError,
    UnsupportedError,
)
from forerun.quant import quantize as module
from forerun.quant.gate import Limits, QualityMismatch
from forerun.quant.methods import METHODS, Method
from forerun.quant.quantize import FORMATS, Wish, needed_bytes, quantize
from forerun.runtime.layouts import LAYOUTS, choose_layout, layouts_of
from forerun.runtime.manifest import load_manifest, seal
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
    least = Method(4, 64, False, lambda weight, moment: METHODS["gptq4-64"].pack(weight, None))
    monkeypatch.setitem(METHODS, "least4-64", least)
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


LAYERS = 8
CHANGES = {"layers": LAYERS, "layer_window": (False,) * LAYERS}


@pytest.fixture(scope="module")
def deep(tmp_path_factory):
    return tiny_bundle("llama", tmp_path_factory.mktemp("deep"), capacity=256, **CHANGES)[1]


@pytest.fixture(scope="module")
def skipping(deep, tmp_path_factory):
    out = tmp_path_factory.mktemp("skipping") / "q"
    with pytest.MonkeyPatch.context() as patch:
        # Random weights cannot spare as much as trained ones.
        patch.setattr(module, "KL_LIMIT", 9.0)
        quantize(deep, out, weights=Wish("fp32", skipping=True, limits=Limits(9.0)))
    return out


def test_the_default_share_is_measured_with_what_it_skips(skipping):
    manifest = load_manifest(skipping)
    assert manifest.skipping.default > 0
    with_skipping, plain = manifest.checks[-2:]
    assert with_skipping.against == (
        f"float32 bundle (this one with KV fp32, skipping {manifest.skipping.default:g})"
    )
    assert plain.against == "float32 bundle (this one with KV fp32)"
    assert plain.value < 1e-3 < with_skipping.value < 9


def test_the_default_share_keeps_the_limits_that_were_wished(deep, skipping, tmp_path, monkeypatch):
    """Both when it is calibrated and when it is measured on other text."""
    monkeypatch.setattr(module, "KL_LIMIT", 9.0)
    cost = load_manifest(skipping).checks[-2].value
    wish = Wish("fp32", skipping=True, limits=Limits(cost / 3))
    less = quantize(deep, tmp_path / "less", weights=wish)
    assert 0 < less.skipping.default < load_manifest(skipping).skipping.default
    assert all(check.value <= cost / 3 for check in less.checks if check.metric == "kl_mean")
    strict = Wish("fp32", skipping=True, limits=Limits(None, top1=1.0))
    least = quantize(deep, tmp_path / "least", weights=strict)
    assert least.skipping.default == 0 and len(least.checks) == len(less.checks) - 1


def test_kept_weights_have_the_limit_of_their_cache():
    bounds = [Wish("fp32", kv).kept_limits.kl_mean for kv in ("fp16", "int8", "int4")]
    assert bounds == sorted(bounds) and bounds[0] < bounds[1] < bounds[2] == 0.75
    free = Wish("fp32", skipping=True)
    # The gates themselves cost nothing; what the default share skips may.
    assert (free.kept_limits.kl_mean, free.skipping_limits.kl_mean) == (0.001, 0.05)
    bound = Wish("fp32", skipping=True, limits=Limits(0.01))
    assert bound.kept_limits.kl_mean == bound.skipping_limits.kl_mean == 0.01
    assert Wish("int4", "int4").kept_limits.kl_mean == 0.75


def no_compute(monkeypatch):
    for name in ("new_bundle", "WeightStore", "calibrate", "measure_gate", "add_skipping"):
        monkeypatch.setattr(module, name, lambda *a, **k: pytest.fail("something was computed"))


@pytest.mark.parametrize("wish", [Wish("int8"), Wish("fp32", "int8"), Wish("int4", skipping=True)])
def test_a_bundle_that_can_skip_is_refused_at_once(wish, skipping, tmp_path, monkeypatch):
    no_compute(monkeypatch)
    with pytest.raises(UnsupportedError, match=r"can skip .* already, .*that it was made from"):
        quantize(skipping, tmp_path / "r", weights=wish)


@pytest.mark.parametrize("wish", [Wish("int8"), Wish("fp32", "int4"), Wish("int4", skipping=True)])
def test_a_bundle_with_another_default_cache_is_refused_at_once(
    wish, bundle, tmp_path, monkeypatch
):
    quantize(bundle, tmp_path / "q", weights=Wish("fp32", "fp16"))
    no_compute(monkeypatch)
    with pytest.raises(UnsupportedError, match=r"KV cache in fp16 by default.*was made from"):
        quantize(tmp_path / "q", tmp_path / "r", weights=wish)


def test_a_model_that_has_nothing_to_skip_is_refused_at_once(tmp_path, monkeypatch):
    changes = {"layers": 2, "layer_window": (False,) * 2}
    folder = tiny_bundle("llama", tmp_path / "source", capacity=64, **changes)[1]
    no_compute(monkeypatch)
    with pytest.raises(OptionError, match=r"2 layers has no block .*; it takes 3"):
        quantize(folder, tmp_path / "q", weights=Wish("int4", skipping=True))


@pytest.mark.parametrize("weights", ["fp32", "int8"])
def test_numbers_that_are_none_are_refused_in_every_form(weights, tmp_path):
    _, folder = tiny_bundle("llama", tmp_path / "source", capacity=64)
    model = onnx.load(str(folder / "model.onnx"), load_external_data=False)
    tensor = next(t for t in model.graph.initializer if t.name == "down.1")
    offset = int(next(e.value for e in tensor.external_data if e.key == "offset"))
    data = bytearray((folder / "weights.bin").read_bytes())
    data[offset : offset + 4] = np.float32(np.inf).tobytes()
    (folder / "weights.bin").write_bytes(data)
    seal(folder, load_manifest(folder))
    with pytest.raises(SourceError, match=r"1 NaN or infinity in 'down\.1'"):
        quantize(folder, tmp_path / "q", weights=Wish(weights, "int8"))
    assert not (tmp_path / "q").exists()


@pytest.mark.parametrize("stage", ["WeightStore", "calibrate", "measure_gate", "write_card"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_what_was_interrupted_leaves_nothing(stage, error, bundle, tmp_path, monkeypatch):
    def interrupt(*args, **kwargs):
        raise error

    monkeypatch.setattr(module, stage, interrupt)
    with pytest.raises(error):
        quantize(bundle, tmp_path / "q", weights="int8")
    assert not list(tmp_path.iterdir())


def test_an_interrupted_replacement_keeps_what_was_there(bundle, tmp_path, monkeypatch):
    first = quantize(bundle, tmp_path / "q", weights="int8")
    monkeypatch.setattr(module, "measure_gate", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        quantize(bundle, tmp_path / "q", weights="int4")
    assert [p.name for p in tmp_path.iterdir()] == ["q"] and load_manifest(tmp_path / "q") == first


def test_the_space_that_is_asked_for_is_enough(deep, tmp_path):
    needed = needed_bytes(load_manifest(deep), Wish("fp32", "int8"))
    made = quantize(deep, tmp_path / "q", weights=Wish("fp32", "int8"))
    assert sum(entry.bytes for entry in made.files.values()) < needed


def test_the_space_of_a_budget_is_asked_for(deep):
    plain, source = needed_bytes(load_manifest(deep), Wish("int4")), load_manifest(deep)
    count = source.model.parameters
    some = needed_bytes(source, Wish("int4", budget=int(1.4 * count)))
    assert some - plain == pytest.approx(0.4 * count, abs=2)
    assert needed_bytes(source, Wish("int4", budget=count // 2)) == plain
    assert needed_bytes(source, Wish("int4", budget=10**15)) < plain + count


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
