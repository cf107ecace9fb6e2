"""Packing is undone by unpacking, and rounding keeps its error bound."""

import numpy as np
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from forerun.errors import UnsupportedError
from forerun.export.writer import GraphWriter
from forerun.quant.blocks import (
    Blocks,
    dequantize,
    pack_codes,
    pack_zeros,
    unpack_codes,
    unpack_zeros,
)
from forerun.quant.rounding import quantize_blocks, quantize_gptq


def random_blocks(rng, bits, rows=5, blocks=3, block=32):
    top = 1 << bits
    return Blocks(
        rng.integers(0, top, (rows, blocks, block), dtype=np.uint8),
        rng.random((rows, blocks), dtype=np.float32) + np.float32(0.1),
        rng.integers(0, top, (rows, blocks), dtype=np.uint8),
        bits,
    )


@pytest.mark.parametrize("bits", [4, 8])
@given(st.integers(0, 2**32 - 1), st.integers(1, 4))
@settings(max_examples=20, deadline=None)
def test_pack_unpack(bits, seed, blocks):
    q = random_blocks(np.random.default_rng(seed), bits, blocks=blocks)
    np.testing.assert_array_equal(unpack_codes(pack_codes(q), bits), q.codes)
    np.testing.assert_array_equal(unpack_zeros(pack_zeros(q), blocks, bits), q.zeros)


@pytest.mark.parametrize("bits", [4, 8])
@given(st.integers(0, 2**32 - 1), st.sampled_from([1e-6, 1.0, 1e4]))
@settings(max_examples=20, deadline=None)
def test_rounding_error_bound(bits, seed, magnitude):
    """No worse than plain rounding over the range of each block, in squared error."""
    w = (np.random.default_rng(seed).standard_normal((6, 96)) * magnitude).astype(np.float32)
    error = ((dequantize(quantize_blocks(w, bits, 32)) - w) ** 2).reshape(6, 3, 32).sum(-1)
    blocks = w.reshape(6, 3, 32)
    step = (np.maximum(blocks.max(-1), 0) - np.minimum(blocks.min(-1), 0)) / ((1 << bits) - 1)
    # Each weight is off by at most half a step, plus half a step for the rounded zero point.
    assert np.all(error <= 32 * step**2 * 1.0001)


def test_searching_beats_range_rounding():
    w = np.random.default_rng(0).standard_normal((64, 576)).astype(np.float32)
    error = ((dequantize(quantize_blocks(w, 4, 32)) - w) ** 2).mean()
    blocks = w.reshape(64, 18, 32)
    low, high = blocks.min(-1, keepdims=True), blocks.max(-1, keepdims=True)
    step = (high - low) / 15
    zero = np.rint(-low / step)
    plain = (np.clip(np.rint(blocks / step) + zero, 0, 15) - zero) * step
    assert error < 0.95 * ((plain - blocks) ** 2).mean()


def test_gptq_lowers_the_error_of_the_product():
    rng = np.random.default_rng(0)
    mixing = rng.standard_normal((64, 64)).astype(np.float32)
    x = (rng.standard_normal((512, 64)).astype(np.float32) * np.linspace(0.1, 3, 64)) @ mixing
    x = x.astype(np.float32)
    w = rng.standard_normal((48, 64)).astype(np.float32)

    def error(q):
        return float((((dequantize(q) - w) @ x.T) ** 2).mean())

    plain, moved = quantize_blocks(w, 4, 32), quantize_gptq(w, x.T @ x, 4, 32)
    assert error(moved) < 0.7 * error(plain)
    dead = quantize_gptq(w, np.zeros((64, 64), np.float32), 4, 32)
    assert np.abs(dequantize(dead) - w).max() < 1, "inputs that were never seen do no harm"


def test_zeros_and_constants_survive():
    w = np.zeros((2, 64), np.float32)
    w[1] = 0.75
    np.testing.assert_allclose(dequantize(quantize_blocks(w, 4, 32)), w, rtol=2**-11)


def test_ragged_rows_are_refused():
    with pytest.raises(UnsupportedError, match="33"):
        quantize_blocks(np.zeros((2, 33), np.float32), 4, 32)


@pytest.mark.parametrize("bits", [4, 8])
def test_onnxruntime_reads_the_layout(bits, tmp_path):
    """The operators compute with exactly the matrix that `dequantize` shows."""
    rng = np.random.default_rng(1)
    q = random_blocks(rng, bits, rows=64, blocks=3)
    writer = GraphWriter(tmp_path)
    writer.input("x", "float32", ("R", 96))
    writer.input("ids", "int64", ("R",))
    writer.output("y", "float32", ("R", 64))
    writer.output("e", "float32", ("R", 96))
    scales, zeros = writer.constant("s", q.scales), writer.constant("z", pack_zeros(q))
    weight = writer.constant("w", pack_codes(q))
    table = writer.constant("t", pack_codes(q).reshape(64, -1))
    writer.add(
        "MatMulNBits",
        ["x", weight, scales, zeros],
        ["y"],
        N=64,
        K=96,
        bits=bits,
        block_size=32,
        accuracy_level=0,
    )
    writer.add(
        "GatherBlockQuantized",
        [table, "ids", scales, zeros],
        ["e"],
        bits=bits,
        block_size=32,
        gather_axis=0,
        quantize_axis=1,
    )
    writer.save("m.onnx")
    writer.close()
    session = ort.InferenceSession(str(tmp_path / "m.onnx"), providers=["CPUExecutionProvider"])
    x = rng.standard_normal((3, 96)).astype(np.float32)
    ids = np.array([0, 63, 5])
    y, e = session.run(None, {"x": x, "ids": ids})
    w = dequantize(q)
    np.testing.assert_allclose(y, x @ w.T, rtol=1e-4, atol=1e-3 * np.abs(w).max())
    np.testing.assert_allclose(e, w[ids], rtol=1e-6)
