"""The loss of a drafter: cross-entropy with what the target finds probable."""

from __future__ import annotations

import torch  # pyright: ignore[reportMissingImports]

from forerun.export.training.batches import Batch


def label_loss(
    states: torch.Tensor,
    head: torch.Tensor,
    batch: Batch,
    places: tuple[torch.Tensor, torch.Tensor],
    scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """Cross-entropy [] of a head's logits with the label weights.

    Args:
        states: [R, hidden], normed.
        head: float32 [vocab, hidden].
        batch: with the labels.
        places: rows and columns int64 [R] of the last tokens that were read.
        scale: float32 [R], what a place counts; 1 without it.

    Returns:
        The sum over places by the number of those with a label that count 1.
    """
    ids = torch.from_numpy(batch.label_ids)[places]
    weights = torch.from_numpy(batch.label_weights)[places]
    scale = torch.ones(len(ids)) if scale is None else scale
    labelled = torch.gt(weights.sum(-1), 0)
    count = (labelled & (scale == 1)).sum().clamp(min=1)
    keep = (labelled & torch.gt(scale, 0)).nonzero()[:, 0]
    counts = torch.index_select(scale, 0, keep) / count
    weights = weights[keep] * counts[:, None]
    return _HeadLoss.apply(states[keep], head, ids[keep], weights)


class _HeadLoss(torch.autograd.Function):
    """Head and soft cross-entropy in one, with gradients made on the way.

    Logits are the largest array of a training step by far; this goes over them four times
    instead of a dozen.
    """

    @staticmethod
    def forward(ctx, states, head, ids, weights):
        """Sum over rows of -weights * log softmax(states @ head.T)[ids]."""
        rows = head.to(states.dtype)
        logps = torch.log_softmax(states @ rows.T, -1, dtype=torch.float32)
        loss = -(weights * logps.gather(1, ids)).sum()
        error = logps.exp_().mul_(weights.sum(-1, keepdim=True)).scatter_add_(1, ids, -weights)
        error = error.to(states.dtype)
        ctx.save_for_backward(error @ rows, (error.T @ states).float())
        return loss

    @staticmethod
    def backward(ctx, grad):
        """Gradients were computed already."""
        states, head = ctx.saved_tensors
        return grad * states, grad * head, None, None
