"""The graphs for GPUs: made from the CPU's, over the same weights file.

Three things differ. The GPU's `GroupQueryAttention` rotates by row number whatever the positions
say, so queries and keys are rotated by nodes of their own. Its cache is float32. And products with
quantized weights keep float32 activations: the provider would round them to int8 in longer blocks
than the CPU, which errs about twice as much where activations have outliers.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from forerun.runtime.manifest import Lowering, TensorSpec

if TYPE_CHECKING:
    from forerun.runtime.manifest import KVLayout, Manifest

FORM = "webgpu"
GRAPH_NAMES = {"cpu": "model-webgpu.onnx", "cpu-tree": "model-webgpu-tree.onnx"}
MOVE_FORM = "webgpu-move"
MOVE_GRAPH_NAME = "kv-move.onnx"
_FILES = frozenset({*GRAPH_NAMES.values(), MOVE_GRAPH_NAME})
# Operators of decoders that were run on the provider and gave the CPU's numbers.
_OPERATORS = frozenset(
    {
        "Add",
        "Cast",
        "Concat",
        "DequantizeLinear",
        "FastGelu",
        "Gemm",
        "Gather",
        "GatherBlockQuantized",
        "GroupQueryAttention",
        "MatMul",
        "MatMulNBits",
        "Mul",
        "QuickGelu",
        "Reshape",
        "SimplifiedLayerNormalization",
        "SkipSimplifiedLayerNormalization",
        "Split",
        "Unsqueeze",
    }
)
_TIED_HEAD = "FusedMatMul"
_INTEGER_PRODUCT = "MatMulIntegerToFloat"
# Inputs of GroupQueryAttention by number.
_PAST_KEY, _COS, _SIN, _POSITIONS, _BIAS = 3, 7, 8, 9, 10
_CACHE_ATTRIBUTES = frozenset({"kv_cache_bit_width", "k_quant_type", "v_quant_type"})


def write_webgpu_graphs(
    folder: Path, forms: dict[str, Lowering], layout: KVLayout
) -> dict[str, Lowering]:
    """Write the graphs for GPUs beside those for the CPU.

    Args:
        folder: of the bundle.
        forms: its lowerings; those named in `GRAPH_NAMES` are translated.
        layout: of its KV cache.

    Returns:
        The manifest's entries for what was written; nothing if the graph has an operator that
        GPUs lack.
    """
    written: dict[str, Lowering] = {}
    for name, target in GRAPH_NAMES.items():
        if name not in forms:
            continue
        model = onnx.load(str(folder / forms[name].graph), load_external_data=False)
        _without_integer_products(model.graph)
        _repack_zero_points(model.graph, folder)
        if not _translatable(model):
            return {}
        _translate(model, layout)
        (folder / target).write_bytes(model.SerializeToString())
        written[name.replace("cpu", FORM)] = _lowering(forms[name], target, layout)
    if written:
        written[MOVE_FORM] = _write_move_graph(folder, layout)
    return written


def with_webgpu(folder: Path, manifest: Manifest) -> Manifest:
    """Write the graphs for GPUs into a bundle's folder; return the manifest that lists them."""
    forms = write_webgpu_graphs(folder, manifest.lowerings, manifest.kv)
    return dataclasses.replace(manifest, lowerings=manifest.lowerings | forms)


def without_webgpu(manifest: Manifest) -> Manifest:
    """The manifest of a bundle without its graphs for GPUs, e.g. to quantize the others."""
    return dataclasses.replace(
        manifest,
        lowerings={n: f for n, f in manifest.lowerings.items() if f.graph not in _FILES},
        files={name: entry for name, entry in manifest.files.items() if name not in _FILES},
    )


def _translatable(model: onnx.ModelProto) -> bool:
    for node in model.graph.node:
        # A softcap is taken and ignored there, which would only show as wrong text.
        capped = any(a.name == "softcap" and a.f for a in node.attribute)
        if node.op_type not in _OPERATORS | {_TIED_HEAD} or capped:
            return False
    return True


