"""Methods, budgets and smoothing: what is stored, in how many bytes, and what it costs."""

import dataclasses

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import numpy_helper
from tiny import tiny_bundle

from forerun.errors import OptionError, SourceError, UnsupportedError
from forerun.export.graph import EMBEDDING
from forerun.quant import weights as module
from forerun.quant.affine import quantize_affine
from forerun.quant.calibration import calibration_pieces, input_moments, read_logits
from forerun.quant.float_weights import FloatWeights
from forerun.quant.formats import FORMATS, PLAIN_FORMATS
from forerun.quant.methods import METHODS, unpack
from forerun.quant.sensitivity import Candidate, choose_wide, kind_of, product_error
from forerun.quant.weights import WeightStore
from forerun.runtime.manifest import load_manifest, seal
from forerun.runtime.runner import Runner


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    folder = tiny_bundle("llama", tmp_path_factory.mktemp("fp32"), capacity=64, hidden=96)[1]
    return load_manifest(folder), folder


def store(bundle, form, folder, budget=None):
    folder.mkdir()
    kept = WeightStore(*bundle, form, lambda *a: None)
    return kept.write(folder, budget), (folder / "weights.bin").stat().st_size


@pytest.mark.parametrize("name", METHODS)
@given(st.integers(0, 2**32 - 1), st.sampled_from([1e-4, 1.0, 1e3]))
@settings(max_examples=15, deadline=None)
def test_every_method_keeps_its_error_bound(name, seed, magnitude):
    method = METHODS[name]
    rng = np.random.default_rng(seed)
    weight = (rng.standard_normal((20, 128)) * magnitude).astype(np.float32)
    x = rng.standard_normal((64, 128)).astype(np.float32)
    values = unpack(method.pack(weight, None))
    assert values.shape == weight.shape and values.dtype == np.float32
    size = method.block or weight.shape[1]
    blocks = weight.reshape(20, -1, size)
    step = (np.maximum(blocks.max(-1), 0) - np.minimum(blocks.min(-1), 0)) / (2**method.bits - 1)
    error = ((values - weight).reshape(blocks.shape) ** 2).mean(-1)
    # Half a step for the weight, half a step for the zero point, and float16 scales.
    assert np.all(np.sqrt(error) <= 1.01 * step + 2**-11 * np.abs(blocks).max(-1))
    packed = method.pack(weight, x.T @ x)
    assert product_error(weight, unpack(packed), x.T @ x) < (0.02 if method.bits == 4 else 1e-4)
    stored = sum(array.nbytes for array in packed.arrays())
    assert stored * 8 <= weight.size * (method.bits + (4 if method.bits == 4 else 1.5))


def test_budgets_go_where_a_byte_saves_most():
    rows = [
        Candidate("a", 0.3, 10, 20),
        Candidate("b", 0.2, 10, 12),
        Candidate("c", 0.0, 1, 2),
        Candidate("d", 0.1, 10, 30),
    ]
    assert choose_wide(rows, 131, 100) == frozenset()
    assert choose_wide(rows, 133, 100) == {"b"}
    assert choose_wide(rows, 143, 100) == {"a", "b"}
    assert choose_wide(rows, 10**6, 100) == {"a", "b", "d"}
    with pytest.raises(OptionError, match=r"smallest that works is 0.1 MB"):
        choose_wide(rows, 130, 100)


@given(st.lists(st.tuples(st.floats(0, 1), st.integers(1, 50), st.integers(1, 50))), st.integers(0))
@settings(max_examples=50, deadline=None)
def test_budgets_are_kept(rows, spare):
    candidates = [Candidate(str(i), h, s, s + more) for i, (h, s, more) in enumerate(rows)]
    budget = sum(c.small for c in candidates) + spare % 400
    wide = choose_wide(candidates, budget, 0)
    assert sum(c.large if c.name in wide else c.small for c in candidates) <= budget
    assert wide == choose_wide(candidates[::-1], budget, 0)


def test_kinds_of_matrices():
    assert [kind_of(n) for n in ("qkv.12", "head", "model.embed.weight")] == [
        "qkv",
        "head",
        "model.embed.weight",
    ]


def test_a_budget_is_kept_and_spent(bundle, tmp_path):
    form = FORMATS["int4"]
    none, small = store(bundle, form, tmp_path / "small")
    assert not none
    budget = small + (1 << 18) + 150_000
    some, size = store(bundle, form, tmp_path / "some", budget)
    assert some and small < size <= budget
    assert store(bundle, form, tmp_path / "again", budget) == (some, size)
    everything, _ = store(bundle, form, tmp_path / "all", 10**8)
    assert some < everything and len(everything) == 13
    with pytest.raises(OptionError, match="smallest that works"):
        store(bundle, form, tmp_path / "none", 1000)


