"""4-bit blocks with an offset: kept if a matrix is made of them, and near otherwise."""

import numpy as np
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from forerun.export.writer import GraphWriter
from forerun.quant.affine import (
    Affine,
    dequantize_affine,
    find_grid,
    quantize_affine,
    split_joined,
    write_product,
)
from forerun.quant.blocks import dequantize
from forerun.quant.rounding import quantize_blocks

BLOCK = 32


def made_of_blocks(rng, rows=6, blocks=3, symmetric=False):
    """float32 [rows, blocks * 32] as a GGUF file of Q4_1 (or Q4_0) gives it, and the scales."""
    codes = rng.integers(0, 16, (rows, blocks, BLOCK))
    codes[..., :2] = 0, 15
    scales = (rng.random((rows, blocks)) + 0.1).astype(np.float16).astype(np.float32)
    least = (-8 * scales + rng.standard_normal((rows, blocks))).astype(np.float16)
    least = -8 * scales if symmetric else least.astype(np.float32)
    weight = scales[..., None] * codes.astype(np.float32) + least[..., None]
    return weight.reshape(rows, -1).astype(np.float32), scales


@given(st.integers(0, 2**32 - 1), st.integers(1, 40))
@settings(max_examples=20, deadline=None)
def test_blocks_of_a_file_are_found_and_kept(seed, blocks):
    weight, scales = made_of_blocks(np.random.default_rng(seed), blocks=blocks)
    q = quantize_affine(weight, np.eye(weight.shape[1], dtype=np.float32))
    np.testing.assert_array_equal(q.blocks.scales, scales)
    # Only the offset within a step is rounded, to a fourteenth of the largest in 32 blocks.
    rest = np.repeat(np.abs(dequantize(q.rest)).max(1, keepdims=True), weight.shape[1], 1)
    assert np.all(np.abs(dequantize_affine(q) - weight) <= rest / 13 + 1e-5)
    rounded = dequantize(quantize_blocks(weight, 4, BLOCK))
    error = ((dequantize_affine(q) - weight) ** 2).sum()
    assert error < 0.15 * ((rounded - weight) ** 2).sum()


def test_blocks_without_an_offset_need_no_sums():
    weight, _ = made_of_blocks(np.random.default_rng(0), symmetric=True)
    q = quantize_affine(weight)
    assert q.rest is None
    np.testing.assert_array_equal(dequantize_affine(q), weight)


@given(st.integers(0, 2**32 - 1), st.sampled_from([1e-3, 1.0, 1e3]), st.booleans())
@settings(max_examples=20, deadline=None)
def test_other_weights_keep_the_error_bound(seed, magnitude, constant):
    rng = np.random.default_rng(seed)
    weight = (rng.standard_normal((8, 96)) * magnitude).astype(np.float32)
    if constant:
        weight[0] = 0.75 * magnitude
        weight[1] = 0
    assert find_grid(weight) is None
    q = quantize_affine(weight)
    error = ((dequantize_affine(q) - weight) ** 2).reshape(8, 3, BLOCK).sum(-1)
    blocks = weight.reshape(8, 3, BLOCK)
    step = (blocks.max(-1) - blocks.min(-1)) / 15
    offsets = 0.0 if q.rest is None else q.rest.scales.max(1, keepdims=True) * 0.51
    assert np.all(np.sqrt(error / BLOCK) <= 0.51 * step + offsets + 1e-3 * np.abs(blocks).max(-1))


def test_calibration_lowers_the_error_of_the_product():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((512, 64)) @ rng.standard_normal((64, 64))
    x = (x * np.linspace(0.1, 3, 64)).astype(np.float32)
    weight = rng.standard_normal((48, 64)).astype(np.float32)

    def error(q):
        return (((dequantize_affine(q) - weight) @ x.T) ** 2).mean()

    assert error(quantize_affine(weight, x.T @ x)) < 0.8 * error(quantize_affine(weight))


@given(st.integers(0, 2**32 - 1), st.integers(1, 70))
@settings(max_examples=20, deadline=None)
def test_joining_is_undone_by_splitting(seed, blocks):
    weight, _ = made_of_blocks(np.random.default_rng(seed), rows=3, blocks=blocks)
    q = quantize_affine(weight)
    again = split_joined(q.joined(), blocks)
    np.testing.assert_array_equal(dequantize_affine(again), dequantize_affine(q))
    assert isinstance(again, Affine)


@pytest.mark.parametrize("blocks", [1, 3, 33])
def test_the_nodes_compute_the_product_row_by_row(blocks, tmp_path):
    rng = np.random.default_rng(blocks)
    weight, _ = made_of_blocks(rng, rows=48, blocks=blocks)
    width = weight.shape[1]
    writer = GraphWriter(tmp_path)
    writer.input("x", "float32", (1, "S", width))
    writer.output("y", "float32", (1, "S", 48))
    writer.output("z", "float32", (1, "S", 48))
    # Twice, since both share the matrix that sums.
    write_product(writer, "x", "w", quantize_affine(weight), ["y"])
    write_product(writer, "x", "v", quantize_affine(-weight), ["z"])
    writer.save("product.onnx")
    writer.close()
    session = ort.InferenceSession(tmp_path / "product.onnx", providers=["CPUExecutionProvider"])
    x = (rng.standard_normal((1, 5, width)) + 0.5).astype(np.float32)
    y, z = session.run(None, {"x": x})
    np.testing.assert_allclose(z, -y, atol=0.02 * np.abs(y).max())
    expected = x @ weight.T
    assert np.abs(y - expected).max() < 0.02 * np.abs(expected).max()
    for row in range(5):
        single = session.run(["y"], {"x": x[:, row : row + 1]})[0]
        np.testing.assert_array_equal(single[0, 0], y[0, row])
