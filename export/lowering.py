"""Lowerings: how each building block of a decoder is written for one family of devices.

`graph` says what a decoder computes; a lowering says with which operators. The table at the end
lists those there are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from forerun.export.writer import GraphWriter


@dataclass(frozen=True)
class AttentionShape:
    """Heads, their size, scale of the scores, and the window of local layers (None: all)."""

    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    window: int | None


class CpuLowering:
    """Contrib operators of the CPU provider; the KV cache is updated in place.

    `GroupQueryAttention` touches only the used part of the cache, and on this provider also
    rotates by the explicit `position_ids` (others ignore them), which saves three small nodes a
    layer. The mask for trees is added by `tree`.
    """

    name = "cpu"

    def __init__(self, writer: GraphWriter, eps: float) -> None:
        self.w = writer
        self.eps = eps

    def embed(self, table: str, ids: str) -> str:
        """[V, D], int64 [1, S] -> [1, S, D]."""
        return self.w.add("Gather", [table, ids], axis=0)

    def linear(self, x: str, weight: str, bias: str = "") -> str:
        """X [.., K] times weight [K, N], plus bias [N]."""
        y = self.w.add("MatMul", [x, weight])
        return self.w.add("Add", [y, bias]) if bias else y

    def tied_head(self, x: str, table: str) -> str:
        """X [.., D] times the transposed embedding [V, D]."""
        return self.w.add("FusedMatMul", [x, table], transB=1)

    def norm(self, x: str, weight: str) -> str:
        """RMS norm over the last axis (Zhang 2019)."""
        return self.w.add(
            "SimplifiedLayerNormalization", [x, weight], axis=-1, epsilon=self.eps, stash_type=1
        )

    def add_norm(self, x: str, y: str, weight: str) -> tuple[str, str]:
        """Return the RMS norm of x + y, and x + y."""
        normed, total = f"{y}_normed", f"{y}_sum"
        self.w.add(
            "SkipSimplifiedLayerNormalization",
            [x, y, weight],
            [normed, "", "", total],
            epsilon=self.eps,
        )
        return normed, total

    def head_norm(self, x: str, weight: str, heads: int, head_dim: int) -> str:
        """RMS norm of each head of x [1, S, heads * head_dim]."""
        split = self.w.constant(f"{x}_split", np.array([1, -1, heads, head_dim], np.int64))
        merge = self.w.constant(f"{x}_merge", np.array([1, -1, heads * head_dim], np.int64))
        normed = self.norm(self.w.add("Reshape", [x, split]), weight)
        return self.w.add("Reshape", [normed, merge])

    def attention(
        self, qkv: list[str], tables: tuple[str, str], layer: int, shape: AttentionShape
    ) -> str:
        """Rotate queries and keys, append to the cache of `layer`, attend.

        Args:
            qkv: one packed tensor [1, S, (heads + 2 * kv_heads) * head_dim], or three.
            tables: cosines and sines; the rows' positions choose among them.
            layer: number of the layer; see `Lowering` for the roles of the cache tensors.
            shape: heads and window.
        """
        past = [f"past_key.{layer}", f"past_value.{layer}"]
        present = [f"present_key.{layer}", f"present_value.{layer}"]
        packed = [*qkv, "", ""][:3]
        inputs = [*packed, *past, "seqlens", "total", *tables, "positions"]
        attended = f"attended.{layer}"
        self.w.add(
            "GroupQueryAttention",
            inputs,
            [attended, *present],
            num_heads=shape.heads,
            kv_num_heads=shape.kv_heads,
            scale=shape.scale,
            local_window_size=shape.window or -1,
            do_rotary=1,
        )
        return attended

    def gate(self, gate: str, up: str, activation: str) -> str:
        """activation(gate) * up."""
        return self.w.add("Mul", [_ACTIVATIONS[activation](self.w, gate), up])


_ACTIVATIONS = {
    # QuickGelu with alpha 1 is x * sigmoid(x), in one kernel.
    "silu": lambda w, x: w.add("QuickGelu", [x], alpha=1.0),
    "gelu_tanh": lambda w, x: w.add("FastGelu", [x]),
}

LOWERINGS = {row.name: row for row in (CpuLowering,)}
