"""Answers of a model as the commands need them: streamed, collected, and as JSON."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from forerun.runtime.types import Event, FinishReason, Stats


@dataclass(frozen=True)
class Answer:
    """All events of one answer put together.

    Attributes:
        text: the whole text.
        tokens: its token ids.
        logprobs: log-probability of each token; empty unless they were asked for.
        finish_reason: why it ended.
        stats: what was measured.
    """

    text: str
    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: FinishReason
    stats: Stats


_SELF = "skip"


def collect(events: Iterable[Event], on_text: Callable[[str], object] = str) -> Answer:
    """Read a stream of events to its end.

    Args:
        events: what the runtime yields; the last one carries finish reason and statistics.
        on_text: called with every piece of text as it comes.
    """
    pieces: list[str] = []
    tokens: list[int] = []
    logprobs: list[float] = []
    reason: FinishReason = "cancelled"
    stats = Stats()
    for event in events:
        if event.text:
            pieces.append(event.text)
            on_text(event.text)
        if event.token is not None:
            tokens.append(event.token)
        if event.logprob is not None:
            logprobs.append(event.logprob)
        reason, stats = event.finish_reason or reason, event.stats or stats
    return Answer("".join(pieces), tuple(tokens), tuple(logprobs), reason, stats)


def answer_json(answer: Answer, seed: int, logprobs: bool = False) -> dict[str, Any]:
    """Return the fields of ``generate --json``."""
    fields: dict[str, Any] = {
        "text": answer.text,
        "tokens": list(answer.tokens),
        "finish_reason": answer.finish_reason,
        "seed": seed,
        "stats": dataclasses.asdict(answer.stats),
    }
    if logprobs:
        fields["logprobs"] = list(answer.logprobs)
    return fields


def stats_line(stats: Stats) -> str:
    """Return the measured figures of one answer in one line."""
    cached = f" ({stats.cached_tokens} cached)" if stats.cached_tokens else ""
    return (
        f"{stats.prompt_tokens} prompt tokens{cached} at {stats.prefill_tok_s:.0f} tok/s, "
        f"first token after {stats.ttft_ms:.0f} ms, "
        f"{stats.new_tokens} new tokens at {stats.decode_tok_s:.1f} tok/s, "
        f"{_draft_figures(stats)}"
        f"{_skipped(stats)}"
        f"{_places(stats)}"
        f"{100 * stats.session_share:.1f} % of the time in ONNX Runtime, "
        f"peak memory {stats.peak_rss_mb:.0f} MB"
    )


def _places(stats: Stats) -> str:
    """Which devices ran what; nothing if it was the CPU alone."""
    used = {part: device for part, device in stats.devices.items() if device}
    if set(used.values()) <= {"cpu"}:
        return ""
    return ", ".join(f"{part} on {device}" for part, device in used.items()) + ", "


def _skipped(stats: Stats) -> str:
    """How many feed-forward blocks were left out; nothing if none."""
    if stats.ffn_share >= 1 or stats.drafter == _SELF:
        # What drafts leave out does not change the text.
        return ""
    return f"lossy: {100 * (1 - stats.ffn_share):.0f} % of the feed-forward blocks skipped, "


def _draft_figures(stats: Stats) -> str:
    """What drafting did; nothing without a drafter."""
    if stats.drafter == "none":
        return ""
    parts = [
        f"{stats.tokens_per_round:.2f} tokens a step with drafter {stats.drafter} "
        f"({stats.schedule})",
        f"{stats.accepted} of {stats.proposed} drafted tokens accepted",
        f"drafting {stats.draft_ms:.0f} ms and verifying {stats.verify_ms:.0f} ms",
    ]
    if stats.speedup:
        parts.insert(1, f"{stats.speedup:.2f} times plain decoding")
    if stats.accept != "match":
        parts.append(f"lossy: {stats.overruled} of them were not the model's own choice")
    return ", ".join(parts) + ", "
