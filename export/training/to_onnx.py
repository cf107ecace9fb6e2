"""A feature head as one small ONNX graph, quantized in blocks."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from forerun.export.writer import GraphWriter
from forerun.quant.blocks import Blocks, dequantize, pack_codes, pack_zeros
from forerun.quant.rounding import quantize_blocks
from forerun.runtime.manifest import Lowering, TensorSpec

if TYPE_CHECKING:
    from forerun.export.training.head import FeatureHead, HeadSizes

STEP_GRAPH = "step.onnx"
_BLOCK = 32
_ACCURACY_LEVEL = 4
_EPS = 1e-5


@dataclass(frozen=True)
class HeadBits:
    """Bits of a code in each kind of matrix: 4, 8, or 32 for float32."""

    layers: int = 4
    head: int = 4
    embedding: int = 4


def head_specs(sizes: HeadSizes) -> Lowering:
    """Inputs and outputs of the graph, see `write_head_graph`."""
    d = sizes.hidden
    return Lowering(
        graph=STEP_GRAPH,
        inputs={
            "features": TensorSpec("features", "float32", ("R", sizes.taps * d)),
            "state": TensorSpec("state", "float32", ("R", d)),
            "ids": TensorSpec("ids", "int64", ("R", 2)),
        },
        outputs={
            "logits": TensorSpec("logits", "float32", ("R", sizes.vocab)),
            "state": TensorSpec("new_state", "float32", ("R", d)),
        },
    )


def write_head_graph(head: FeatureHead, folder: Path, bits: HeadBits | None = None) -> Lowering:
    """Write a head without attention as `STEP_GRAPH` and its weights.

    The first step of a draft reads the features of the last verified token and a state of zeros,
    later steps the state that the step before left and features of zeros: without a bias, zeros
    stay zeros on their way, so that one graph serves both.

    Returns:
        Roles of inputs and outputs.
    """
    specs = head_specs(head.sizes)
    writer = GraphWriter(folder)
    try:
        for spec in specs.inputs.values():
            writer.input(spec.name, spec.dtype, spec.shape)
        for spec in specs.outputs.values():
            writer.output(spec.name, spec.dtype, spec.shape)
        _HeadGraph(head, writer, bits or HeadBits()).write()
        writer.save(STEP_GRAPH)
    finally:
        writer.close()
    return specs


class _HeadGraph:
    def __init__(self, head: FeatureHead, writer: GraphWriter, bits: HeadBits) -> None:
        self.sizes, self.w, self.bits = head.sizes, writer, bits
        self.values = {k: v.detach().float().numpy() for k, v in head.state_dict().items()}

    def write(self) -> None:
        d, taps = self.sizes.hidden, self.sizes.taps
        x = self._reshape("features", [-1, taps, d])
        x = self._norm(x, self._constant("ones", np.ones(d, np.float32)))
        x = self.w.add("Mul", [x, self._constant("tap_norm", self.values["tap_norm"])])
        fused = self._linear(self._reshape(x, [-1, taps * d]), "fuse.weight")
        normed, state = self._add_norm("state", fused, "state_norm")
        words = self._reshape(self._embed("ids"), [-1, 2 * d])
        mixed = self.w.add("Concat", [normed, words], axis=-1)
        pending = self._linear(mixed, "mix.weight")
        for i in range(self.sizes.blocks):
            normed, state = self._add_norm(state, pending, f"blocks.{i}.norm")
            pending = self._ffn(normed, i)
        normed, state = self._add_norm(state, pending, "norm")
        logits = self._linear(normed, "head", self.bits.head)
        self.w.rename(logits, "logits")
        self.w.rename(state, "new_state")

    def _ffn(self, x: str, block: int) -> str:
        both = self._linear(x, f"blocks.{block}.gate_up.weight")
        widths = self._constant(f"widths.{block}", np.full(2, self.sizes.ffn, np.int64))
        gate, up = f"gate.{block}", f"up.{block}"
        self.w.add("Split", [both, widths], [gate, up], axis=-1)
        gate = self.w.add("QuickGelu", [gate], alpha=1.0)
        hidden = self.w.add("Mul", [gate, up])
        return self._linear(hidden, f"blocks.{block}.down.weight")

    def _constant(self, name: str, value: np.ndarray) -> str:
        return self.w.constant(name, value)

    def _reshape(self, x: str, shape: list[int]) -> str:
        return self.w.add("Reshape", [x, self._constant(f"{x}.shape", np.array(shape, np.int64))])

    def _norm(self, x: str, weight: str) -> str:
        return self.w.add("SimplifiedLayerNormalization", [x, weight], axis=-1, epsilon=_EPS)

    def _add_norm(self, x: str, y: str, name: str) -> tuple[str, str]:
        """Return the RMS norm of x + y, and x + y."""
        weight = self._constant(name, self.values[name])
        outputs = [f"{name}.normed", "", "", f"{name}.sum"]
        self.w.add("SkipSimplifiedLayerNormalization", [x, y, weight], outputs, epsilon=_EPS)
        return outputs[0], outputs[3]

    def _linear(self, x: str, name: str, bits: int | None = None) -> str:
        """X [R, K] times the transposed matrix [N, K]."""
        weight, bits = self.values[name], bits or self.bits.layers
        if bits == 32:
            return self.w.add("MatMul", [x, self._constant(name, weight.T)])
        q = quantize_blocks(weight, bits, _BLOCK)
        inputs = [x, self._constant(name, pack_codes(q)), *self._grid(name, q)]
        return self.w.add(
            "MatMulNBits",
            inputs,
            N=len(weight),
            K=weight.shape[1],
            bits=bits,
            block_size=_BLOCK,
            accuracy_level=_ACCURACY_LEVEL,
        )

    def _embed(self, ids: str) -> str:
        """Rows of the embedding, [R, 2, hidden]."""
        name = "embedding.weight"
        table, bits = self.values[name], self.bits.embedding
        if bits == 32:
            return self.w.add("Gather", [self._constant(name, table), ids], axis=0)
        q = quantize_blocks(table, bits, _BLOCK)
        packed = pack_codes(q).reshape(len(table), -1)
        inputs = [self.w.constant(name, packed, inline=False), ids, *self._grid(name, q)]
        return self.w.add(
            "GatherBlockQuantized",
            inputs,
            bits=bits,
            block_size=_BLOCK,
            gather_axis=0,
            quantize_axis=1,
        )

    def _grid(self, name: str, q: Blocks) -> list[str]:
        names = [self._constant(f"{name}.scales", q.scales)]
        zeros = pack_zeros(q)
        if zeros is not None:
            names.append(self._constant(f"{name}.zeros", zeros))
        return names


def rounded_head(head: FeatureHead, bits: HeadBits) -> FeatureHead:
    """A copy of a head whose matrices are what the graph's codes stand for.

    What the graph still does differently is to round activations to 8 bits.
    """
    import copy

    import torch  # pyright: ignore[reportMissingImports]

    copied = copy.deepcopy(head)
    with torch.no_grad():
        for name, value in copied.named_parameters():
            if value.ndim != 2 or name == "tap_norm":
                continue
            kind = {"head": bits.head, "embedding.weight": bits.embedding}.get(name, bits.layers)
            if kind != 32:
                q = quantize_blocks(value.detach().numpy(), kind, _BLOCK)
                value.copy_(torch.from_numpy(dequantize(q)))
    return copied
