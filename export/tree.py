"""The graph for trees of rows: the same graph and weights file, plus an additive mask."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

import onnx
from onnx import TensorProto, helper

from forerun.runtime.manifest import TensorSpec

if TYPE_CHECKING:
    from forerun.export.sources import ModelConfig
    from forerun.runtime.manifest import Lowering

TREE_GRAPH_NAME = "model-tree.onnx"
_BIAS = TensorSpec("bias", "float32", (1, 1, "S", "T"))
# Place of the additive mask among the inputs of GroupQueryAttention.
_BIAS_INPUT = 10


def takes_trees(config: ModelConfig) -> bool:
    """Whether trees can be run: ONNX Runtime counts a sliding window in rows, not in positions.

    With a window, a row's second child would see too little of the history, so models that have
    one get no graph for trees.
    """
    return not any(config.layer_window)


def write_tree_graph(folder: Path, graph: str) -> None:
    """Write `TREE_GRAPH_NAME` beside a decoder's graph.

    Decoding row by row is about a tenth faster without the mask, even if it is all zeros, since
    its shape changes with every token; so trees have a graph of their own.
    """
    model = onnx.load(str(folder / graph), load_external_data=False)
    for node in model.graph.node:
        if node.op_type == "GroupQueryAttention":
            node.input.extend([""] * (_BIAS_INPUT + 1 - len(node.input)))
            node.input[_BIAS_INPUT] = _BIAS.name
    mask = helper.make_tensor_value_info(_BIAS.name, TensorProto.FLOAT, list(_BIAS.shape))
    model.graph.input.append(mask)
    (folder / TREE_GRAPH_NAME).write_bytes(model.SerializeToString())


def tree_lowering(chain: Lowering) -> Lowering:
    """The manifest's entry for the graph that `write_tree_graph` writes."""
    return dataclasses.replace(chain, graph=TREE_GRAPH_NAME, inputs=chain.inputs | {"bias": _BIAS})
