"""The graph for devices that need static shapes: the same graph and weights file, other operators.

Everything is written in standard operators that an NPU's compiler takes. The number of rows is a
named axis that the runtime fixes when it opens a session, one session a query width, so that one
file serves all widths. What differs from the graph for the CPU:

- the embedding is looked up outside (`EMBED_GRAPH_NAME`), since an NPU gains nothing from it;
- keys and values go where the input `slots` says, and an additive `mask` says what a row sees, so
  that chains, padding and trees are the same graph;
- logits are computed for all rows, since a choice of rows would be another free axis.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from forerun.errors import UnsupportedError
from forerun.export.graph import CAPACITY_AXIS
from forerun.runtime.manifest import Lowering, TensorSpec

if TYPE_CHECKING:
    from collections.abc import Callable

    from forerun.runtime.manifest import Manifest


STATIC_GRAPH_NAME = "model-npu.onnx"
EMBED_GRAPH_NAME = "embed.onnx"
# The first with RMSNormalization among the standard operators.
_OPSET = 23
_IR_VERSION = 10
QUERY_WIDTHS = (1, 4, 8)
_NAMES = ("npu", "npu-embed")
_ATTENTION = "GroupQueryAttention"
# Place of the cosines among its inputs.
_COS = 7


class StaticRewriter:
    """Rewrites a decoder's graph for the CPU, node by node.

    Args:
        model: the graph; its weights stay in their file.
        capacity: length of the KV cache.

    Attributes:
        nodes: of the graph for the NPU.
        constants: small ones that the nodes need besides the weights.
        embed: the node that looks the embedding up.
        width: of the embedding.

    Raises:
        UnsupportedError: an operator has no static form.
    """

    def __init__(self, model: onnx.ModelProto, capacity: int) -> None:
        self.capacity = capacity
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []
        self.embed: onnx.NodeProto | None = None
        self.width = 0
        self._shapes = {t.name: tuple(t.dims) for t in model.graph.initializer}
        self._renamed: dict[str, str] = {}
        self._count = 0
        for node in model.graph.node:
            self._rewrite(node)

    def _rewrite(self, node: onnx.NodeProto) -> None:
        node = _copy(node, [self._renamed.get(name, name) for name in node.input])
        handler = _HANDLERS.get(node.op_type)
        if handler:
            handler(self, node)
        elif node.domain:
            raise UnsupportedError(
                f"the graph has the operator {node.op_type}, for which there is no static form; "
                "give a float32 bundle"
            )
        else:
            self.nodes.append(node)

    def _add(self, op: str, inputs: list[str], output: str = "", **attributes: Any) -> str:
        self._count += 1
        output = output or f"s{self._count}"
        name = f"{op}_s{self._count}"
        self.nodes.append(helper.make_node(op, inputs, [output], name=name, **attributes))
        return output

    def _constant(self, value: np.ndarray) -> str:
        self._count += 1
        name = f"c{self._count}"
        self.constants.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def _reshape(self, x: str, shape: list[int], output: str = "") -> str:
        return self._add("Reshape", [x, self._constant(np.array(shape, np.int64))], output)

    def _split(self, x: str, sizes: list[int]) -> list[str]:
        self._count += 1
        outputs = [f"s{self._count}_{i}" for i in range(len(sizes))]
        inputs = [x, self._constant(np.array(sizes, np.int64))]
        name = f"Split_s{self._count}"
        self.nodes.append(helper.make_node("Split", inputs, outputs, name=name, axis=-1))
        return outputs

    def _gather(self, node: onnx.NodeProto) -> None:
        if node.input[1] == "ids":
            self.width = self._shapes[node.input[0]][1]
            self._renamed[node.output[0]] = "embeddings"
            self.embed = _copy(node, list(node.input))
            self.embed.output[:] = ["embeddings"]
        elif node.input[1] == "rows":
            self._renamed[node.output[0]] = node.input[0]
        else:
            self.nodes.append(node)

    def _norm(self, node: onnx.NodeProto) -> None:
        eps = _attributes(node)["epsilon"]
        self._add("RMSNormalization", list(node.input), node.output[0], axis=-1, epsilon=eps)

    def _skip_norm(self, node: onnx.NodeProto) -> None:
        x, y, weight = node.input
        total = self._add("Add", [x, y], node.output[3])
        eps = _attributes(node)["epsilon"]
        self._add("RMSNormalization", [total, weight], node.output[0], axis=-1, epsilon=eps)

    def _silu(self, node: onnx.NodeProto) -> None:
        """QuickGelu is x * sigmoid(alpha * x)."""
        if _attributes(node)["alpha"] != 1.0:
            raise UnsupportedError("QuickGelu with another alpha than 1 has no static form")
        x = node.input[0]
        self._add("Mul", [x, self._add("Sigmoid", [x])], node.output[0])

    def _tied_head(self, node: onnx.NodeProto) -> None:
        """[1, S, D] times the transposed table [V, D], which stays as it is."""
        x, table = node.input
        vocab, hidden = self._shapes[table]
        flat = self._add("Gemm", [self._reshape(x, [-1, hidden]), table], transB=1)
        self._reshape(flat, [1, -1, vocab], node.output[0])

    def _attention(self, node: onnx.NodeProto) -> None:
        given = _attributes(node)
        if given.get("local_window_size", -1) > 0:
            raise UnsupportedError("models with a sliding window have no static form yet")
        heads, shared = given["num_heads"], given["kv_num_heads"]
        q, k, v, past_key, past_value, _, _, cos, sin, positions = node.input
        size = 2 * self._shapes[cos][1]
        if not k:
            q, k, v = self._split(q, [heads * size, shared * size, shared * size])
        half = size // 2
        cos, sin = (
            self._reshape(self._add("Gather", [table, positions], axis=0), [1, -1, 1, half])
            for table in (cos, sin)
        )
        q = self._rotated(self._reshape(q, [1, -1, heads, size]), cos, sin, half)
        k = self._rotated(self._reshape(k, [1, -1, shared, size]), cos, sin, half)
        keys = self._cached(past_key, k, node.output[1], shared, size)
        v = self._reshape(v, [1, -1, shared, size])
        values = self._cached(past_value, v, node.output[2], shared, size)
        q = self._add("Mul", [q, self._constant(np.array(given["scale"], np.float32))])
        q = self._reshape(self._swapped(q), [shared, -1, size])
        weights = self._weights(q, keys, shared, heads // shared)
        attended = self._reshape(self._add("MatMul", [weights, values]), [1, heads, -1, size])
        self._reshape(self._swapped(attended), [1, -1, heads * size], node.output[0])

    def _swapped(self, x: str) -> str:
        """Rows and heads of x [1, S, heads, size] or [1, heads, S, size] change places."""
        return self._add("Transpose", [x], perm=[0, 2, 1, 3])

    def _rotated(self, x: str, cos: str, sin: str, half: int) -> str:
        """Rotate the halves of each head of x [1, S, heads, 2 * half]."""
        low, high = self._split(x, [half, half])
        left = self._add("Sub", [self._add("Mul", [low, cos]), self._add("Mul", [high, sin])])
        right = self._add("Add", [self._add("Mul", [high, cos]), self._add("Mul", [low, sin])])
        return self._add("Concat", [left, right], axis=-1)

    def _cached(self, past: str, new: str, present: str, shared: int, size: int) -> str:
        """Put new [1, S, shared, size] into its slots; [shared, capacity, size] afterwards."""
        cache = self._reshape(past, [-1, size])
        rows = self._reshape(self._swapped(new), [-1, size])
        cache = self._add("ScatterND", [cache, "slots", rows])
        self._reshape(cache, [1, shared, -1, size], present)
        return self._reshape(cache, [shared, -1, size])

    def _weights(self, q: str, keys: str, shared: int, group: int) -> str:
        """Attention weights [shared, group * S, capacity]; every key head serves `group` heads."""
        keys = self._add("Transpose", [keys], perm=[0, 2, 1])
        scores = self._reshape(self._add("MatMul", [q, keys]), [shared, group, -1, self.capacity])
        weights = self._add("Softmax", [self._add("Add", [scores, "mask"])], axis=-1)
        return self._reshape(weights, [shared, -1, self.capacity])


def _copy(node: onnx.NodeProto, inputs: list[str]) -> onnx.NodeProto:
    copy = onnx.NodeProto()
    copy.CopyFrom(node)
    del copy.input[:]
    copy.input.extend(inputs)
    return copy


def _attributes(node: onnx.NodeProto) -> dict[str, Any]:
    return {a.name: helper.get_attribute_value(a) for a in node.attribute}


_HANDLERS: dict[str, Callable[[StaticRewriter, onnx.NodeProto], None]] = {
    "Gather": StaticRewriter._gather,
    "SimplifiedLayerNormalization": StaticRewriter._norm,
    "SkipSimplifiedLayerNormalization": StaticRewriter._skip_norm,
    "QuickGelu": StaticRewriter._silu,
    "FusedMatMul": StaticRewriter._tied_head,
    _ATTENTION: StaticRewriter._attention,
}


def write_static_graph(folder: Path, chain: Lowering) -> dict[str, Lowering]:
    """Write `STATIC_GRAPH_NAME` and `EMBED_GRAPH_NAME` beside a decoder's graph.

    Args:
        folder: of the bundle; the new graphs read the same weights file.
        chain: the manifest's entry of the decoder's graph.

    Returns:
        The manifest's entries ``npu`` and ``npu-embed``.

    Raises:
        UnsupportedError: an operator of the graph has no static form.
    """
    model = onnx.load(str(folder / chain.graph), load_external_data=False)
    capacity = _longest(model)
    chain = _sized(chain, capacity)
    static = StaticRewriter(model, capacity)
    if static.embed is None:
        raise UnsupportedError(
            f"{chain.graph} does not look up an embedding, so it has no static form"
        )
    npu, embed = _lowerings(chain, static)
    _save(folder, npu, static.nodes, [*static.constants, *model.graph.initializer])
    _save(folder, embed, [static.embed], list(model.graph.initializer))
    return dict(zip(_NAMES, (npu, embed), strict=True))


def without_static(manifest: Manifest) -> Manifest:
    """The manifest of a bundle without its static form, e.g. to quantize the others."""
    dropped = {form.graph for name, form in manifest.lowerings.items() if name in _NAMES}
    return dataclasses.replace(
        manifest,
        lowerings={n: form for n, form in manifest.lowerings.items() if n not in _NAMES},
        files={name: entry for name, entry in manifest.files.items() if name not in dropped},
    )


def _longest(model: onnx.ModelProto) -> int:
    """Tokens that the rotary tables reach; 0 without attention."""
    rows = {tensor.name: tensor.dims[0] for tensor in model.graph.initializer if tensor.dims}
    found = [node.input[_COS] for node in model.graph.node if node.op_type == _ATTENTION]
    return int(rows[found[0]]) if found else 0


def _sized(chain: Lowering, capacity: int) -> Lowering:
    """The same entry with a KV cache of that length, since the graph has no free axis for it."""

    def fixed(specs: dict[str, TensorSpec]) -> dict[str, TensorSpec]:
        return {
            role: dataclasses.replace(
                spec, shape=tuple(capacity if d == CAPACITY_AXIS else d for d in spec.shape)
            )
            for role, spec in specs.items()
        }

    return dataclasses.replace(chain, inputs=fixed(chain.inputs), outputs=fixed(chain.outputs))


def _lowerings(chain: Lowering, static: StaticRewriter) -> tuple[Lowering, Lowering]:
    caches = {role: spec for role, spec in chain.inputs.items() if role.startswith("past_")}
    outputs = {
        role: TensorSpec(spec.name, spec.dtype, tuple("S" if d == "R" else d for d in spec.shape))
        for role, spec in chain.outputs.items()
    }
    embeddings = TensorSpec("embeddings", "float32", (1, "S", static.width))
    inputs = {
        "embeddings": embeddings,
        "positions": chain.inputs["positions"],
        "slots": TensorSpec("slots", "int64", ("U", 1)),
        "mask": TensorSpec("mask", "float32", ("S", static.capacity)),
    }
    found = {"ids": chain.inputs["ids"]}
    return (
        Lowering(STATIC_GRAPH_NAME, inputs | caches, outputs, QUERY_WIDTHS),
        Lowering(EMBED_GRAPH_NAME, found, {"embeddings": embeddings}),
    )


def _save(
    folder: Path, form: Lowering, nodes: list[onnx.NodeProto], constants: list[onnx.TensorProto]
) -> None:
    used = {name for node in nodes for name in node.input}
    graph = helper.make_graph(
        nodes,
        "forerun",
        [_value(spec) for spec in form.inputs.values()],
        [_value(spec) for spec in form.outputs.values()],
        [tensor for tensor in constants if tensor.name in used],
    )
    model = helper.make_model(
        graph,
        opset_imports=[helper.make_opsetid("", _OPSET)],
        ir_version=_IR_VERSION,
        producer_name="forerun",
    )
    (folder / form.graph).write_bytes(model.SerializeToString())


def _value(spec: TensorSpec) -> onnx.ValueInfoProto:
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(spec.dtype))
    return helper.make_tensor_value_info(spec.name, kind, list(spec.shape))
