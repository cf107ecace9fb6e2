"""A feature head: a small network behind the target that drafts from its hidden states."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import cast

import numpy as np
import torch  # pyright: ignore[reportMissingImports]
from torch import nn  # pyright: ignore[reportMissingImports]
from torch.nn import functional  # pyright: ignore[reportMissingImports]

from forerun.export.training.batches import Batch, Batches
from forerun.export.training.labels import label_loss
from forerun.export.training.score import Scores

EPS = 1e-5
STEP_DECAY = 0.8
# A second and a third step on every token would triple the cost and teach little more.
LATER_SHARE = 0.4


@dataclass(frozen=True)
class HeadSizes:
    """Sizes of a feature head.

    Attributes:
        hidden: width of the target's states, and of the head's own state.
        taps: hidden states of the target that are its features.
        vocab: draft vocabulary.
        ffn: width inside each gated FFN.
        blocks: number of them.
        window: verified tokens that the attention sees; 0 for a head without attention.
        kv: width of a key and of a value.
    """

    hidden: int
    taps: int
    vocab: int
    ffn: int = 2048
    blocks: int = 1
    window: int = 0
    kv: int = 192


class FeatureHead(nn.Module):
    """Drafts token by token.

    The first step reads the features of the last verified token, later ones the state that the
    step before left. Every step also reads the last two tokens.

    Args:
        sizes: of the head.
    """

    def __init__(self, sizes: HeadSizes) -> None:
        super().__init__()
        self.sizes = sizes
        d = sizes.hidden
        self.tap_norm = nn.Parameter(torch.ones(sizes.taps, d))
        self.fuse = nn.Linear(sizes.taps * d, d, bias=False)
        self.embedding = nn.Embedding(sizes.vocab + 1, d)
        self.embedding.weight.requires_grad_(False)
        self.state_norm = nn.Parameter(torch.ones(d))
        self.mix = nn.Linear(3 * d, d, bias=False)
        self.blocks = nn.ModuleList(GatedFFN(d, sizes.ffn) for _ in range(sizes.blocks))
        self.attention = WindowAttention(sizes) if sizes.window else None
        self.norm = nn.Parameter(torch.ones(d))
        self.head = nn.Parameter(torch.empty(sizes.vocab, d))
        nn.init.normal_(self.head, std=0.02)

    def initialise(
        self, embedding: np.ndarray, head: np.ndarray, norm: np.ndarray, features: np.ndarray
    ) -> None:
        """Start from the target's rows and from the size of its states.

        Args:
            embedding: float32 [vocab, hidden], the target's embedding of the draft vocabulary.
            head: float32 [vocab, hidden], its output rows.
            norm: float32 [hidden], weight of its last norm.
            features: float16 [R, taps, hidden], a sample.
        """
        d = self.sizes.hidden
        with torch.no_grad():
            # One scale for all, so that a row is an embedding of unit variance.
            rows = torch.from_numpy(embedding) / float(np.sqrt((embedding**2).mean()))
            self.embedding.weight[:-1] = rows
            self.embedding.weight[-1] = rows.mean(0)
            self.head.copy_(torch.from_numpy(head))
            self.norm.copy_(torch.from_numpy(norm))
            sample = torch.from_numpy(features).float()
            spread = functional.rms_norm(sample, (d,), None, EPS).pow(2).mean(0).sqrt()
            self.tap_norm.copy_(1 / spread.clamp(min=1e-3))
            # The last tap is nearest to what the target's own head reads.
            self.fuse.weight.mul_(0.1)
            self.fuse.weight[:, -d:] += torch.diag(spread[-1])
            self.mix.weight.mul_(0.5)
            for block in self.blocks:
                cast(GatedFFN, block).down.weight.mul_(0.1)

    def fused(self, features: torch.Tensor) -> torch.Tensor:
        """States [.., hidden] of verified tokens, from their features [.., taps, hidden]."""
        x = functional.rms_norm(features.float(), (self.sizes.hidden,), None, EPS) * self.tap_norm
        return self.fuse(x.flatten(-2)).float()

    def step(
        self, state: torch.Tensor, ids: torch.Tensor, before: torch.Tensor, past: Past | None = None
    ) -> torch.Tensor:
        """One draft step.

        Args:
            state: float32 [R, hidden] of the token before the last.
            ids: int64 [R], the last token.
            before: int64 [R], the token before it.
            past: what the attention sees.

        Returns:
            float32 [R, hidden], the new state, from which `logits` predicts the next token.
        """
        x = self.mixed(state, ids, before)
        if self.attention is not None:
            x = x + self.attention(x, past)
        for block in self.blocks:
            x = x + block(x)
        return x.float()

    def mixed(self, state: torch.Tensor, ids: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
        """The residual stream at its beginning."""
        normed = functional.rms_norm(state, (self.sizes.hidden,), self.state_norm, EPS)
        parts = [normed, self.embedding(before), self.embedding(ids)]
        return state + self.mix(torch.cat(parts, -1)).float()

    def logits(self, state: torch.Tensor) -> torch.Tensor:
        """Logits [R, vocab] in the draft vocabulary."""
        return functional.linear(self.normed(state), self.head)

    def normed(self, state: torch.Tensor) -> torch.Tensor:
        """What the output head reads, [R, hidden]."""
        return functional.rms_norm(state, (self.sizes.hidden,), self.norm, EPS)


class GatedFFN(nn.Module):
    """SwiGLU behind an RMS norm."""

    def __init__(self, hidden: int, ffn: int) -> None:
        super().__init__()
        self.norm = nn.Parameter(torch.ones(hidden))
        self.gate_up = nn.Linear(hidden, 2 * ffn, bias=False)
        self.down = nn.Linear(ffn, hidden, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """What is to be added to x [.., hidden]."""
        normed = functional.rms_norm(x, x.shape[-1:], self.norm, EPS)
        gate, up = self.gate_up(normed).chunk(2, -1)
        return self.down(functional.silu(gate) * up).float()


@dataclass
class Past:
    """Keys and values of verified tokens and who may see them.

    Attributes:
        keys: [B, N, kv].
        values: [B, N, kv].
        rows: int64 [R], the sequence of each query.
        columns: int64 [R], the last verified token of each query.
    """

    keys: torch.Tensor
    values: torch.Tensor
    rows: torch.Tensor
    columns: torch.Tensor


class WindowAttention(nn.Module):
    """Attention of a draft step over the last verified tokens.

    Keys and values come from a verified token's mixed state, so drafted tokens add none. A bias
    per distance and head stands for the position.
    """

    def __init__(self, sizes: HeadSizes) -> None:
        super().__init__()
        d, self.kv, self.window = sizes.hidden, sizes.kv, sizes.window
        self.heads = max(1, sizes.kv // 64)
        self.norm = nn.Parameter(torch.ones(d))
        self.query = nn.Linear(d, sizes.kv, bias=False)
        self.key_value = nn.Linear(d, 2 * sizes.kv, bias=False)
        self.out = nn.Linear(sizes.kv, d, bias=False)
        self.distance = nn.Parameter(torch.zeros(self.heads, sizes.window))
        with torch.no_grad():
            self.out.weight.mul_(0.1)

    def remember(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [.., kv] of mixed states [.., hidden]."""
        normed = functional.rms_norm(x, x.shape[-1:], self.norm, EPS)
        keys, values = self.key_value(normed).chunk(2, -1)
        return keys, values

    def forward(self, x: torch.Tensor, past: Past) -> torch.Tensor:
        """What is to be added to x [R, hidden]."""
        h, w = self.heads, self.window
        query = self.query(functional.rms_norm(x, x.shape[-1:], self.norm, EPS))
        query = query.view(len(x), h, -1)
        index = past.columns[:, None] - torch.arange(w)[None]
        seen = index >= 0
        place = (past.rows[:, None], index.clamp(min=0))
        keys = past.keys[place].view(len(x), w, h, -1)
        values = past.values[place].view(len(x), w, h, -1)
        scores = torch.einsum("rhd,rwhd->rhw", query, keys) * keys.shape[-1] ** -0.5
        scores = scores.float() + self.distance[None]
        weights = torch.softmax(scores.masked_fill(~seen[:, None], -1e4), -1).to(values.dtype)
        return self.out(torch.einsum("rhw,rwhd->rhd", weights, values).flatten(1)).float()