@pytest.mark.parametrize("name", [*FORMATS, *PLAIN_FORMATS])
def test_formats_run_and_smoothing_changes_only_the_rounding(name, bundle, tmp_path):
    form, plain = (FORMATS | PLAIN_FORMATS)[name], bundle[0]
    if form.row_exact:
        pytest.skip("the 8-bit cache has tests of its own")
    store(bundle, form, tmp_path / "q")
    (tmp_path / "q" / "tokenizer.json").write_bytes((bundle[1] / "tokenizer.json").read_bytes())
    kept = {n: f for n, f in plain.lowerings.items() if n == "cpu"}
    manifest = seal(tmp_path / "q", dataclasses.replace(plain, lowerings=kept))
    got = Runner(manifest, tmp_path / "q", threads=1).step([1, 2, 3], want="all")
    want = Runner(plain, bundle[1], threads=1).step([1, 2, 3], want="all")
    assert np.abs(got - want).mean() < (0.5 if "4" in name else 0.03) * want.std()


def test_smoothing_is_no_change_before_rounding(bundle, tmp_path):
    from forerun.quant.smooth import smooth_factors

    plain, folder = bundle
    model = onnx.load(str(folder / "model.onnx"), load_external_data=False)
    moments = input_moments(model, plain, folder, calibration_pieces(plain, folder))
    factors = smooth_factors(model, FloatWeights(model, folder), moments)
    assert {n.split(".")[0] for n in factors if "layernorm" not in n} == {
        "qkv",
        "o",
        "gate_up",
        "down",
    }
    whole = onnx.load(str(folder / "model.onnx"))
    smoothed = FloatWeights(model, folder, factors)
    for tensor in whole.graph.initializer:
        if tensor.name in factors:
            value = np.asarray(smoothed.array(tensor.name), np.float32)
            assert np.abs(value - FloatWeights(model, folder).array(tensor.name)).max() > 0
            tensor.CopyFrom(numpy_helper.from_array(value, tensor.name))
    (tmp_path / "model.onnx").write_bytes(whole.SerializeToString())
    kept = {n: f for n, f in plain.lowerings.items() if n == "cpu"}
    (tmp_path / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    manifest = seal(tmp_path, dataclasses.replace(plain, lowerings=kept))
    got = Runner(manifest, tmp_path, threads=1).step([1, 2, 3], want="all")
    want = Runner(plain, folder, threads=1).step([1, 2, 3], want="all")
    np.testing.assert_allclose(got, want, atol=1e-4 * np.abs(want).max())


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_numbers_that_are_none_are_named(bad, tmp_path):
    manifest, folder = tiny_bundle("llama", tmp_path, capacity=64)
    model = onnx.load(str(folder / "model.onnx"), load_external_data=False)
    weights = FloatWeights(model, folder)
    weights.check()
    tensor = next(t for t in model.graph.initializer if t.name == "down.1")
    offset = int(next(e.value for e in tensor.external_data if e.key == "offset"))
    data = bytearray((folder / "weights.bin").read_bytes())
    data[offset + 40 : offset + 44] = np.float32(bad).tobytes()
    (folder / "weights.bin").write_bytes(data)
    with pytest.raises(SourceError, match=r"1 NaN or infinity in 'down\.1'"):
        WeightStore(manifest, folder, FORMATS["int4"], lambda *a: None)


@pytest.mark.parametrize("name", ["int4", "int4-exact"])
def test_only_a_shared_table_is_rounded_for_the_head(name, bundle, tmp_path):
    from forerun.export.training.weights import BundleWeights

    store(bundle, FORMATS[name], tmp_path / "q")
    (tmp_path / "q" / "manifest.json").write_text(bundle[0].to_json())
    model = onnx.load(str(bundle[1] / "model.onnx"), load_external_data=False)
    table = np.asarray(FloatWeights(model, bundle[1]).array(EMBEDDING))
    nearest = unpack(METHODS["least4"].pack(table, None))
    same = np.allclose(BundleWeights(tmp_path / "q").embedding(), nearest, atol=1e-6)
    assert same == (name == "int4-exact")


def rewritten(folder, name, change):
    """Change a matrix of a bundle's weights file in place."""
    model = onnx.load(str(folder / "model.onnx"), load_external_data=False)
    tensor = next(t for t in model.graph.initializer if t.name == name)
    offset = int(next(e.value for e in tensor.external_data if e.key == "offset"))
    values = np.memmap(folder / "weights.bin", np.float32, "r+", offset, tuple(tensor.dims))
    values[...] = change(np.array(values))
    values.flush()


def test_a_matrix_is_calibrated_if_any_of_its_blocks_is_new(tmp_path, monkeypatch):
    """Its first rows may be of 4-bit blocks and others not."""
    monkeypatch.setattr(module, "_GRID_ROWS", 40)
    manifest, folder = tiny_bundle("llama", tmp_path, capacity=64)

    def on_grid(count):
        def change(weight):
            rows = np.ascontiguousarray(weight.T)
            rows[:count] = unpack(quantize_affine(rows[:count]).blocks)
            return rows.T

        return change

    rewritten(folder, "qkv.0", on_grid(None))
    rewritten(folder, "qkv.1", on_grid(70))
    kept = WeightStore(manifest, folder, FORMATS["int4"], lambda *a: None)
    assert not kept._is_calibrated("qkv.0")
    assert kept._is_calibrated("qkv.1") and kept._is_calibrated("qkv.2")


def test_weights_that_no_product_reads_need_no_calibration(bundle):
    plain, folder = bundle
    model = onnx.load(str(folder / "model.onnx"), load_external_data=False)
    pieces = calibration_pieces(plain, folder)
    assert input_moments(model, plain, folder, pieces, only=set()) == {}
    assert input_moments(model, plain, folder, pieces, only={"absent"}) == {}


def test_a_budget_for_exact_rows_counts_the_head_once(tmp_path):
    """With a head of its own, the table has no copy in rows."""
    least = {}
    for tied in (True, False):
        made = tiny_bundle("llama", tmp_path / str(tied), capacity=64, tied=tied, vocab=8000)
        _, small = store(made, FORMATS["int4-exact"], tmp_path / f"small-{tied}")
        with pytest.raises(OptionError) as caught:
            store(made, FORMATS["int4-exact"], tmp_path / f"none-{tied}", 1000)
        least[tied] = float(str(caught.value).split("works is ")[1].split(" MB")[0])
        assert small <= least[tied] * 1e6
    assert least[True] == least[False]


def test_a_table_beside_exact_rows_is_judged_as_the_embedding_alone(bundle, tmp_path, monkeypatch):
    """The head is made from the float32 table, so rounding the table does not touch it."""
    seen = []
    measure = module.measure_harm
    monkeypatch.setattr(module, "measure_harm", lambda *a: (seen.append(a[0]), measure(*a))[1])
    for name in ("int4-exact", "int4"):
        store(bundle, FORMATS[name], tmp_path / name, 10**7)
    readers = [{n.op_type for n in model.graph.node if EMBEDDING in n.input} for model, *_ in seen]
    assert readers == [{"Gather"}, {"Gather", "FusedMatMul"}]
    pieces = calibration_pieces(*bundle)[:1]
    same = [next(read_logits(*source, pieces)) for source in seen]
    np.testing.assert_array_equal(*same)


def test_too_small_a_budget_is_refused_before_anything_is_measured(bundle, tmp_path, monkeypatch):
    for name in ("input_moments", "measure_harm"):
        monkeypatch.setattr(module, name, lambda *a, **k: pytest.fail("this takes minutes"))
    with pytest.raises(OptionError, match=r"smallest that works is .* MB; give that or more"):
        store(bundle, FORMATS["int4"], tmp_path / "q", 1000)


@pytest.mark.parametrize("name", [n for n in FORMATS if n != "int8-rows"])
def test_a_width_that_blocks_do_not_divide_is_named(name, tmp_path):
    made = tiny_bundle("llama", tmp_path, capacity=64, ffn=80)
    with pytest.raises(UnsupportedError, match=r"'down\.0' is 80 wide.* 32 do not divide"):
        WeightStore(*made, FORMATS[name], lambda *a: None)
    assert WeightStore(*made, FORMATS["int8-rows"], lambda *a: None)


def test_a_table_that_blocks_do_not_divide_is_named(tmp_path):
    made = tiny_bundle("llama", tmp_path, capacity=64, tied=False, hidden=80)
    with pytest.raises(UnsupportedError, match=r"is 80 wide"):
        WeightStore(*made, FORMATS["int8-rows"], lambda *a: None)
