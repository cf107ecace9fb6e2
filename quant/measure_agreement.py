"""How many greedy tokens two models have in common before they part."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING, Any

import numpy as np

from forerun.quant.measure_divergence import Stream, prefill, run_rows

if TYPE_CHECKING:
    from forerun.quant.measure_divergence import Progress

CAP = 128
_PROMPT = 64
_BLOCK = 16


def agreement_prompts(ids: dict[str, list], bos: list[int], count: int) -> list[np.ndarray]:
    """Cut prompts from evenly spaced places of the texts.

    Args:
        ids: token ids of each kind of text.
        bos: ids that begin every prompt.
        count: prompts, as many of each kind.

    Returns:
        int64 [64] or shorter where a text is short.
    """
    prompts = []
    width, share = _PROMPT - len(bos), max(1, count // len(ids))
    for found in ids.values():
        step = max(1, (len(found) - width) // share)
        prompts += [
            np.array(bos + found[i * step : i * step + width], np.int64) for i in range(share)
        ]
    return prompts


def agreement(
    judged: Stream,
    reference: Stream,
    prompts: list[np.ndarray],
    limit: int,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Continue prompts greedily with both models and count the equal tokens.

    Args:
        judged: decodes token by token.
        reference: reads what the judged one wrote in blocks and tells where it would differ.
        prompts: int64 [P] each.
        limit: tokens that both caches hold.
        progress: called with (stage, done, total).

    Returns:
        mean, median (tokens until the first difference, at most `cap`), cap, whole (prompts
        without any difference up to there) and prompts.
    """
    counts = []
    cap = min(CAP, limit - max(map(len, prompts)))
    for number, prompt in enumerate(prompts, start=1):
        counts.append(_common(judged, reference, prompt, cap))
        if progress:
            progress("agreement", number, len(prompts))
    return {
        "mean": statistics.mean(counts),
        "median": statistics.median(counts),
        "cap": cap,
        "whole": sum(count >= cap for count in counts),
        "prompts": len(counts),
    }


def _common(judged: Stream, reference: Stream, prompt: np.ndarray, cap: int) -> int:
    ours, theirs = _start(judged, prompt), _start(reference, prompt)
    count = 0
    while True:
        block = min(_BLOCK, cap - count)
        written = _decode(judged, ours, block)
        # One row more than is compared now: it predicts the first token of the next block.
        rows = run_rows(reference, written).argmax(-1)
        expected = np.concatenate([[theirs], rows[:-1]])
        wrong = np.flatnonzero(expected != written)
        if wrong.size:
            return count + int(wrong[0])
        count += block
        if count >= cap:
            return count
        ours = int(judged.runner.step(written[-1:]).argmax())
        theirs = int(rows[-1])


def _start(stream: Stream, prompt: np.ndarray) -> int:
    stream.runner.arena.rewind(0)
    return int(prefill(stream.runner, prompt).argmax())


def _decode(stream: Stream, first: int, count: int) -> np.ndarray:
    """Greedy tokens int64 [count] from `first` on; the last is not in the cache yet."""
    tokens = [first]
    while len(tokens) < count:
        tokens.append(int(stream.runner.step([tokens[-1]]).argmax()))
    return np.array(tokens, np.int64)
