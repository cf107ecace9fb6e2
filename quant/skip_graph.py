"""A decoder's graph whose feed-forward blocks can be left out step by step.

Each block goes into a branch of an `If`; what is left out is truly not computed, and the weights
stay where they are, so the branch costs nothing else. Attention always runs, so no key or value is
ever missing (FFN-SkipLLM, Jaiswal et al. 2024, arXiv 2404.03865).
"""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from forerun.errors import OptionError, UnsupportedError
from forerun.runtime.manifest import TensorSpec

if TYPE_CHECKING:
    from forerun.runtime.manifest import Lowering

_NORM = "SkipSimplifiedLayerNormalization"
_EMPTY_SUM = 3
_ROLES = ("ffn_flags", "skip_tau", "skip_run", "ffn_ran")


@dataclass(frozen=True)
class Block:
    """One layer's feed-forward block in a graph.

    Attributes:
        nodes: what computes it, in order.
        stream: name of the residual stream before it, [1, S, D].
        out: name of what it adds to the stream, [1, S, D].
    """

    nodes: tuple[onnx.NodeProto, ...]
    stream: str
    out: str


def with_skipping(folder: Path, graph_name: str, band: tuple[int, int] | None = None) -> int:
    """Rewrite a graph in place so that its feed-forward blocks can be skipped.

    New inputs: `ffn_flags` bool [layers], False skips a block; `skip_tau` float32 [] and
    `skip_run` int32 [] of the adaptive rule: once a block that ran leaves the residual stream at a
    cosine of at least `skip_tau`, the next `skip_run` blocks of the band are skipped. A threshold
    above 1 turns the rule off. New output: `ffn_ran` int32 [], how many blocks ran.
    A step decides for all of its rows at once, by the mean of their cosines.

    Args:
        folder: of the bundle.
        graph_name: file of the graph; replaced only once the new one is complete.
        band: layers (first, stop) that may be skipped; None takes all but the first and last.

    Returns:
        The number of layers.

    Raises:
        UnsupportedError: the graph is not made of blocks as `export` writes them.
        OptionError: the band holds the first or last layer, or is empty.
    """
    path = Path(folder) / graph_name
    model = onnx.load(str(path), load_external_data=False)
    blocks = find_blocks(model.graph)
    first, stop = band or (1, len(blocks) - 1)
    if not 1 <= first < stop <= len(blocks) - 1:
        raise OptionError(
            f"the band must lie in layers 1..{len(blocks) - 2}, got {first}..{stop - 1}"
        )
    _Gates(model.graph, blocks).insert(range(first, stop))
    side = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        side.write_bytes(model.SerializeToString())
        side.replace(path)
    finally:
        side.unlink(missing_ok=True)
    return len(blocks)


def skipping_lowering(chain: Lowering, layers: int) -> Lowering:
    """The manifest's entry for a graph that `with_skipping` rewrote."""
    flags, tau, run, ran = _ROLES
    inputs = {
        flags: TensorSpec(flags, "bool", (layers,)),
        tau: TensorSpec(tau, "float32", ()),
        run: TensorSpec(run, "int32", ()),
    }
    outputs = {ran: TensorSpec(ran, "int32", ())}
    return dataclasses.replace(chain, inputs=chain.inputs | inputs, outputs=chain.outputs | outputs)


def find_blocks(graph: onnx.GraphProto) -> list[Block]:
    """The feed-forward blocks of a decoder, layer by layer.

    A layer has two norms that also add to the residual stream: one before its block, and one that
    takes up the block's output.

    Raises:
        UnsupportedError: the graph is not of that form, or its blocks can be skipped already.
    """
    norms = [node for node in graph.node if node.op_type == _NORM]
    makers = {name: node for node in graph.node for name in node.output if name}
    if any(node.op_type == "If" for node in graph.node):
        raise UnsupportedError("the graph can skip feed-forward blocks already")
    if not norms or len(norms) % 2:
        raise UnsupportedError("the graph has no feed-forward blocks that could be skipped")
    order = {id(node): i for i, node in enumerate(graph.node)}
    blocks = []
    for before, after in zip(norms[::2], norms[1::2], strict=True):
        nodes = _slice(after.input[1], before.output[0], makers)
        if before.output[_EMPTY_SUM] != after.input[0]:
            raise UnsupportedError("a feed-forward block does not add to the stream it reads")
        nodes.sort(key=lambda node: order[id(node)])
        blocks.append(Block(tuple(nodes), after.input[0], after.input[1]))
    _check_private(graph, blocks)
    return blocks