@dataclass
class StepOutput:
    """States of one unrolled step.

    Attributes:
        state: float32 [R, hidden].
        rows: int64 [R], answers in the batch.
        columns: int64 [R], the token that was read last.
        valid: bool [R], that token belongs to the answer.
    """

    state: torch.Tensor
    rows: torch.Tensor
    columns: torch.Tensor
    valid: torch.Tensor


def head_steps(head: FeatureHead, batch: Batch, steps: int, later: float = 1.0) -> list[StepOutput]:
    """Unroll a head behind every answer token of a batch, on the tokens that really follow.

    Args:
        head: the module.
        batch: with features.
        steps: drafts behind each token.
        later: share of the tokens that get more than one step.
    """
    rows, columns = (torch.from_numpy(x) for x in batch.bases())
    ids = torch.from_numpy(batch.ids)
    features = torch.from_numpy(batch.features)
    past = None
    if head.attention is not None:
        state = head.fused(features)
        mixed = head.mixed(state, ids.roll(-1, 1), ids)
        past = Past(*head.attention.remember(mixed), rows, columns)
        state = state[rows, columns]
    else:
        state = head.fused(features[rows, columns])
    last = ids.shape[1] - 1
    lengths = torch.from_numpy(batch.lengths)[rows]
    outputs = []
    for step in range(1, steps + 1):
        if step == 2 and later < 1:
            few = torch.rand(len(rows)) < later
            rows, columns, lengths, state = rows[few], columns[few], lengths[few], state[few]
            past = past and replace(past, rows=rows, columns=columns)
        here = (columns + step).clamp(max=last)
        state = head.step(state, ids[rows, here], ids[rows, (here - 1)], past)
        outputs.append(StepOutput(state, rows, here, columns + step < lengths))
    return outputs