def _without_integer_products(graph: onnx.GraphProto) -> None:
    """Replace products of rounded rows with int8 columns by products with the scaled columns."""
    made = {output: node for node in graph.node for output in node.output}
    for node in [n for n in graph.node if n.op_type == _INTEGER_PRODUCT]:
        rounded, codes, _, scales = node.input[:4]
        rows = made[made[rounded].input[0]].input[0]
        scaled = next(n for n in graph.node if node.output[0] in n.input)
        columns = f"{codes}.float"
        decode = helper.make_node("DequantizeLinear", [codes, scales], [columns], axis=1)
        graph.node.insert(list(graph.node).index(scaled), decode)
        scaled.CopyFrom(helper.make_node("MatMul", [rows, columns], list(scaled.output)))
    _drop_unused(graph)


def _drop_unused(graph: onnx.GraphProto) -> None:
    used = {value.name for value in graph.output}
    kept = []
    for node in reversed(graph.node):
        if used & set(node.output):
            kept.append(node)
            used |= set(node.input)
    del graph.node[:]
    graph.node.extend(reversed(kept))
    constants = [tensor for tensor in graph.initializer if tensor.name in used]
    del graph.initializer[:]
    graph.initializer.extend(constants)


def _translate(model: onnx.ModelProto, layout: KVLayout) -> None:
    nodes: list[onnx.NodeProto] = []
    for node in model.graph.node:
        if node.op_type == "GroupQueryAttention":
            nodes += _attention(model.graph, node, layout.head_dim)
            continue
        if node.op_type == _TIED_HEAD:
            nodes += _tied_head(model.graph, node)
            continue
        for attribute in node.attribute:
            if attribute.name == "accuracy_level":
                attribute.i = 0
        nodes.append(node)
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    _drop_unused(model.graph)
    for value in [*model.graph.input, *model.graph.output]:
        if value.name.startswith(("past_", "present_")):
            value.type.tensor_type.elem_type = TensorProto.FLOAT
            dims = value.type.tensor_type.shape.dim
            dims[2].dim_value, dims[3].dim_value = layout.capacity, layout.head_dim


def _tied_head(graph: onnx.GraphProto, node: onnx.NodeProto) -> list[onnx.NodeProto]:
    """A product with a transposed matrix; only `Gemm` has it there, and takes two axes."""
    rows, table = node.input
    width = next(t.dims[1] for t in graph.initializer if t.name == table)
    flat, first = f"{node.name}.flat", f"{node.name}.first"
    graph.initializer.append(numpy_helper.from_array(np.array([-1, width], np.int64), flat))
    graph.initializer.append(numpy_helper.from_array(np.array([0], np.int64), first))
    return [
        helper.make_node("Reshape", [rows, flat], [f"{rows}.flat"]),
        helper.make_node("Gemm", [f"{rows}.flat", table], [f"{rows}.product"], transB=1),
        helper.make_node("Unsqueeze", [f"{rows}.product", first], list(node.output)),
    ]


def _repack_zero_points(graph: onnx.GraphProto, folder: Path) -> None:
    """Give 4-bit embedding tables with an odd number of blocks the type uint4.

    In uint8 every row of zero points ends in half a byte then, which the provider refuses; in
    uint4 the rows follow each other without one. The table's own bytes stay what they are.
    """
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    # Scales may be stored in float16.
    stored = {node.output[0]: node.input[0] for node in graph.node if node.op_type == "Cast"}
    for node in graph.node:
        if node.op_type != "GatherBlockQuantized" or len(node.input) < 4:
            continue
        table, zeros = tensors[node.input[0]], tensors[node.input[3]]
        vocab, blocks = tensors[stored.get(node.input[2], node.input[2])].dims
        bits = next((a.i for a in node.attribute if a.name == "bits"), 4)
        if bits != 4 or blocks % 2 == 0 or table.data_type != TensorProto.UINT8:
            continue
        packed = _bytes_of(zeros, folder)
        codes = np.stack([packed & 15, packed >> 4], -1).reshape(vocab, -1)[:, :blocks].ravel()
        codes = np.append(codes, np.zeros(codes.size % 2, np.uint8))
        even = TensorProto(name=f"{zeros.name}.even", data_type=TensorProto.UINT4)
        even.dims.extend([vocab, blocks])
        even.raw_data = (codes[0::2] | (codes[1::2] << 4)).tobytes()
        graph.initializer.append(even)
        node.input[3] = even.name
        table.data_type, table.dims[1] = TensorProto.UINT4, table.dims[1] * 2


