"""Replacing float matrices of a graph by quantized ones, node by node."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx
from onnx import helper

from forerun.export.graph import HEAD_WEIGHT
from forerun.export.writer import GraphWriter
from forerun.quant import affine, blocks, rows8
from forerun.quant.blocks import Blocks, pack_codes
from forerun.quant.float_weights import FloatWeights

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    Stored = Blocks | affine.Affine | rows8.Columns8

_PRODUCTS = {
    Blocks: blocks.write_product,
    affine.Affine: affine.write_product,
    rows8.Columns8: rows8.write_product,
}


class GraphRewriter:
    """Copies a graph into another folder with its matrices quantized.

    Args:
        model: the graph, its external weights not loaded.
        bundle: where the weights of `model` are.
        folder: where the new graph and its weights go.
        store: quantizes a matrix [N, K], given its name. An embedding must become `Blocks`.
        head_in_rows: store the head for integer products (`rows8`), apart from a tied embedding.
        factors: of constants, to be multiplied in before quantization (see `smooth`).
    """

    def __init__(
        self,
        model: onnx.ModelProto,
        bundle: Path,
        folder: Path,
        store: Callable[[str, np.ndarray], Stored],
        *,
        head_in_rows: bool = False,
        factors: dict[str, tuple[np.ndarray, ...]] | None = None,
    ) -> None:
        self._graph = model.graph
        self._weights = FloatWeights(model, bundle, factors)
        self._writer = GraphWriter(folder)
        self._store = store
        self._head_in_rows = head_in_rows
        self._tables: dict[str, Blocks] = {}
        self._rest: dict[str, list[str]] = {}

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
        if handler and any(self._weights.is_matrix(name) for name in node.input):
            handler(self, node)
            return
        for name in node.input:
            if name in self._weights and name not in kept:
                kept.add(name)
                self._writer.constant(name, self._weights.array(name))
        attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        self._writer.add(node.op_type, list(node.input), list(node.output), **attributes)

    def _matmul(self, node: onnx.NodeProto) -> None:
        """[.., K] times [K, N]."""
        x, name = node.input
        weight = np.ascontiguousarray(self._weights.array(name).T)
        in_rows = self._head_in_rows and name == HEAD_WEIGHT
        stored = rows8.quantize_rows(weight) if in_rows else self._store(name, weight)
        self._product(x, name, stored, list(node.output))

    def _head(self, node: onnx.NodeProto) -> None:
        """[.., K] times the transposed embedding [N, K]."""
        x, name = node.input
        if self._head_in_rows:
            stored = rows8.quantize_rows(self._weights.array(name))
            self._product(x, f"{name}.{HEAD_WEIGHT}", stored, list(node.output))
            return
        q = self._table(name)
        packed = pack_codes(q)
        offset = self._writer.offset_of(name)
        weight = self._writer.alias(f"{name}.shared", packed.dtype, packed.shape, offset)
        inputs = [x, weight, *self._rest[name]]
        attributes = blocks.product_attributes(q)
        self._writer.add("MatMulNBits", inputs, list(node.output), **attributes)

    def _product(self, x: str, name: str, stored: Stored, outputs: list[str]) -> None:
        write = _PRODUCTS[type(stored)]
        write(self._writer, x, name, stored, outputs)

    def _gather(self, node: onnx.NodeProto) -> None:
        """Rows of the embedding [V, D]."""
        name, ids = node.input
        q = self._table(name)
        self._writer.add(
            "GatherBlockQuantized",
            [name, ids, *self._rest[name]],
            list(node.output),
            bits=q.bits,
            block_size=q.block,
            gather_axis=0,
            quantize_axis=1,
        )

    def _table(self, name: str) -> Blocks:
        """Quantize a table once, for the embedding and the head."""
        if name not in self._tables:
            q = self._store(name, np.asarray(self._weights.array(name)))
            if not isinstance(q, Blocks):
                raise TypeError(f"an embedding is stored in blocks only, not as {type(q).__name__}")
            packed = pack_codes(q)
            self._writer.constant(name, packed.reshape(len(packed), -1), inline=False)
            self._rest[name] = blocks.write_constants(self._writer, name, q)
            self._tables[name] = q
        return self._tables[name]

    def _value_info(self, value: onnx.ValueInfoProto) -> tuple[str, str, tuple[int | str, ...]]:
        kind = value.type.tensor_type
        shape = tuple(d.dim_param or d.dim_value for d in kind.shape.dim)
        return value.name, str(helper.tensor_dtype_to_np_dtype(kind.elem_type)), shape


_HANDLERS = {
    "MatMul": GraphRewriter._matmul,
    "FusedMatMul": GraphRewriter._head,
    "Gather": GraphRewriter._gather,
}
