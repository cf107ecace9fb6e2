"""The target model in torch: what writes the training data, many sequences at a time."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch  # pyright: ignore[reportMissingImports]
from torch.nn import functional  # pyright: ignore[reportMissingImports]

from forerun.export.graph import FINAL_NORM
from forerun.export.training.weights import BundleWeights

TAP_FINAL = -1


@dataclass
class LayerWeights:
    """Weights of one decoder layer; matrices [out, in]."""

    input_norm: torch.Tensor
    qkv: torch.Tensor
    o: torch.Tensor
    ffn_norm: torch.Tensor
    gate_up: torch.Tensor
    down: torch.Tensor


class KVCache:
    """Keys and values of a batch in buffers of fixed length.

    Args:
        layers: of the model.
        shape: (batch, kv_heads, length, head_dim).
        dtype: of the entries.
    """

    def __init__(self, layers: int, shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
        self.keys = [torch.zeros(shape, dtype=dtype) for _ in range(layers)]
        self.values = [torch.zeros(shape, dtype=dtype) for _ in range(layers)]

    def select(self, rows: torch.Tensor) -> None:
        """Keep only these rows of the batch."""
        self.keys = [k[rows] for k in self.keys]
        self.values = [v[rows] for v in self.values]


class TorchTarget:
    """A llama decoder with the dequantized weights of a bundle.

    The residual stream is float32; matrices and KV cache have `dtype`.

    Args:
        bundle: whose layers and embedding are used.
        head_bundle: whose output head is used; None takes the bundle's own.
        taps: layers whose inputs `forward` returns, `TAP_FINAL` for the normed last state.
        dtype: of matrices and KV cache.
    """

    def __init__(
        self,
        bundle: Path,
        head_bundle: Path | None = None,
        taps: tuple[int, ...] = (8, 18, 29, TAP_FINAL),
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        weights = BundleWeights(bundle)
        sizes, kv = weights.manifest.model, weights.manifest.kv
        self.manifest, self.taps, self.dtype = weights.manifest, taps, dtype
        self.layers, self.hidden, self.vocab = sizes.layers, sizes.hidden, sizes.vocab
        self.heads, self.kv_heads, self.head_dim = weights.heads, kv.heads, kv.head_dim
        self.eps = weights.eps
        self.embedding = torch.from_numpy(weights.embedding())
        head = weights if head_bundle is None else BundleWeights(head_bundle)
        self.head = torch.from_numpy(head.head()).to(dtype)
        self.cos = torch.from_numpy(weights.array("cos.global").copy())
        self.sin = torch.from_numpy(weights.array("sin.global").copy())
        self.norm = torch.from_numpy(weights.array(FINAL_NORM).copy())
        self.blocks = [_layer(weights, i, dtype) for i in range(self.layers)]

    def cache(self, batch: int, length: int) -> KVCache:
        """Empty KV cache for `batch` sequences of at most `length` tokens."""
        shape = (batch, self.kv_heads, length, self.head_dim)
        return KVCache(self.layers, shape, self.dtype)

    def forward(
        self,
        ids: torch.Tensor,
        column: int,
        pads: torch.Tensor,
        cache: KVCache,
    ) -> torch.Tensor:
        """Run tokens at columns `column` and on.

        Args:
            ids: int64 [B, S].
            column: index in the cache of the first token.
            pads: int64 [B], number of columns at the left that a sequence does not use.
            cache: is written to.

        Returns:
            float32 [B, S, taps, hidden], the tapped states.
        """
        count = ids.shape[1]
        columns = torch.arange(column, column + count)
        positions = (columns[None] - pads[:, None]).clamp(min=0)
        rotary = (self.cos[positions], self.sin[positions])
        bias = self._bias(columns, column + count, pads)
        x = self.embedding[ids]
        states = {}
        for index, block in enumerate(self.blocks):
            if index in self.taps:
                states[index] = x
            x = x + self._attention(index, block, x, (column, rotary, bias), cache)
            z = self._norm(x, block.ffn_norm)
            gate, up = functional.linear(z, block.gate_up).chunk(2, -1)
            x = x + functional.linear(functional.silu(gate) * up, block.down).float()
        if TAP_FINAL in self.taps:
            states[TAP_FINAL] = self._norm(x, self.norm).float()
        return torch.stack([states[tap] for tap in self.taps], 2)

    def logits(self, final: torch.Tensor) -> torch.Tensor:
        """Logits [.., vocab] of normed last states [.., hidden]."""
        return functional.linear(final.to(self.dtype), self.head)

    def _norm(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return functional.rms_norm(x, (self.hidden,), weight, self.eps).to(self.dtype)

    def _bias(self, columns: torch.Tensor, length: int, pads: torch.Tensor) -> torch.Tensor:
        """Additive mask [B, 1, S, length]: no padding, nothing later."""
        past, here = torch.arange(length)[None, None], columns[None, :, None]
        # A row that is padding itself would otherwise see nothing at all.
        seen = ((past <= here) & (past >= pads[:, None, None])) | (past == here)
        bias = torch.zeros(seen.shape, dtype=self.dtype).masked_fill_(~seen, -1e9)
        return bias[:, None]

    def _attention(
        self,
        index: int,
        block: LayerWeights,
        x: torch.Tensor,
        place: tuple[int, tuple[torch.Tensor, torch.Tensor], torch.Tensor],
        cache: KVCache,
    ) -> torch.Tensor:
        column, rotary, bias = place
        batch, count, _ = x.shape
        h, k, d = self.heads, self.kv_heads, self.head_dim
        qkv = functional.linear(self._norm(x, block.input_norm), block.qkv)
        qkv = qkv.view(batch, count, h + 2 * k, d)
        turned = _rotate(qkv[:, :, : h + k], *rotary)
        end = column + count
        cache.keys[index][:, :, column:end] = turned[:, :, h:].transpose(1, 2)
        cache.values[index][:, :, column:end] = qkv[:, :, h + k :].transpose(1, 2)
        group = h // k
        # Keys times queries, not the other way round: three times faster in bfloat16.
        query = (turned[:, :, :h] * d**-0.5).view(batch, count, k, group, d)
        query = query.permute(0, 2, 4, 3, 1).reshape(batch * k, d, group * count)
        keys = cache.keys[index].view(batch * k, -1, d)[:, :end]
        values = cache.values[index].view(batch * k, -1, d)[:, :end]
        scores = torch.bmm(keys, query).transpose(1, 2).reshape(batch, k, group, count, end)
        weights = torch.softmax(scores + bias[:, :, None], -1)
        out = torch.bmm(weights.view(batch * k, group * count, end), values)
        out = out.view(batch, k, group, count, d).permute(0, 3, 1, 2, 4)
        return functional.linear(out.reshape(batch, count, h * d), block.o).float()


def _layer(weights: BundleWeights, index: int, dtype: torch.dtype) -> LayerWeights:
    def matrix(label: str) -> torch.Tensor:
        return torch.from_numpy(weights.matrix(f"{label}.{index}")).to(dtype)

    def norm(part: str) -> torch.Tensor:
        name = f"model.layers.{index}.{part}_layernorm.weight"
        return torch.from_numpy(weights.array(name).copy())

    return LayerWeights(
        norm("input"),
        matrix("qkv"),
        matrix("o"),
        norm("post_attention"),
        matrix("gate_up"),
        matrix("down"),
    )


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding (rotate-half) of [B, S, heads, d] with tables [B, S, d / 2]."""
    a, b = x.chunk(2, -1)
    c, s = cos[:, :, None].to(x.dtype), sin[:, :, None].to(x.dtype)
    return torch.cat([a * c - b * s, b * c + a * s], -1)
