"""The decoding loop: from a checked request to ids, on one runner and its KV cache."""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass, replace

import numpy as np

from forerun.runtime import sampling as sample
from forerun.runtime.measure import RunClock
from forerun.runtime.prefix import PrefixCache
from forerun.runtime.types import FinishReason, SamplingParams, Stats

OnPrefill = Callable[[int, int], None]


@dataclass(frozen=True)
class Request:
    """What was asked, checked.

    Attributes:
        prompt: ids, at least one and at most the context.
        params: how to draw.
        max_tokens: most tokens to generate.
        stop_ids: ids that end the answer and are not part of it.
        stops: texts that do the same.
        logprobs: whether log-probabilities are wanted.
        slides: go on at a full context.
        n_keep: first tokens that a slide keeps, below the capacity.
        prefill_chunk: prompt tokens per step.
        on_prefill: called with (prompt tokens done, prompt tokens).
    """

    prompt: list[int]
    params: SamplingParams
    max_tokens: int
    stop_ids: frozenset[int]
    stops: tuple[str, ...]
    logprobs: bool
    slides: bool
    n_keep: int
    prefill_chunk: int
    on_prefill: OnPrefill | None


class Generation:
    """One answer being made.

    Args:
        request: what to do.
        cache: the model and what its KV cache holds.
        tokens: the session's sequence; replaced by the prompt at the start, then extended.
        setup: seconds spent on the call before.

    Attributes:
        cancelled: set it, from any thread, to end within one step.
        reason: why it ended; valid once it has.
        clock: times and counts.
    """

    def __init__(
        self, request: Request, cache: PrefixCache, tokens: list[int], setup: float
    ) -> None:
        self.request = request
        self.cancelled = False
        self.reason: FinishReason = "length"
        self.clock = RunClock(lambda: cache.runner.session_time, len(request.prompt))
        self._cache = cache
        self._tokens = tokens
        self._setup = setup
        self._history: list[int] | None = None
        self._blocks = (0, 0)

    def ids(self) -> Generator[tuple[int, float | None], None, None]:
        """Yield (token, log-probability or None); sets `reason` at the end.

        Whatever happens, closing or an error included, the KV cache is left in line with the ids.

        Raises:
            BusyError: another generation on this model is not finished.
        """
        with self._cache.reserved():
            try:
                self.clock.begin(self._setup)
                self._blocks = self._ffn_counts()
                yield from self._loop()
            finally:
                self._settle()

    def stats(self) -> Stats:
        """What was measured; call while the clock counts."""
        stats = self.clock.stats(getattr(self._cache.runner, "device", "cpu"))
        ran, possible = (
            now - then for now, then in zip(self._ffn_counts(), self._blocks, strict=True)
        )
        return replace(stats, ffn_share=ran / possible) if possible else stats

    def _ffn_counts(self) -> tuple[int, int]:
        return getattr(self._cache.runner, "ffn_counts", (0, 0))

    def _settle(self) -> None:
        """Leave the KV cache in line with the ids, whatever happened."""
        self._cache.settle()

    def _loop(self) -> Generator[tuple[int, float | None], None, None]:
        request, clock, tokens = self.request, self.clock, self._tokens
        self._take_prompt()
        logits = self._read_prompt()
        while logits is not None:
            token = self._choose(logits)
            if token in request.stop_ids:
                self.reason = "stop"
                return
            logprob = sample.logprob(logits, token) if request.logprobs else None
            tokens.append(token)
            clock.token_done()
            yield token, logprob
            logits = self._advance(token)

    def _take_prompt(self) -> None:
        self._tokens[:] = self.request.prompt
        if sample.uses_history(self.request.params):
            self._history = list(self._tokens)

    def _position(self) -> int:
        # Not len(tokens): after a slide positions go on, or their noise would repeat.
        return len(self.request.prompt) + self.clock.new_tokens

    def _choose(self, logits: np.ndarray) -> int:
        request, history = self.request, self._history or ()
        return sample.pick(logits, request.params, self._position(), history, len(request.prompt))

    def _read_prompt(self) -> np.ndarray | None:
        clock = self.clock
        started = clock.seconds()
        clock.cached_tokens = self._cache.keep_common(self._tokens)
        clock.prefilled = len(self._tokens) - clock.cached_tokens
        self._report(clock.cached_tokens)
        logits = self._prefill()
        clock.prefill_done(started)
        return logits

    def _prefill(self) -> np.ndarray | None:
        """Run what is not cached yet, in chunks; the last row's logits [V], None if cancelled."""
        cache, tokens = self._cache, self._tokens
        while True:
            if self.cancelled:
                self.reason = "cancelled"
                return None
            start = len(cache.ids)
            end = min(start + self.request.prefill_chunk, len(tokens))
            is_last = end == len(tokens)
            logits = cache.feed(tokens[start:end], "last" if is_last else "none")
            self._report(end)
            if is_last:
                return logits[0]

    def _advance(self, token: int) -> np.ndarray | None:
        """Run the step after `token`; logits [V], or None if the answer ends here."""
        if self._history is not None:
            self._history.append(token)
        if self._ends():
            return None
        if len(self._tokens) <= self._cache.capacity:
            self.clock.rounds += 1
            return self._cache.feed([token])[0]
        return self._slide()

    def _ends(self) -> bool:
        """Whether the answer ends here; sets `reason` if so."""
        if self.cancelled:
            self.reason = "cancelled"
        elif self.clock.new_tokens >= self.request.max_tokens:
            self.reason = "length"
        elif len(self._tokens) > self._cache.capacity and not self.request.slides:
            self.reason = "context"
        else:
            return False
        return True

    def _slide(self) -> np.ndarray | None:
        """Drop the older half of what is not kept, and read the rest again."""
        tokens, keep = self._tokens, self.request.n_keep
        newest = max((self._cache.capacity - keep) // 2, 1)
        del tokens[keep : len(tokens) - newest]
        self._cache.keep_common(tokens)
        self.clock.rounds += 1
        return self._prefill()

    def _report(self, done: int) -> None:
        """Tell how much of the prompt is read; not during a slide, and not on our clock."""
        if self.request.on_prefill is not None and self.clock.new_tokens == 0:
            self.clock.pause()
            self.request.on_prefill(done, len(self.request.prompt))
            self.clock.resume()