def _bytes_of(tensor: onnx.TensorProto, folder: Path) -> np.ndarray:
    """A uint8 tensor, in the graph or in the weights file."""
    if tensor.data_location != TensorProto.EXTERNAL:
        return numpy_helper.to_array(tensor)
    where = {entry.key: entry.value for entry in tensor.external_data}
    shape = tuple(tensor.dims)
    return np.memmap(folder / where["location"], np.uint8, "r", int(where["offset"]), shape)


def _attention(graph: onnx.GraphProto, node: onnx.NodeProto, head_dim: int) -> list[onnx.NodeProto]:
    """The nodes in place of one attention that rotates by itself."""
    given: dict[str, Any] = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    kept: dict[str, Any] = {k: v for k, v in given.items() if k not in _CACHE_ATTRIBUTES}
    kept["do_rotary"] = 0
    inputs = [*node.input, *[""] * (_BIAS + 1 - len(node.input))]
    nodes: list[onnx.NodeProto] = []
    query, key, value = inputs[:3]
    if not key:
        widths = np.array([given["num_heads"], *[given["kv_num_heads"]] * 2], np.int64) * head_dim
        sizes = f"{node.name}.widths"
        graph.initializer.append(numpy_helper.from_array(widths, sizes))
        parts = [f"{node.name}.{part}" for part in ("query", "key", "value")]
        nodes.append(helper.make_node("Split", [query, sizes], parts, axis=-1))
        query, key, value = parts
    rotated = [f"{query}.rotated", f"{key}.rotated"]
    tables = [inputs[_POSITIONS], inputs[_COS], inputs[_SIN]]
    for plain, turned in zip((query, key), rotated, strict=True):
        nodes.append(
            helper.make_node("RotaryEmbedding", [plain, *tables], [turned], domain="com.microsoft")
        )
    wanted = [*rotated, value, *inputs[_PAST_KEY:_COS], "", "", "", inputs[_BIAS]]
    while not wanted[-1]:
        wanted.pop()
    nodes.append(
        helper.make_node(
            node.op_type, wanted, list(node.output), node.name, domain=node.domain, **kept
        )
    )
    return nodes


def _lowering(form: Lowering, graph: str, layout: KVLayout) -> Lowering:
    inputs = form.inputs | _cache_specs(layout, "past")
    outputs = form.outputs | _cache_specs(layout, "present")
    return dataclasses.replace(form, graph=graph, inputs=inputs, outputs=outputs)


def _cache_specs(layout: KVLayout, when: str) -> dict[str, TensorSpec]:
    shape = (1, layout.heads, layout.capacity, layout.head_dim)
    names = [f"{when}_{part}.{i}" for i in range(layout.layers) for part in ("key", "value")]
    return {name: TensorSpec(name, "float32", shape) for name in names}


def _write_move_graph(folder: Path, layout: KVLayout) -> Lowering:
    """A graph that moves rows of the cache where it lies, to commit the path of a tree.

    `source` int64 [N] are the rows to take, `target` int64 [1, heads, N, 3] the full indices
    (0, head, row) of where each goes.
    """
    indices = {
        "source": TensorSpec("source", "int64", ("N",)),
        "target": TensorSpec("target", "int64", (1, layout.heads, "N", 3)),
    }
    past, present = _cache_specs(layout, "past"), _cache_specs(layout, "present")
    nodes = []
    for before, after in zip(past, present, strict=True):
        rows = f"{before}.rows"
        nodes.append(helper.make_node("Gather", [before, "source"], [rows], axis=2))
        nodes.append(helper.make_node("ScatterND", [before, "target", rows], [after]))
    graph = helper.make_graph(
        nodes,
        "move",
        [_value(s) for s in (indices | past).values()],
        list(map(_value, present.values())),
    )
    opsets = [helper.make_opsetid("", 21)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10, producer_name="forerun")
    (folder / MOVE_GRAPH_NAME).write_bytes(model.SerializeToString())
    return Lowering(MOVE_GRAPH_NAME, indices | past, present)


def _value(spec: TensorSpec) -> onnx.ValueInfoProto:
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(spec.dtype))
    return helper.make_tensor_value_info(spec.name, kind, list(spec.shape))
