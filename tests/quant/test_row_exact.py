"""The row-exact form: verifying rows together gives bit for bit what single rows give."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny_bundle

from forerun.export.writer import GraphWriter
from forerun.quant.quantize import quantize
from forerun.quant.rows8 import dequantize_columns, quantize_columns, write_product
from forerun.runtime.manifest import load_manifest
from forerun.runtime.runner import Runner

CAPACITY = 128


@pytest.fixture(scope="module")
def bundles(tmp_path_factory):
    folder = tmp_path_factory.mktemp("exact")
    plain = tiny_bundle("llama", folder, capacity=CAPACITY)[1]
    quantize(plain, folder / "exact", weights="int4-exact")
    return plain, folder / "exact"


@pytest.fixture(scope="module")
def runner(bundles):
    return Runner(load_manifest(bundles[1]), bundles[1], threads=1)


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_any_grouping_into_chain_steps_is_bit_equal(runner, data):
    ids = data.draw(st.lists(st.integers(0, 199), min_size=2, max_size=24))
    runner.arena.rewind(0)
    single = np.concatenate([runner.step([token]).copy() for token in ids])
    runner.arena.rewind(0)
    rows, start = [], 0
    while start < len(ids):
        count = data.draw(st.integers(1, 9))
        rows.append(runner.step(ids[start : start + count], want="all").copy())
        start += count
    np.testing.assert_array_equal(np.concatenate(rows), single)


def test_the_manifest_promises_it_and_stores_an_8_bit_cache(bundles):
    plain, exact = load_manifest(bundles[0]), load_manifest(bundles[1])
    assert exact.row_exact and not plain.row_exact
    assert exact.kv.dtype == "int8"
    assert exact.kv.nbytes * 4 == plain.kv.nbytes
    assert exact.lowerings["cpu-tree"].inputs["past_key.0"].dtype == "int8"


def test_trees_run_on_the_8_bit_cache(runner):
    ids = [5, 9, 11, 30, 31]
    runner.arena.rewind(0)
    runner.step([1, 2], want="none")
    chain = runner.step(ids, want="all").copy()
    runner.arena.rewind(2)
    tree = runner.step([5, 7, 9, 11, 30, 31], want="all", parents=[-1, 0, 0, 2, 3, 4]).copy()
    runner.arena.commit([0, 2, 3, 4, 5])
    assert np.abs(tree[[0, 2, 3, 4, 5]] - chain).mean() < 0.02 * np.abs(chain).mean()
    assert runner.arena.length == 7


def test_columns_round_within_half_a_step():
    weight = np.random.default_rng(0).standard_normal((48, 20)).astype(np.float32)
    weight[:, 3] = 0
    q = quantize_columns(weight)
    assert np.all(np.abs(dequantize_columns(q) - weight) <= 0.5001 * q.scales)


def test_a_row_of_the_product_does_not_depend_on_the_others(tmp_path):
    import onnxruntime as ort

    rng = np.random.default_rng(0)
    weight = rng.standard_normal((64, 32)).astype(np.float32)
    writer = GraphWriter(tmp_path)
    writer.input("x", "float32", (1, "S", 64))
    writer.output("y", "float32", (1, "S", 32))
    write_product(writer, "x", "w", quantize_columns(weight), ["y"])
    writer.save("product.onnx")
    writer.close()
    session = ort.InferenceSession(tmp_path / "product.onnx", providers=["CPUExecutionProvider"])
    x = rng.standard_normal((1, 4, 64)).astype(np.float32)
    x[0, 1] *= 1000
    x[0, 2] = 0
    together = session.run(None, {"x": x})[0]
    np.testing.assert_array_equal(together[0, 2], 0)
    scale = np.abs(x[0] @ weight).max(axis=1, keepdims=True) + 1e-9
    assert np.max(np.abs(together[0] - x[0] @ weight) / scale) < 0.03
    for row in range(4):
        np.testing.assert_array_equal(
            session.run(None, {"x": x[:, row : row + 1]})[0][0, 0], together[0, row]
        )
