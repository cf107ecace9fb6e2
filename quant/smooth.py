"""Moving outliers of activations into weights before both are rounded (SmoothQuant, Xiao 2023).

A channel of the input of a product is divided by a factor and the matching row of the matrix is
multiplied by it. The division goes into what makes the channel: the weight of the norm, the `up`
half of the matrix before a gated product, or the value columns before attention. So the graph
stays what it is. The strength is searched for each matrix by the expected rounding error.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import onnx

if TYPE_CHECKING:
    from forerun.quant.float_weights import FloatWeights

    Factors = dict[str, tuple[np.ndarray, ...]]

_STRENGTHS = (0.0, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
_LEVELS = 127
# A channel's largest value in units of its root mean square, for the step of a row.
_PEAK = 6
_LEAST = 1e-3
_NORMS = {"SimplifiedLayerNormalization": 1, "SkipSimplifiedLayerNormalization": 2}


@dataclass(frozen=True)
class _Place:
    """Where the division of a matrix's input goes: a constant, and which of its entries."""

    name: str
    columns: slice
    groups: tuple[int, int] = (1, 1)


def smooth_factors(
    model: onnx.ModelProto, weights: FloatWeights, moments: dict[str, np.ndarray]
) -> Factors:
    """Choose factors for every matrix whose input can be divided.

    Args:
        model: the float32 graph, its external weights not loaded.
        weights: of it.
        moments: float32 [K, K] of the inputs of each matrix, by its name.

    Returns:
        Name of a constant to arrays that it is to be multiplied by.
    """
    made = {output: node for node in model.graph.node for output in node.output}
    readers: dict[str, int] = {}
    for node in model.graph.node:
        for name in node.input:
            readers[name] = readers.get(name, 0) + 1
    fixed = {value.name for value in model.graph.output}
    factors: Factors = {}
    for node in model.graph.node:
        if node.op_type != "MatMul" or node.input[1] not in moments:
            continue
        x, name = node.input
        place = _place(made, readers, fixed, weights, x)
        if place is None:
            continue
        spread = np.sqrt(np.maximum(np.diagonal(moments[name]), 0))
        factor = _search(np.asarray(weights.array(name)), spread, place.groups)
        factors[name] = (*factors.get(name, ()), factor[:, None])
        _divide(factors, weights, place, factor)
    return factors


def _place(
    made: dict[str, onnx.NodeProto],
    readers: dict[str, int],
    fixed: set[str],
    weights: FloatWeights,
    x: str,
) -> _Place | None:
    """What scales the channels of `x`, if nothing else reads them."""
    node = made.get(x)
    while node is not None and node.op_type == "Gather":
        x, node = node.input[0], made.get(node.input[0])
    if node is None or x in fixed or readers.get(x, 0) != 1:
        return None
    if node.op_type in _NORMS:
        return _Place(node.input[_NORMS[node.op_type]], slice(None))
    if node.op_type == "Mul":
        split = made.get(node.input[1])
        if split is None or split.op_type != "Split":
            return None
        product = made.get(split.input[0])
        if product is None or product.op_type != "MatMul":
            return None
        width = weights.array(product.input[1]).shape[1]
        return _Place(product.input[1], slice(width // 2, width))
    if node.op_type == "GroupQueryAttention":
        return _value_columns(made, weights, node)
    return None


def _value_columns(
    made: dict[str, onnx.NodeProto], weights: FloatWeights, node: onnx.NodeProto
) -> _Place | None:
    product = made.get(node.input[0])
    if product is None or product.op_type != "MatMul" or node.input[1]:
        return None
    sizes = {a.name: a.i for a in node.attribute}
    heads, kv_heads = sizes["num_heads"], sizes["kv_num_heads"]
    width = weights.array(product.input[1]).shape[1]
    size = width // (heads + 2 * kv_heads)
    values = slice(width - kv_heads * size, width)
    return _Place(product.input[1], values, (kv_heads, heads // kv_heads))


def _search(weight: np.ndarray, spread: np.ndarray, groups: tuple[int, int]) -> np.ndarray:
    """Factor [K] of least expected error; channels that share a value head share one."""
    size = np.abs(weight).max(1)
    a, w = (_shared(np.maximum(v, _LEAST * max(v.max(), 1e-30)), groups) for v in (spread, size))
    best, least = np.ones_like(a), np.inf
    for strength in _STRENGTHS:
        factor = a**strength / w ** (1 - strength)
        factor /= np.exp(np.log(factor).mean())
        scaled = weight * factor[:, None]
        step = _PEAK * (spread / factor).max() / _LEVELS
        steps = np.abs(scaled).max(0) / _LEVELS
        error = step**2 * (scaled**2).sum()
        error += (steps**2).sum() * ((spread / factor) ** 2).sum()
        if error < least:
            best, least = factor, error
    return best.astype(np.float32)


def _shared(values: np.ndarray, groups: tuple[int, int]) -> np.ndarray:
    kv_heads, repeats = groups
    if repeats == 1:
        return values
    shared = values.reshape(kv_heads, repeats, -1).max(1, keepdims=True)
    return np.repeat(shared, repeats, 1).reshape(-1)


def _divide(factors: Factors, weights: FloatWeights, place: _Place, factor: np.ndarray) -> None:
    kv_heads, repeats = place.groups
    if repeats > 1:
        factor = factor.reshape(kv_heads, repeats, -1)[:, 0].reshape(-1)
    whole = np.ones(weights.array(place.name).shape[-1], np.float32)
    whole[place.columns] = 1 / factor
    factors[place.name] = (*factors.get(place.name, ()), whole)
