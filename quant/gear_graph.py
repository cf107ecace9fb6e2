"""The graph that attends to a KV cache in GEAR's form (Kang 2024), without rebuilding the cache.

History comes in chunks of 64 tokens: 4-bit codes, a few exact values and low-rank factors, see
`forerun.runtime.gear.layout`. The scales are multiplied into the queries (for keys) and into the
attention weights (for values), so that the codes enter the products as they are, and the factors
stand behind the codes: [q s, q P] [D; Q^T] = (q s) D + (q P) Q^T is one product, and so is
[a s, a Q] [D; P^T]. The newest tokens and the rows of the step are float32.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from forerun.errors import UnsupportedError
from forerun.runtime.gear.layout import CHUNK, PARTS, PartLayout, part_layouts
from forerun.runtime.manifest import TensorSpec

if TYPE_CHECKING:
    from forerun.runtime.manifest import KVLayout

_ATTENTION = "GroupQueryAttention"
_CONTRIB = frozenset({"RotaryEmbedding", "FusedMatMul"})
# Places of the inputs of GroupQueryAttention.
_COS, _SIN, _POSITIONS = 7, 8, 9
_OLD = ("past_", "present_")
_OLD_LENGTHS = ("seqlens", "total")
# Attributes of GroupQueryAttention that this form can do without, at these values.
_PLAIN = {"local_window_size": -1, "do_rotary": 1, "softcap": 0.0, "smooth_softmax": 0}


def gear_graph(model: onnx.ModelProto, layout: KVLayout) -> onnx.ModelProto:
    """Rewrite a decoder's CPU graph for a cache in GEAR's form.

    Args:
        model: the graph, its external weights not loaded; it is not changed.
        layout: of the cache.

    Returns:
        The new graph over the same weights file, with the inputs of `gear_inputs` and the outputs
        of `gear_outputs` in the place of those of the old cache.

    Raises:
        UnsupportedError: the graph attends in a way that this form cannot.
    """
    found = sum(node.op_type == _ATTENTION for node in model.graph.node)
    if found != layout.layers:
        raise UnsupportedError(f"the graph has {found} attentions for {layout.layers} layers")
    new = onnx.ModelProto()
    new.CopyFrom(model)
    _Rewriter(new.graph, layout).run()
    return new


def gear_inputs(layout: KVLayout) -> dict[str, TensorSpec]:
    """Role to input: what the graph takes in the place of the old cache.

    `bias` is added to the scores of the B tokens of the buffer and of the S rows of the step;
    `lengths` is (64 N, B + S) for N chunks; the others are, per layer and for keys and values, the
    buffer, and the tensors of `PartLayout`.
    """
    width = layout.heads * layout.head_dim
    specs = [TensorSpec("bias", "float32", ("S", "B + S")), TensorSpec("lengths", "int64", (2,))]
    for layer in range(layout.layers):
        for part, sizes in part_layouts(layout).items():
            specs.append(TensorSpec(f"{part}_buffer.{layer}", "float32", (1, "B", width)))
            specs += [
                TensorSpec(f"{part}_{name}.{layer}", dtype, ("N", *shape))
                for name, (shape, dtype) in sizes.shapes.items()
            ]
    return {spec.name: spec for spec in specs}


def gear_outputs(layout: KVLayout) -> dict[str, TensorSpec]:
    """Role to output: per layer the rows that the step adds to the buffer, keys rotated."""
    shape = (1, "S", layout.heads * layout.head_dim)
    names = [f"{part}_new.{layer}" for layer in range(layout.layers) for part in PARTS]
    return {name: TensorSpec(name, "float32", shape) for name in names}


def of_dense_cache(name: str) -> bool:
    """Whether a graph's input or output belongs to a dense cache, by its role's name."""
    return name.startswith(_OLD) or name in _OLD_LENGTHS


def _settings(node: onnx.NodeProto, layer: int) -> dict[str, Any]:
    """Attributes of an attention operator, after checking that this form can do them."""
    settings = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    for name, value in _PLAIN.items():
        if settings.get(name, value) != value:
            raise UnsupportedError(
                f"GEAR reads the whole history with plain attention, but layer {layer} has "
                f"{name} = {settings[name]}; take another KV layout"
            )
    return settings


def _reads(graph: onnx.GraphProto) -> set[str]:
    """Names that nodes read, those in the branches of `If` too."""
    names = {name for node in graph.node for name in node.input}
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                branch = attribute.g
                names |= _reads(branch) | {value.name for value in branch.output}
    return names


class _Rewriter:
    """Copies the nodes of a graph and puts the attention of `gear_graph` in their places."""

    def __init__(self, graph: onnx.GraphProto, layout: KVLayout) -> None:
        self._graph, self._layout = graph, layout
        self._parts = part_layouts(layout)
        self._nodes: list[onnx.NodeProto] = []
        self._constants: dict[str, np.ndarray] = {}
        self._prefix = ""

    def run(self) -> None:
        layer, bias = 0, ""
        for node in self._graph.node:
            if node.op_type != _ATTENTION:
                self._nodes.append(node)
                continue
            settings = _settings(node, layer)
            self._prefix = f"gear.{layer}"
            # Queries that share a key head lie one behind the other.
            bias = bias or self._add("Concat", ["bias"] * self._groups(settings), axis=0)
            self._attention(node, settings, bias, layer)
            layer += 1
        nodes = list(self._nodes)
        del self._graph.node[:]
        self._graph.node.extend(nodes)
        self._ports()

    def _groups(self, settings: dict[str, Any]) -> int:
        return settings["num_heads"] // self._layout.heads

    def _attention(
        self, node: onnx.NodeProto, settings: dict[str, Any], bias: str, layer: int
    ) -> None:
        heads, head_dim, total = self._layout.heads, self._layout.head_dim, settings["num_heads"]
        query, new = self._rotated(node, settings, layer)
        scale = self._constant("scale", np.array(settings["scale"], np.float32))
        query = self._add("Mul", [query, scale])
        query = self._reshape(query, -1, heads, self._groups(settings), head_dim)
        query = self._add("Transpose", [query], perm=[1, 2, 0, 3])
        query = self._reshape(query, heads, -1, head_dim)
        keys, values = (self._newest(part, rows, layer) for part, rows in new.items())
        near = self._add("FusedMatMul", [query, keys], transB=1)
        near = self._add("Add", [near, bias])
        scores = self._add("Concat", [self._scores(query, layer), near], axis=2)
        weights = self._add("Softmax", [scores], axis=-1)
        far, near = self._split(weights, "lengths", 2, axis=2)
        result = self._add("MatMul", [near, values])
        for other in self._sums(far, layer):
            result = self._add("Add", [result, other])
        result = self._reshape(result, total, -1, head_dim)
        result = self._add("Transpose", [result], perm=[1, 0, 2])
        result = self._reshape(result, 1, -1, total * head_dim)
        self._nodes[-1].output[0] = node.output[0]

    def _rotated(
        self, node: onnx.NodeProto, settings: dict[str, Any], layer: int
    ) -> tuple[str, dict[str, str]]:
        """Name of the rotated queries, and part to the rows that the step adds to the cache."""
        names = list(node.input)
        key, value = (f"{part}_new.{layer}" for part in PARTS)
        query, unrotated = names[:2]
        if not unrotated:
            width = self._layout.heads * self._layout.head_dim
            widths = [settings["num_heads"] * self._layout.head_dim, width, width]
            lengths = self._constant("widths", np.array(widths, np.int64))
            query, unrotated, _ = self._split(query, lengths, 3, axis=2)
            self._nodes[-1].output[2] = value
        else:
            self._add("Identity", [names[2]], [value])
        tables = [names[_POSITIONS], names[_COS], names[_SIN]]
        query = self._add("RotaryEmbedding", [query, *tables])
        self._add("RotaryEmbedding", [unrotated, *tables], [key])
        return query, {"key": key, "value": value}

    def _newest(self, part: str, rows: str, layer: int) -> str:
        """Buffer and rows of the step, float32 [heads, B + S, head_dim]."""
        both = self._add("Concat", [f"{part}_buffer.{layer}", rows], axis=1)
        both = self._reshape(both, -1, self._layout.heads, self._layout.head_dim)
        return self._add("Transpose", [both], perm=[1, 0, 2])

    def _scores(self, query: str, layer: int) -> str:
        """Scores of the chunks' tokens, float32 [heads, queries, T]."""
        sizes = self._parts["key"]
        numbers = self._numbers("key", layer)
        codes = self._tile("key", numbers["left"], layer)
        if sizes.outliers:
            # Only the rows of codes have outliers; those of the factors stand behind them.
            exact = self._reshape(numbers["exact"], -1, sizes.heads, sizes.head_dim, sizes.outliers)
            index = self._add("Cast", [f"key_index.{layer}"], to=TensorProto.INT32)
            index = self._reshape(index, -1, sizes.heads, sizes.head_dim, sizes.outliers)
            codes = self._add("ScatterElements", [codes, index, exact], axis=3)
        scaled = self._add("Mul", [query, numbers["scale"]])
        # One product a head for all chunks; a product over broadcast chunks cannot do with none.
        right = self._add("Transpose", [numbers["right"]], perm=[1, 0, 2, 3])
        right = self._reshape(right, sizes.heads, -1, sizes.head_dim)
        factored = self._add("FusedMatMul", [query, right], transB=1)
        factored = self._reshape(factored, 0, 0, -1, sizes.rank + 1)
        factored = self._add("Transpose", [factored], perm=[2, 0, 1, 3])
        cut = self._constant("cut", np.array([sizes.rank, 1], np.int64))
        factored, lows = self._split(factored, cut, 2, axis=3)
        scores = self._add("Concat", [scaled, factored], axis=3)
        scores = self._add("Add", [self._add("MatMul", [scores, codes]), lows])
        scores = self._add("Transpose", [scores], perm=[1, 2, 0, 3])
        return self._reshape(scores, 0, 0, -1)

    def _sums(self, weights: str, layer: int) -> tuple[str, str]:
        """Weighted sums of the chunks' values, float32 [heads, queries, head_dim], in two terms."""
        sizes = self._parts["value"]
        numbers = self._numbers("value", layer)
        codes = self._tile("value", numbers["right"], layer)
        if sizes.outliers:
            codes = self._with_outliers(codes, numbers["exact"], sizes, layer)
        weights = self._reshape(weights, 0, 0, -1, CHUNK)
        weights = self._add("Transpose", [weights], perm=[2, 0, 1, 3])
        scaled = self._add("Mul", [weights, numbers["scale"]])
        factored = self._add("FusedMatMul", [weights, numbers["left"]], transB=1)
        both = self._add("Concat", [scaled, factored], axis=3)
        product = self._add("MatMul", [both, codes])
        first = self._constant("first", np.array([0], np.int64))
        product = self._add("ReduceSum", [product, first], keepdims=0)
        lows = self._add("Mul", [weights, numbers["low"]])
        ends = self._constant("ends", np.array([0, 3], np.int64))
        lows = self._add("ReduceSum", [lows, ends], keepdims=1)
        return product, lows

    def _with_outliers(self, codes: str, exact: str, sizes: PartLayout, layer: int) -> str:
        """Put a token's outliers, which lie in any head, into their places in a chunk."""
        rows = CHUNK + sizes.rank
        index = self._add("Cast", [f"value_index.{layer}"], to=TensorProto.INT32)
        index = self._reshape(index, -1, CHUNK * sizes.outliers)
        flat = self._reshape(codes, -1, sizes.heads * rows * sizes.head_dim)
        flat = self._add("ScatterElements", [flat, index, exact], axis=1)
        return self._reshape(flat, -1, sizes.heads, rows, sizes.head_dim)

    def _tile(self, part: str, factor: str, layer: int) -> str:
        """Codes, the first half of the rows as sixteenths, and below them the rows of a factor."""
        sixteenth = self._constant("sixteenth", np.array(1 / 16, np.float32))
        # Not DequantizeLinear: ONNX Runtime would compute it once for every reader.
        both = self._add("Cast", [f"{part}_codes.{layer}"], to=TensorProto.FLOAT)
        both = self._add("Mul", [both, sixteenth])
        high = self._add("Floor", [both])
        low = self._add("Sub", [both, high])
        return self._add("Concat", [low, high, factor], axis=2)

    def _numbers(self, part: str, layer: int) -> dict[str, str]:
        """The float32 parts of `PartLayout.numbers`, shaped for broadcasting over queries."""
        sizes = self._parts[part]
        lengths = sizes.numbers
        wide = self._add("Cast", [f"{part}_numbers.{layer}"], to=TensorProto.FLOAT)
        cuts = self._constant(f"{part}_cuts", np.array(list(lengths.values()), np.int64))
        parts = dict(zip(lengths, self._split(wide, cuts, len(lengths), axis=1), strict=True))
        width = sizes.tile[0]
        rows = lengths["right"] // (sizes.heads * sizes.head_dim)
        parts["right"] = self._reshape(parts["right"], -1, sizes.heads, rows, sizes.head_dim)
        parts["left"] = self._reshape(parts["left"], -1, sizes.heads, sizes.rank, CHUNK)
        for name in ("scale", "low"):
            if name in parts:
                parts[name] = self._reshape(parts[name], -1, sizes.scales // width, 1, width)
        return parts

    def _ports(self) -> None:
        """Replace the inputs and outputs of the old cache, drop what nothing reads any more."""
        graph = self._graph
        for ports, new in (
            (graph.input, gear_inputs(self._layout)),
            (graph.output, gear_outputs(self._layout)),
        ):
            kept = [port for port in ports if not of_dense_cache(port.name)]
            del ports[:]
            ports.extend(kept)
            ports.extend(
                helper.make_tensor_value_info(
                    spec.name, helper.np_dtype_to_tensor_dtype(np.dtype(spec.dtype)), spec.shape
                )
                for spec in new.values()
            )
        read = _reads(graph)
        kept = [tensor for tensor in graph.initializer if tensor.name in read]
        del graph.initializer[:]
        graph.initializer.extend(kept)
        graph.initializer.extend(
            numpy_helper.from_array(value, name) for name, value in self._constants.items()
        )
        del graph.value_info[:]

    def _add(self, op: str, inputs: list[str], outputs: list[str] | None = None, **kw: Any) -> str:
        name = f"{self._prefix}.{op}_{len(self._nodes)}"
        domain = "com.microsoft" if op in _CONTRIB else ""
        node = helper.make_node(op, inputs, outputs or [name], name=name, domain=domain, **kw)
        self._nodes.append(node)
        return node.output[0]

    def _split(self, x: str, lengths: str, count: int, axis: int) -> list[str]:
        names = [f"{self._prefix}.part_{len(self._nodes)}_{i}" for i in range(count)]
        self._add("Split", [x, lengths], names, axis=axis)
        return names

    def _reshape(self, x: str, *shape: int) -> str:
        name = "shape_" + "_".join(str(n) for n in shape)
        return self._add("Reshape", [x, self._constant(name, np.array(shape, np.int64))])

    def _constant(self, name: str, value: np.ndarray) -> str:
        """A constant that all layers share."""
        name = f"gear.{name}"
        known = self._constants.setdefault(name, value)
        assert np.array_equal(known, value), name
        return name
