"""Replacing float matrices of a graph by quantized ones, node by node."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx
from onnx import helper, numpy_helper

from forerun.export.graph import HEAD_WEIGHT
from forerun.export.writer import WEIGHTS_NAME, GraphWriter
from forerun.quant import kv8, rows8
from forerun.quant.blocks import Blocks, pack_codes, pack_zeros

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

# int8 activations within blocks: the only level whose rows do not depend on each other.
_ACCURACY_LEVEL = 4


class GraphRewriter:
    """Copies a graph into another folder with its matrices quantized.

    Args:
        model: the graph, its external weights not loaded.
        bundle: where the weights of `model` are.
        folder: where the new graph and its weights go.
        to_blocks: quantizes a matrix [N, K], given its name.
        head_in_rows: store the head for integer products (`rows8`) instead.
        kv_scales: of an 8-bit KV cache (`kv8.calibrate_scales`); None leaves it in float32.
    """

    def __init__(
        self,
        model: onnx.ModelProto,
        bundle: Path,
        folder: Path,
        to_blocks: Callable[[str, np.ndarray], Blocks],
        *,
        head_in_rows: bool = False,
        kv_scales: dict[str, np.ndarray] | None = None,
    ) -> None:
        self._graph = model.graph
        self._bundle = bundle
        self._writer = GraphWriter(folder)
        self._to_blocks = to_blocks
        self._head_in_rows = head_in_rows
        self._kv_scales = kv_scales
        self._initializers = {t.name: t for t in model.graph.initializer}
        self._tables: dict[str, Blocks] = {}

    def write(self, graph_name: str, progress: Callable[[int, int], None]) -> None:
        """Write the new graph."""
        nodes = list(self._graph.node)
        try:
            for value in self._graph.input:
                self._writer.input(*self._value_info(value))
            for value in self._graph.output:
                self._writer.output(*self._value_info(value))
            kept: set[str] = set()
            for done, node in enumerate(nodes):
                self._node(node, kept)
                progress(done + 1, len(nodes))
            self._writer.save(graph_name)
        finally:
            self._writer.close()

    def _node(self, node: onnx.NodeProto, kept: set[str]) -> None:
        handler = _HANDLERS.get(node.op_type)
        if handler and any(self._is_matrix(name) for name in node.input):
            handler(self, node)
            return
        for name in node.input:
            if name in self._initializers and name not in kept:
                kept.add(name)
                self._writer.constant(name, self._array(name))
        attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        inputs = list(node.input)
        if node.op_type == "GroupQueryAttention" and self._kv_scales:
            layer = int(node.output[1].rpartition(".")[2])
            scales = kv8.scale_inputs(self._writer, layer, self._kv_scales)
            inputs, attributes = kv8.with_scales(inputs, scales), attributes | kv8.ATTRIBUTES
        self._writer.add(node.op_type, inputs, list(node.output), **attributes)

    def _is_matrix(self, name: str) -> bool:
        tensor = self._initializers.get(name)
        return tensor is not None and len(tensor.dims) == 2 and min(tensor.dims) >= 16

    def _array(self, name: str) -> np.ndarray:
        tensor = self._initializers[name]
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            return numpy_helper.to_array(tensor)
        offset = int(next(e.value for e in tensor.external_data if e.key == "offset"))
        dtype = helper.tensor_dtype_to_np_dtype(tensor.data_type)
        shape = tuple(tensor.dims)
        return np.memmap(self._bundle / WEIGHTS_NAME, dtype, "r", offset, shape)

    def _matmul(self, node: onnx.NodeProto) -> None:
        """[.., K] times [K, N]."""
        x, name = node.input
        if self._head_in_rows and name == HEAD_WEIGHT:
            self._rows_product(x, name, self._array(name), node)
            return
        q = self._to_blocks(name, np.ascontiguousarray(self._array(name).T))
        self._writer.add(
            "MatMulNBits", [x, *self._constants(name, q)], list(node.output), **_nbits(q)
        )

    def _head(self, node: onnx.NodeProto) -> None:
        """[.., K] times the transposed embedding [N, K], sharing its bytes."""
        x, name = node.input
        if self._head_in_rows:
            self._rows_product(x, f"{name}.{HEAD_WEIGHT}", self._array(name).T, node)
            return
        q = self._table(name)
        packed = pack_codes(q)
        offset = self._writer.offset_of(name)
        weight = self._writer.alias(f"{name}.head", packed.dtype, packed.shape, offset)
        inputs = [x, weight, f"{name}.scales"]
        if q.zeros is not None:
            inputs.append(f"{name}.zeros")
        self._writer.add("MatMulNBits", inputs, list(node.output), **_nbits(q))

    def _rows_product(self, x: str, name: str, weight: np.ndarray, node: onnx.NodeProto) -> None:
        q = rows8.quantize_columns(weight)
        rows8.write_product(self._writer, x, name, q, list(node.output))

    def _gather(self, node: onnx.NodeProto) -> None:
        """Rows of the embedding [V, D]."""
        name, ids = node.input
        q = self._table(name)
        inputs = [name, ids, f"{name}.scales"]
        if q.zeros is not None:
            inputs.append(f"{name}.zeros")
        self._writer.add(
            "GatherBlockQuantized",
            inputs,
            list(node.output),
            bits=q.bits,
            block_size=q.block,
            gather_axis=0,
            quantize_axis=1,
        )

    def _table(self, name: str) -> Blocks:
        """Quantize a table once, for the embedding and the head."""
        if name not in self._tables:
            q = self._to_blocks(name, np.asarray(self._array(name)))
            packed = pack_codes(q)
            self._writer.constant(name, packed.reshape(len(packed), -1), inline=False)
            self._constants(name, q, with_codes=False)
            self._tables[name] = q
        return self._tables[name]

    def _value_info(self, value: onnx.ValueInfoProto) -> tuple[str, str, tuple[int | str, ...]]:
        kind = value.type.tensor_type
        shape = tuple(d.dim_param or d.dim_value for d in kind.shape.dim)
        if self._kv_scales and kv8.is_cache(value.name):
            return value.name, "int8", shape
        return value.name, str(helper.tensor_dtype_to_np_dtype(kind.elem_type)), shape

    def _constants(self, name: str, q: Blocks, with_codes: bool = True) -> list[str]:
        names = [name, f"{name}.scales"]
        if with_codes:
            self._writer.constant(name, pack_codes(q))
        self._writer.constant(names[1], q.scales)
        zeros = pack_zeros(q)
        if zeros is not None:
            names.append(self._writer.constant(f"{name}.zeros", zeros))
        return names


def _nbits(q: Blocks) -> dict[str, int]:
    rows, blocks = q.scales.shape
    return {
        "N": rows,
        "K": blocks * q.block,
        "bits": q.bits,
        "block_size": q.block,
        "accuracy_level": _ACCURACY_LEVEL,
    }


_HANDLERS = {
    "MatMul": GraphRewriter._matmul,
    "FusedMatMul": GraphRewriter._head,
    "Gather": GraphRewriter._gather,
}
