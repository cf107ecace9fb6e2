"""A decoder as an ONNX graph: what is computed; the operators come from a lowering."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from forerun.errors import UnsupportedError
from forerun.export.arch import (
    ArchSpec,
    attention_scale,
    ffn_norm_name,
    layer_names,
    rotary_frequencies,
    rotary_tables,
)
from forerun.export.lowering import LOWERINGS, AttentionShape, CpuLowering
from forerun.export.writer import GraphWriter
from forerun.runtime.manifest import KVLayout, Lowering, Rotary, TensorSpec

if TYPE_CHECKING:
    from collections.abc import Callable

    from forerun.export.sources import ModelConfig, WeightSource

EMBEDDING = "model.embed_tokens.weight"
FINAL_NORM = "model.norm.weight"
HEAD = "lm_head.weight"
HEAD_WEIGHT = "head"
# The cache's length is free up to the rows of the rotary tables: a runtime may reserve less.
CAPACITY_AXIS = "C"


class DecoderGraph:
    """Writes the graph of one model layer by layer, reading each tensor once.

    Args:
        source: the weights.
        arch: the row of facts of the architecture.
        folder: where graph and weights are written.
        capacity: longest KV cache; rows of the rotary tables.
        hidden_states: also output the normed hidden state of the wanted rows.
        lowering: a name of `LOWERINGS`.
        taps: numbers of layers; the stream after that many layers is output as `features`.
    """

    def __init__(
        self,
        source: WeightSource,
        arch: ArchSpec,
        folder: Path,
        capacity: int,
        hidden_states: bool = False,
        lowering: str = "cpu",
        taps: tuple[int, ...] = (),
    ) -> None:
        self.source, self.arch, self.config = source, arch, source.config
        self.capacity, self.hidden_states, self.taps = capacity, hidden_states, taps
        self._tapped: list[str] = []
        self.writer = GraphWriter(folder)
        self.ops: CpuLowering = LOWERINGS[lowering](self.writer, self.config.norm_eps)
        self.used: set[str] = set()
        self._rotary: dict[bool, tuple[str, str]] = {}

    def write(self, graph_name: str, progress: Callable[[int, int], None] | None = None) -> None:
        """Write the whole graph.

        Raises:
            UnsupportedError: the weights hold tensors that the architecture's row does not know.
        """
        layers = self.config.layers
        try:
            self._declare()
            x, pending = self._embedding(), ""
            for layer in range(layers):
                x, pending = self._layer(layer, x, pending)
                if progress:
                    progress(layer + 1, layers + 1)
            self._head(x, pending)
            self._features()
            unknown = sorted(self.source.names() - self.used - {HEAD})
            if unknown:
                raise UnsupportedError(
                    f"the weights hold {unknown[0]!r}, which the architecture "
                    f"{self.arch.name!r} does not have ({len(unknown)} such tensors)"
                )
            self.writer.save(graph_name)
            if progress:
                progress(layers + 1, layers + 1)
        finally:
            self.writer.close()

    def _declare(self) -> None:
        for spec in graph_inputs(self.config).values():
            self.writer.input(spec.name, spec.dtype, spec.shape)
        for spec in graph_outputs(self.config, self.hidden_states, self.taps).values():
            self.writer.output(spec.name, spec.dtype, spec.shape)

    def _tensor(self, name: str) -> np.ndarray:
        self.used.add(name)
        return self.source.tensor(name)

    def _norm_weight(self, name: str) -> str:
        weight = self._tensor(name) + np.float32(self.arch.norm_offset)
        return self.writer.constant(name, weight.astype(np.float32))

    def _embedding(self) -> str:
        table = self.writer.constant(EMBEDDING, self._tensor(EMBEDDING))
        x = self.ops.embed(table, "ids")
        if self.arch.scaled_embedding:
            scale = np.array(np.sqrt(self.config.hidden), np.float32)
            x = self.writer.add("Mul", [x, self.writer.constant("embedding_scale", scale)])
        return x

    def _linear(self, x: str, label: str, names: list[str], biases: list[str]) -> str:
        """One product for several weights that share their input."""
        weight = np.concatenate([self._tensor(n) for n in names]).T
        weight_name = self.writer.constant(label, np.ascontiguousarray(weight))
        present = [b for b in biases if b in self.source.names()]
        bias = ""
        if present:
            if len(present) != len(biases):
                raise UnsupportedError(f"{label}: some projections have a bias and others do not")
            values = np.concatenate([self._tensor(b) for b in present])
            bias = self.writer.constant(f"{label}.bias", values)
        return self.ops.linear(x, weight_name, bias)

    def _split(self, x: str, label: str, widths: list[int]) -> list[str]:
        sizes = self.writer.constant(f"{label}.widths", np.array(widths, np.int64))
        names = [f"{x}_part{i}" for i in range(len(widths))]
        self.writer.add("Split", [x, sizes], names, axis=-1)
        return names

    def _tables(self, local: bool) -> tuple[str, str]:
        if local not in self._rotary:
            label = "local" if local else "global"
            cos, sin = rotary_tables(self.config, self.capacity, local)
            self._rotary[local] = (
                self.writer.constant(f"cos.{label}", cos),
                self.writer.constant(f"sin.{label}", sin),
            )
        return self._rotary[local]

    def _layer(self, layer: int, x: str, pending: str) -> tuple[str, str]:
        """Return the residual stream and what is still to be added to it."""
        names, ops = layer_names(layer), self.ops
        norm = self._norm_weight(names.input_norm)
        if pending:
            normed, x = ops.add_norm(x, pending, norm)
        else:
            normed = ops.norm(x, norm)
        if layer in self.taps:
            self._tapped.append(x)
        attended = self._attention(layer, normed)
        if layer == self.config.layers - 1:
            # What follows the last attention matters only for the rows that are asked for.
            attended = self.writer.add("Gather", [attended, "rows"], axis=1)
            x = self.writer.add("Gather", [x, "rows"], axis=1)
        out = self._linear(attended, f"o.{layer}", [names.o_proj], [names.bias("o_proj")])
        if self.arch.post_norms:
            out = ops.norm(out, self._norm_weight(names.post_attention_norm))
        normed, x = ops.add_norm(x, out, self._norm_weight(ffn_norm_name(self.arch, layer)))
        out = self._ffn(layer, normed)
        if self.arch.post_norms:
            out = ops.norm(out, self._norm_weight(names.post_ffn_norm))
        return x, out

    def _attention(self, layer: int, x: str) -> str:
        c, ops, names = self.config, self.ops, layer_names(layer)
        parts = ["q_proj", "k_proj", "v_proj"]
        weights, biases = [getattr(names, p) for p in parts], [names.bias(p) for p in parts]
        qkv = self._linear(x, f"qkv.{layer}", weights, biases)
        projected = [qkv]
        if self.arch.qk_norm:
            widths = [c.heads * c.head_dim, c.kv_heads * c.head_dim, c.kv_heads * c.head_dim]
            q, k, v = self._split(qkv, f"qkv.{layer}", widths)
            q = ops.head_norm(q, self._norm_weight(names.q_norm), c.heads, c.head_dim)
            k = ops.head_norm(k, self._norm_weight(names.k_norm), c.kv_heads, c.head_dim)
            projected = [q, k, v]
        local = c.layer_window[layer]
        tables = self._tables(local and c.rope_theta_local is not None)
        window = c.sliding_window if local else None
        shape = AttentionShape(c.heads, c.kv_heads, c.head_dim, attention_scale(c), window)
        return ops.attention(projected, tables, layer, shape)

    def _ffn(self, layer: int, x: str) -> str:
        names = layer_names(layer)
        parts = ["gate_proj", "up_proj"]
        weights, biases = [getattr(names, p) for p in parts], [names.bias(p) for p in parts]
        both = self._linear(x, f"gate_up.{layer}", weights, biases)
        gate, up = self._split(both, f"gate_up.{layer}", [self.config.ffn, self.config.ffn])
        hidden = self.ops.gate(gate, up, self.config.activation)
        return self._linear(hidden, f"down.{layer}", [names.down_proj], [names.bias("down_proj")])

    def _head(self, x: str, pending: str) -> None:
        hidden, _ = self.ops.add_norm(x, pending, self._norm_weight(FINAL_NORM))
        if self.config.tied:
            logits = self.ops.tied_head(hidden, EMBEDDING)
        else:
            weight = np.ascontiguousarray(self._tensor(HEAD).T)
            logits = self.ops.linear(hidden, self.writer.constant(HEAD_WEIGHT, weight))
        self.writer.rename(logits, "logits")
        if self.hidden_states:
            self.writer.rename(hidden, "hidden")

    def _features(self) -> None:
        if self._tapped:
            joined = self.writer.add("Concat", self._tapped, axis=-1)
            self.writer.rename(joined, "features")


def default_taps(layers: int) -> tuple[int, ...]:
    """A low, a middle and a high layer, as EAGLE-3 reads them (8, 18 and 29 of 30).

    The stream is taken before the layer of that number, so 0 would be the embedding alone.
    """
    taps = {round(0.27 * layers), round(0.6 * layers), layers - 1}
    return tuple(sorted(taps & set(range(1, layers))))


def kv_layout(config: ModelConfig, capacity: int) -> KVLayout:
    """The float32 KV cache of a model."""
    return KVLayout(config.layers, config.kv_heads, config.head_dim, capacity)


def rotary_of(config: ModelConfig) -> Rotary:
    """What the manifest says about the rotation of the keys."""
    local = tuple(int(has and config.rope_theta_local is not None) for has in config.layer_window)
    lists = [rotary_frequencies(config, bool(kind)).tolist() for kind in range(max(local) + 1)]
    return Rotary(tuple(map(tuple, lists)), local)


def graph_inputs(config: ModelConfig) -> dict[str, TensorSpec]:
    """Roles of the inputs, see `forerun.runtime.manifest.Lowering`."""
    specs = {
        "ids": TensorSpec("ids", "int64", (1, "S")),
        "positions": TensorSpec("positions", "int64", (1, "S")),
        "seqlens": TensorSpec("seqlens", "int32", (1,)),
        "total": TensorSpec("total", "int32", ()),
        "rows": TensorSpec("rows", "int64", ("R",)),
    }
    return specs | _kv_specs(config, "past")


def graph_outputs(
    config: ModelConfig, hidden_states: bool, taps: tuple[int, ...] = ()
) -> dict[str, TensorSpec]:
    """Roles of the outputs, see `forerun.runtime.manifest.Lowering`."""
    specs = {"logits": TensorSpec("logits", "float32", (1, "R", config.vocab))}
    if hidden_states:
        specs["hidden"] = TensorSpec("hidden", "float32", (1, "R", config.hidden))
    if taps:
        width = config.hidden * len(taps)
        specs["features"] = TensorSpec("features", "float32", (1, "S", width))
    return specs | _kv_specs(config, "present")


def _kv_specs(config: ModelConfig, when: str) -> dict[str, TensorSpec]:
    shape = (1, config.kv_heads, CAPACITY_AXIS, config.head_dim)
    names = [f"{when}_{part}.{i}" for i in range(config.layers) for part in ("key", "value")]
    return {name: TensorSpec(name, "float32", shape) for name in names}


def cpu_lowering(
    config: ModelConfig,
    hidden_states: bool,
    graph: str,
    taps: tuple[int, ...] = (),
) -> Lowering:
    """The manifest's entry for the graph that `DecoderGraph` writes."""
    return Lowering(
        graph=graph,
        inputs=graph_inputs(config),
        outputs=graph_outputs(config, hidden_states, taps),
    )
