"""A draft model: a few decoder layers with a reduced vocabulary, made from the target's own."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch  # pyright: ignore[reportMissingImports]
from torch import nn  # pyright: ignore[reportMissingImports]
from torch.nn import functional  # pyright: ignore[reportMissingImports]

from forerun.export.graph import FINAL_NORM
from forerun.export.training.batches import Batch, Batches, DraftVocab
from forerun.export.training.labels import label_loss
from forerun.export.training.score import Scores
from forerun.export.training.weights import BundleWeights

_NORMS = ("input_layernorm", "post_attention_layernorm")
_MATRICES = ("qkv", "o", "gate_up", "down")


@dataclass(frozen=True)
class DraftSizes:
    """Sizes of a draft model, see `forerun.export.sources.ModelConfig`."""

    vocab: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    rope_theta: float
    norm_eps: float


class DraftLayer(nn.Module):
    """One llama layer; projections that share their input are one matrix."""

    def __init__(self, sizes: DraftSizes) -> None:
        super().__init__()
        self.sizes, d = sizes, sizes.hidden
        width = sizes.heads * sizes.head_dim
        self.input_layernorm = nn.Parameter(torch.ones(d))
        self.qkv = nn.Linear(d, width + 2 * sizes.kv_heads * sizes.head_dim, bias=False)
        self.o = nn.Linear(width, d, bias=False)
        self.post_attention_layernorm = nn.Parameter(torch.ones(d))
        self.gate_up = nn.Linear(d, 2 * sizes.ffn, bias=False)
        self.down = nn.Linear(sizes.ffn, d, bias=False)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """Residual stream [B, N, hidden] behind the layer."""
        x = x + self._attention(self._norm(x, self.input_layernorm), cos, sin).float()
        gate, up = self.gate_up(self._norm(x, self.post_attention_layernorm)).chunk(2, -1)
        return x + self.down(functional.silu(gate) * up).float()

    def _norm(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return functional.rms_norm(x, (self.sizes.hidden,), weight, self.sizes.norm_eps)

    def _attention(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        s = self.sizes
        batch, count, _ = x.shape
        qkv = self.qkv(x).view(batch, count, s.heads + 2 * s.kv_heads, s.head_dim).transpose(1, 2)
        turned, value = qkv[:, : s.heads + s.kv_heads], qkv[:, s.heads + s.kv_heads :]
        a, b = turned.chunk(2, -1)
        turned = torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(value.dtype)
        query, key = turned[:, : s.heads], turned[:, s.heads :]
        out = functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, enable_gqa=True
        )
        return self.o(out.transpose(1, 2).reshape(batch, count, -1))


class DraftModel(nn.Module):
    """A small llama decoder with a tied head.

    Args:
        sizes: of the model; the last row of the vocabulary stands for unknown inputs.
    """

    def __init__(self, sizes: DraftSizes) -> None:
        super().__init__()
        self.sizes = sizes
        self.embedding = nn.Parameter(torch.empty(sizes.vocab, sizes.hidden))
        nn.init.normal_(self.embedding, std=0.05)
        self.layers = nn.ModuleList(DraftLayer(sizes) for _ in range(sizes.layers))
        self.norm = nn.Parameter(torch.ones(sizes.hidden))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Normed last states [B, N, hidden] of draft ids int64 [B, N]."""
        half = torch.arange(0, self.sizes.head_dim, 2)
        frequency = self.sizes.rope_theta ** (-half / self.sizes.head_dim)
        angle = torch.arange(ids.shape[1])[:, None] * frequency[None]
        x = functional.embedding(ids, self.embedding)
        for layer in self.layers:
            x = layer(x, angle.cos(), angle.sin())
        return functional.rms_norm(x, (self.sizes.hidden,), self.norm, self.sizes.norm_eps)

    def logits(self, states: torch.Tensor) -> torch.Tensor:
        """Logits [.., vocab - 1]; the row of unknown inputs is never proposed."""
        return functional.linear(states, self.embedding[:-1])


def draft_from_target(
    bundle: Path, head_bundle: Path | None, vocab: DraftVocab, chosen: tuple[int, ...]
) -> DraftModel:
    """Make a draft model of some of the target's layers.

    Args:
        bundle: of the target.
        head_bundle: whose output rows are used; None takes the target's.
        vocab: of the drafter.
        chosen: layers of the target, in order.
    """
    weights = BundleWeights(bundle)
    model = DraftModel(draft_sizes(weights, len(vocab) + 1, len(chosen)))
    rows = (BundleWeights(head_bundle) if head_bundle else weights).head()
    with torch.no_grad():
        model.embedding[:-1] = torch.from_numpy(rows[vocab.ids])
        model.embedding[-1] = torch.from_numpy(rows.mean(0))
        model.norm.copy_(torch.from_numpy(np.array(weights.array(FINAL_NORM))))
        for layer, index in zip(model.layers, chosen, strict=True):
            for part in _NORMS:
                values = weights.array(f"model.layers.{index}.{part}.weight")
                getattr(layer, part).copy_(torch.from_numpy(np.array(values)))
            for part in _MATRICES:
                values = weights.matrix(f"{part}.{index}")
                getattr(layer, part).weight.copy_(torch.from_numpy(values))
    return model


def draft_sizes(weights: BundleWeights, vocab: int, layers: int) -> DraftSizes:
    """Sizes of a draft model for the target with these weights."""
    sizes, kv = weights.manifest.model, weights.manifest.kv
    # The graph holds tables, not theta; the slowest frequency gives it back.
    angle = float(
        np.arctan2(weights.array("sin.global")[1, -1], weights.array("cos.global")[1, -1])
    )
    theta = float(round(angle ** (-kv.head_dim / (kv.head_dim - 2))))
    return DraftSizes(
        vocab,
        sizes.hidden,
        layers,
        weights.heads,
        kv.heads,
        kv.head_dim,
        len(weights.matrix("gate_up.0")) // 2,
        theta,
        weights.eps,
    )


def draft_loss(model: DraftModel, batch: Batch) -> torch.Tensor:
    """Loss at the tokens of the answers."""
    rows, columns = (torch.from_numpy(x) for x in batch.bases())
    states = model(torch.from_numpy(batch.ids))[rows, columns]
    if torch.is_autocast_enabled("cpu"):
        states = states.bfloat16()
    return label_loss(states, model.embedding[:-1], batch, (rows, columns))


@torch.inference_mode()
def draft_scores(model: DraftModel, batches: Batches, steps: int, every: int = 1) -> Scores:
    """Acceptance on the held-out answers, or on every n-th batch of them."""
    scores = Scores(steps)
    for number, (answers, batch) in enumerate(batches.held_out()):
        if number % every:
            continue
        rows, columns = batch.bases()
        with torch.autocast("cpu", torch.bfloat16):
            logits = model.logits(model(torch.from_numpy(batch.ids)))
        right = batches.vocab.ids[logits.argmax(-1).numpy()] == batch.best
        last = batch.ids.shape[1] - 1
        for row, answer in enumerate(answers):
            places = columns[rows == row][:, None] + np.arange(1, steps + 1)
            valid = places < answer.length
            scores.add(answer.category, right[row, np.minimum(places, last)], valid)
    return scores