def _slice(out: str, start: str, makers: dict[str, onnx.NodeProto]) -> list[onnx.NodeProto]:
    """The nodes that make `out` from `start`."""
    found: dict[int, onnx.NodeProto] = {}
    names, reached = [out], False
    while names:
        name = names.pop()
        if name == start:
            reached = True
        elif name in makers and id(makers[name]) not in found:
            node = makers[name]
            if node.op_type in (_NORM, "GroupQueryAttention"):
                raise UnsupportedError(f"a feed-forward block reads {name}, which is not its own")
            found[id(node)] = node
            names += node.input
    if not reached:
        raise UnsupportedError("a norm adds something that is no feed-forward block")
    return list(found.values())


def _check_private(graph: onnx.GraphProto, blocks: list[Block]) -> None:
    """Refuse blocks of which more than the result is read elsewhere."""
    owner = {id(node): i for i, block in enumerate(blocks) for node in block.nodes}
    inner = {
        name: i
        for i, block in enumerate(blocks)
        for node in block.nodes
        for name in node.output
        if name and name != block.out
    }
    readers = [(owner.get(id(node)), name) for node in graph.node for name in node.input]
    readers += [(None, value.name) for value in graph.output]
    for reader, name in readers:
        if name in inner and inner[name] != reader:
            raise UnsupportedError(f"{name} inside a feed-forward block is read outside of it")