def head_loss(head: FeatureHead, batch: Batch, steps: int) -> torch.Tensor:
    """Mean loss of the unrolled steps, later ones weighing less."""
    outputs = head_steps(head, batch, steps, LATER_SHARE)
    # What fewer tokens are asked counts for more, so that the sum stays what it would be.
    factors = [STEP_DECAY**i / (LATER_SHARE if i else 1.0) for i in range(steps)]
    scale = torch.cat([f * o.valid.float() for f, o in zip(factors, outputs, strict=True)])
    states = head.normed(torch.cat([out.state for out in outputs]))
    if torch.is_autocast_enabled("cpu"):
        states = states.bfloat16()
    places = torch.cat([o.rows for o in outputs]), torch.cat([o.columns for o in outputs])
    return label_loss(states, head.head, batch, places, scale)


@torch.inference_mode()
def head_scores(head: FeatureHead, batches: Batches, steps: int, every: int = 1) -> Scores:
    """Acceptance on the held-out answers, or on every n-th batch of them."""
    scores = Scores(steps)
    for number, (answers, batch) in enumerate(batches.held_out()):
        if number % every:
            continue
        with torch.autocast("cpu", torch.bfloat16):
            outputs = head_steps(head, batch, steps)
            logits = [head.logits(out.state) for out in outputs]
        rows = outputs[0].rows.numpy()
        right, valid = [], []
        for out, scores_of in zip(outputs, logits, strict=True):
            drafts = batches.vocab.ids[scores_of.argmax(-1).numpy()]
            right.append(drafts == batch.best[rows, out.columns.numpy()])
            valid.append(out.valid.numpy())
        right, valid = np.stack(right, 1), np.stack(valid, 1)
        for row, answer in enumerate(answers):
            scores.add(answer.category, right[rows == row], valid[rows == row])
    return scores
