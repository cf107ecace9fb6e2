"""Plain data that the runtime hands out: parameters, events and statistics."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

FinishReason = Literal["stop", "length", "cancelled", "context"]


@dataclass(frozen=True)
class SamplingParams:
    """How the next token is drawn; the defaults are greedy decoding.

    Attributes:
        temperature: 0 is greedy; otherwise logits are divided by it.
        top_k: keep the k most probable tokens; 0 keeps all.
        top_p: keep the smallest set with this probability mass (Holtzman 2019); 1 keeps all.
        min_p: keep tokens with at least this share of the best one's probability; 0 keeps all.
        typical_p: locally typical sampling (Meister 2022); 1 keeps all.
        repetition_penalty: divides positive and multiplies negative logits of seen tokens
            (Keskar 2019); 1 is off.
        presence_penalty: subtracted once from the logit of each token of the answer so far.
        frequency_penalty: subtracted once per occurrence in the answer so far.
        logit_bias: token id to a value added to its logit.
        seed: noise of position i depends on (seed, i, token) only, so a text can be drawn again.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    typical_p: float = 1.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] = field(default_factory=dict)
    seed: int = 0


@dataclass(frozen=True)
class Stats:
    """Measured during one generation; times in milliseconds, rates in tokens per second.

    Attributes:
        prompt_tokens: tokens of the prompt, those found in the KV cache included.
        cached_tokens: how many of them were in the KV cache already.
        new_tokens: tokens that were generated.
        ttft_ms: from the call to the first token.
        tpot_ms: mean time of every later token.
        prefill_tok_s: prompt tokens that were run, per second.
        decode_tok_s: later tokens per second.
        rounds: target steps after the prefill.
        tokens_per_round: later tokens / rounds; 1 without a drafter.
        proposed: drafted tokens that were verified.
        accepted: drafted tokens that were kept.
        overruled: accepted tokens that the model had not chosen; 0 unless `accept` is lossy.
        acceptance: drafter to depth (1 is right behind the text) to [proposed, accepted].
        draft_ms: time spent in the drafter.
        verify_ms: time of the steps that verified its tokens.
        speedup: time of as many plain steps, as measured on this machine before, / time of the
            later tokens; 0 if that was not measured.
        session_share: time inside ONNX Runtime / wall time.
        peak_rss_mb: largest resident size of the process so far.
        drafter: name of the drafter.
        schedule: ``plain`` (no drafter), ``serial`` or another name of `schedules.SCHEDULES`.
        accept: name of the accept rule; all but ``match`` are lossy.
        devices: which device ran the target and the drafter.
        ffn_share: share of the feed-forward blocks that steps of one row ran, those that
            only drafted included; 1 without skipping.
    """

    prompt_tokens: int = 0
    cached_tokens: int = 0
    new_tokens: int = 0
    ttft_ms: float = 0.0
    tpot_ms: float = 0.0
    prefill_tok_s: float = 0.0
    decode_tok_s: float = 0.0
    rounds: int = 0
    tokens_per_round: float = 0.0
    proposed: int = 0
    accepted: int = 0
    overruled: int = 0
    acceptance: dict[str, dict[int, list[int]]] = field(default_factory=dict)
    draft_ms: float = 0.0
    verify_ms: float = 0.0
    speedup: float = 0.0
    session_share: float = 0.0
    peak_rss_mb: float = 0.0
    drafter: str = "none"
    schedule: str = "plain"
    accept: str = "match"
    devices: dict[str, str | None] = field(default_factory=dict)
    ffn_share: float = 1.0


@dataclass(frozen=True)
class Event:
    """One piece of a streamed answer.

    Attributes:
        text: text that is now certain (may be empty while a character or a stop string is open).
        token: id of the token behind this event, or None for the closing event.
        logprob: log-probability of the token under the model (temperature 1, no filters).
        finish_reason: set on the closing event only.
        stats: set on the closing event only.
    """

    text: str
    token: int | None = None
    logprob: float | None = None
    finish_reason: FinishReason | None = None
    stats: Stats | None = None
