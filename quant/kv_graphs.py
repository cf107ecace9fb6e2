"""The graphs that run the other layouts of a KV cache, over the same weights file.

Only the attention operators differ: codes of 8 and 4 bits are read by the operator itself, with
scales that are constants of the graph; for a float16 cache what goes in and out is converted.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from forerun.errors import OptionError, UnsupportedError
from forerun.runtime.layouts import CHAIN, LAYOUTS, TREE, layout_name, lowering_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from forerun.runtime.manifest import KVLayout, Lowering, Manifest, TensorSpec

    Scales = dict[str, dict[str, np.ndarray]]

FLOAT = "fp32"
DENSE = tuple(name for name, row in LAYOUTS.items() if row.kind == "dense")
_ATTENTION = "GroupQueryAttention"
# Inputs of GroupQueryAttention by number: those that have the type of the activations, and scales.
_ACTIVATIONS = (0, 1, 2, 7, 8, 10)
_SCALES = 12
_GRAPH = "model-{}.onnx"


def with_layouts(
    folder: Path,
    manifest: Manifest,
    scales: Scales,
    *,
    default: str = FLOAT,
    names: Sequence[str] = (),
) -> Manifest:
    """Write the graphs of further layouts into a bundle's folder, and choose the default.

    Args:
        folder: of the bundle, with the graphs of its float32 cache.
        manifest: of the bundle; what it says about other devices stays.
        scales: layout name to `quant.kv.calibrate`'s scales, for the layouts that need them.
        default: the layout that ``cpu`` and ``cpu-tree`` shall run.
        names: of the layouts to have besides; those of `DENSE`.

    Returns:
        The manifest with the new default, `kv_layouts` and lowerings.

    Raises:
        OptionError: a name is not one of `DENSE`.
        UnsupportedError: the bundle's cache is not float32.
    """
    wanted = [*dict.fromkeys(names)]
    for name in (default, *wanted):
        if name not in DENSE:
            raise OptionError(f"a KV layout must be one of {', '.join(DENSE)}, got {name!r}")
    if layout_name(manifest.kv) != FLOAT:
        raise UnsupportedError(
            f"the bundle's KV cache is {layout_name(manifest.kv)} already; give one with {FLOAT}"
        )
    forms = {name: f for name, f in manifest.lowerings.items() if name in (CHAIN, TREE)}
    models = {
        n: onnx.load(str(folder / f.graph), load_external_data=False) for n, f in forms.items()
    }
    lowerings, layouts = dict(manifest.lowerings), dict(manifest.kv_layouts)
    for name in wanted:
        if name == default:
            continue
        layouts[name] = _layout(manifest.kv, name)
        for plain, model in models.items():
            own = lowering_of(name, plain == TREE)
            graph = _GRAPH.format(own.partition("+")[2])
            lowerings[own] = _write(folder / graph, model, forms[plain], name, scales)
    if default != FLOAT:
        for plain, model in models.items():
            path = folder / forms[plain].graph
            lowerings[plain] = _write(path, model, forms[plain], default, scales)
    kv = _layout(manifest.kv, default)
    return dataclasses.replace(manifest, kv=kv, kv_layouts=layouts, lowerings=lowerings)


def without_layouts(manifest: Manifest) -> Manifest:
    """The manifest of a bundle with its default layout alone, e.g. to quantize its weights."""
    dropped = {form.graph for name, form in manifest.lowerings.items() if _is_further(name)}
    return dataclasses.replace(
        manifest,
        kv_layouts={},
        lowerings={n: form for n, form in manifest.lowerings.items() if not _is_further(n)},
        files={name: entry for name, entry in manifest.files.items() if name not in dropped},
    )


def _is_further(lowering: str) -> bool:
    return lowering.startswith(lowering_of(""))


def _layout(plain: KVLayout, name: str) -> KVLayout:
    row = LAYOUTS[name]
    return dataclasses.replace(plain, dtype=row.dtype, bits=row.bits)


def _write(
    path: Path, model: onnx.ModelProto, form: Lowering, name: str, scales: Scales
) -> Lowering:
    """Write the graph of a layout; the manifest's entry for it."""
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    if name == "fp16":
        _in_half(changed.graph)
    elif name != FLOAT:
        _in_codes(changed.graph, scales[name], LAYOUTS[name].bits or 0)
    row = LAYOUTS[name]
    inputs, outputs = _specs(form.inputs, name), _specs(form.outputs, name)
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(row.dtype))
    widths = {spec.name: spec.shape[3] for spec in (inputs | outputs).values() if _is_cache(spec)}
    for value in [*changed.graph.input, *changed.graph.output]:
        if value.name in widths:
            value.type.tensor_type.elem_type = kind
            value.type.tensor_type.shape.dim[3].dim_value = widths[value.name]
    path.write_bytes(changed.SerializeToString())
    return dataclasses.replace(form, graph=path.name, inputs=inputs, outputs=outputs)


def _in_codes(graph: onnx.GraphProto, scales: dict[str, np.ndarray], bits: int) -> None:
    """Let attention read codes: scales in their places, and how many bits a code has."""
    for node in [n for n in graph.node if n.op_type == _ATTENTION]:
        layer = node.output[1].rpartition(".")[2]
        node.input.extend([""] * (_SCALES - len(node.input)))
        for part in ("key", "value"):
            scale = scales[f"{part}.{layer}"].astype(np.float32)
            graph.initializer.append(numpy_helper.from_array(scale, f"scale.{part}.{layer}"))
            node.input.append(f"scale.{part}.{layer}")
        node.attribute.append(helper.make_attribute("kv_cache_bit_width", bits))
        for side in ("k", "v"):
            node.attribute.append(helper.make_attribute(f"{side}_quant_type", "PER_CHANNEL"))


def _in_half(graph: onnx.GraphProto) -> None:
    """Convert what goes into and out of attention, since the operator's types must agree.

    ONNX Runtime would take a float16 cache beside float32 activations, but converts all of it in
    every step then.
    """
    nodes: list[onnx.NodeProto] = []
    made: dict[str, str] = {}

    def half(name: str) -> str:
        if name not in made:
            made[name] = f"{name}.half"
            nodes.append(helper.make_node("Cast", [name], [made[name]], to=TensorProto.FLOAT16))
        return made[name]

    for node in graph.node:
        if node.op_type == _ATTENTION:
            for place in _ACTIVATIONS:
                if place < len(node.input) and node.input[place]:
                    node.input[place] = half(node.input[place])
            out = node.output[0]
            node.output[0] = f"{out}.half"
            back = helper.make_node("Cast", [node.output[0]], [out], to=TensorProto.FLOAT)
            nodes += [node, back]
        else:
            nodes.append(node)
    changed = [_copy(node) for node in nodes]
    del graph.node[:]
    graph.node.extend(changed)


def _copy(node: onnx.NodeProto) -> onnx.NodeProto:
    copy = onnx.NodeProto()
    copy.CopyFrom(node)
    return copy


def _specs(specs: dict[str, TensorSpec], name: str) -> dict[str, TensorSpec]:
    row = LAYOUTS[name]
    return {
        role: dataclasses.replace(
            spec, dtype=row.dtype, shape=(*spec.shape[:3], _width(spec.shape[3], name))
        )
        if _is_cache(spec)
        else spec
        for role, spec in specs.items()
    }


def _width(head_dim: int, name: str) -> int:
    """Items of an array that hold one head's key or value."""
    return head_dim // 2 if name == "int4" else head_dim


def _is_cache(spec: TensorSpec) -> bool:
    return spec.name.startswith(("past_", "present_"))