class _Gates:
    """Puts blocks into branches and threads the adaptive rule's state through them.

    The state is one number: the first layer that may run again. A skipped block leaves it alone,
    so that its branch is only two copies; a gate is one comparison with the layer's own number,
    which is -1 where the flag forbids the block.
    """

    def __init__(self, graph: onnx.GraphProto, blocks: list[Block]) -> None:
        self._graph, self._blocks = graph, blocks
        weight = next(n for n in graph.node if n.op_type == _NORM).input[2]
        sizes = {t.name: tuple(t.dims) for t in graph.initializer}
        self._hidden = sizes[weight][0]
        self._place = {id(node): i for i, block in enumerate(blocks) for node in block.nodes}

    def insert(self, band: range) -> None:
        """Replace the blocks of a band."""
        graph, layers = self._graph, len(self._blocks)
        nodes, gates, until = self._head(), [], "skip.begin"
        done: set[int] = set()
        for node in graph.node:
            layer = self._place.get(id(node))
            if layer is None or layer not in band:
                nodes.append(node)
            elif layer not in done:
                done.add(layer)
                gates.append(f"skip.gate.{layer}")
                nodes += self._gate(layer, until)
                until = f"skip.until.{layer}"
        nodes += self._tail(gates, layers - len(band))
        del graph.node[:]
        graph.node.extend(nodes)
        kinds = (TensorProto.BOOL, TensorProto.FLOAT, TensorProto.INT32, TensorProto.INT32)
        shapes = ([layers], [], [], [])
        infos = [
            helper.make_tensor_value_info(name, kind, shape)
            for name, kind, shape in zip(_ROLES, kinds, shapes, strict=True)
        ]
        graph.input.extend(infos[:3])
        graph.output.append(infos[3])

    def _constant(self, name: str, value: np.ndarray) -> str:
        self._graph.initializer.append(numpy_helper.from_array(value, name))
        return name

    def _head(self) -> list[onnx.NodeProto]:
        """What all gates share: the number of each layer, and where a run after it ends."""
        layers = len(self._blocks)
        numbers = np.arange(layers, dtype=np.int32)
        self._constant("skip.numbers", numbers)
        self._constant("skip.never", np.array([-1], np.int32))
        self._constant("skip.begin", np.array([0], np.int32))
        self._constant("skip.after", numbers + 1)
        self._constant("skip.ones", np.ones(self._hidden, np.float32))
        self._constant("skip.each", np.ones(layers, np.int64))
        add = helper.make_node
        return [
            add("Where", ["ffn_flags", "skip.numbers", "skip.never"], ["skip.allowed"]),
            add("Split", ["skip.allowed", "skip.each"], self._parts("skip.allowed"), axis=0),
            add("Add", ["skip.after", "skip_run"], ["skip.ends"]),
            add("Split", ["skip.ends", "skip.each"], self._parts("skip.ends"), axis=0),
        ]

    def _parts(self, name: str) -> list[str]:
        return [f"{name}.{layer}" for layer in range(len(self._blocks))]

    def _gate(self, layer: int, until: str) -> list[onnx.NodeProto]:
        block, gate = self._blocks[layer], f"skip.gate.{layer}"
        add = helper.make_node
        return [
            add("LessOrEqual", [until, f"skip.allowed.{layer}"], [gate]),
            add(
                "If",
                [gate],
                [block.out, f"skip.until.{layer}"],
                name=f"ffn.{layer}",
                then_branch=self._then(layer, until),
                else_branch=self._else(layer, until),
            ),
        ]

    def _then(self, layer: int, until: str) -> onnx.GraphProto:
        """The block, and what its cosine means for the layers behind it."""
        block, name = self._blocks[layer], f"skip.{layer}."
        ones, out = "skip.ones", f"{name}out"
        nodes = []
        for node in block.nodes:
            inner = onnx.NodeProto()
            inner.CopyFrom(node)
            for i, value in enumerate(inner.output):
                if value == block.out:
                    inner.output[i] = out
            nodes.append(inner)
        add = helper.make_node
        norm = {"domain": "com.microsoft", "epsilon": 1e-12}
        nodes += [
            add(
                "SimplifiedLayerNormalization",
                [block.stream, ones],
                [f"{name}u"],
                axis=-1,
                epsilon=1e-12,
                stash_type=1,
            ),
            add(_NORM, [block.stream, out, ones], [f"{name}v"], **norm),
            add("Mul", [f"{name}u", f"{name}v"], [f"{name}uv"]),
            add("ReduceMean", [f"{name}uv"], [f"{name}cosine"], keepdims=0),
            add("GreaterOrEqual", [f"{name}cosine", "skip_tau"], [f"{name}hit"]),
            add("Where", [f"{name}hit", f"skip.ends.{layer}", until], [f"{name}until"]),
        ]
        return self._branch(nodes, f"then.{layer}", [out, f"{name}until"])

    def _else(self, layer: int, until: str) -> onnx.GraphProto:
        name = f"skip.{layer}.else."
        add = helper.make_node
        nodes = [
            add("Shape", [self._blocks[layer].stream], [f"{name}shape"]),
            add("ConstantOfShape", [f"{name}shape"], [f"{name}out"]),
            add("Identity", [until], [f"{name}until"]),
        ]
        return self._branch(nodes, f"else.{layer}", [f"{name}out", f"{name}until"])

    def _branch(
        self, nodes: list[onnx.NodeProto], name: str, outputs: list[str]
    ) -> onnx.GraphProto:
        shapes = [1, None, self._hidden], [1]
        kinds = TensorProto.FLOAT, TensorProto.INT32
        infos = [
            helper.make_tensor_value_info(out, kind, shape)
            for out, kind, shape in zip(outputs, kinds, shapes, strict=True)
        ]
        return helper.make_graph(nodes, name, [], infos)

    def _tail(self, gates: list[str], always: int) -> list[onnx.NodeProto]:
        """Count what ran."""
        self._constant("skip.always", np.array(always, np.int32))
        add = helper.make_node
        return [
            add("Concat", gates, ["skip.gates"], axis=0),
            add("Cast", ["skip.gates"], ["skip.counts"], to=TensorProto.INT32),
            add("ReduceSum", ["skip.counts"], ["skip.count"], keepdims=0),
            add("Add", ["skip.count", "skip.always"], ["ffn_ran"]),
        ]
