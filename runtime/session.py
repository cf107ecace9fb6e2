"""A session: one token sequence, its KV cache, and generation as a stream of text events."""

from __future__ import annotations

import operator
import time
from collections.abc import Generator, Iterable, Sequence
from typing import Literal, get_args

from forerun.errors import ContextLimitError, OptionError, PromptError
from forerun.runtime.drafted import DraftedGeneration
from forerun.runtime.drafting.choice import AnyDrafter, Drafters
from forerun.runtime.generation import Generation, OnPrefill, Request
from forerun.runtime.options import check_count, check_params
from forerun.runtime.prefix import PrefixCache, StepRunner, busy_error
from forerun.runtime.stops import StopStrings, check_stops
from forerun.runtime.tokenizer import Tokenizer
from forerun.runtime.types import Event, FinishReason, SamplingParams

ContextPolicy = Literal["error", "slide"]
PREFILL_CHUNK, SMALL_CHUNK = 512, 128
DEFAULT_MAX_TOKENS = 256
DEFAULT_KEEP = 4


class Session:
    """A token sequence that grows, on a runner whose KV cache follows it.

    Args:
        runner: computes the logits.
        tokenizer: of the same bundle.
        cache: shared by all sessions on the same runner; None if this is the only one.
        drafters: what `generate` can draft with; None knows no names, only `Drafter` objects.
        prefill_chunk: prompt tokens per step; a cancel takes effect between two steps. None takes
            fewer where the KV cache is not float32: its rows are read one by one, so wide steps
            would only take memory.

    Raises:
        OptionError: the chunk is not positive.

    Attributes:
        tokens: the committed sequence, prompt and answer.
    """

    def __init__(
        self,
        runner: StepRunner,
        tokenizer: Tokenizer,
        *,
        cache: PrefixCache | None = None,
        drafters: Drafters | None = None,
        prefill_chunk: int | None = None,
    ) -> None:
        if prefill_chunk is None:
            is_float = runner.manifest.kv.dtype == "float32"
            prefill_chunk = PREFILL_CHUNK if is_float else SMALL_CHUNK
        check_count("prefill_chunk", prefill_chunk, 1)
        self.tokenizer = tokenizer
        self.tokens: list[int] = []
        self._cache = cache or PrefixCache(runner)
        self._drafters = drafters or Drafters(runner.manifest)
        self._chunk = prefill_chunk
        self._latest: Generation | None = None

    @property
    def capacity(self) -> int:
        """Tokens the context holds."""
        return self._cache.capacity

    @property
    def busy(self) -> bool:
        """Whether a generation runs on this model."""
        return self._cache.busy.locked()

    def cancel(self) -> None:
        """End the latest generation within one step; may be called from any thread.

        The generation then closes with finish reason ``cancelled``; what it said is kept. Without
        a generation this does nothing.
        """
        latest = self._latest
        if latest is not None:
            latest.cancelled = True

    def reset(self) -> None:
        """Forget the sequence and what is cached.

        Raises:
            BusyError: a generation is running.
        """
        with self._cache.reserved():
            self.tokens.clear()
            self._cache.rewind(0)

    def generate(
        self,
        prompt: str | bytes | Sequence[int],
        *,
        sampling: SamplingParams | None = None,
        max_tokens: int = DEFAULT_MAX_TOKENS,
        stop: str | Iterable[str] = (),
        logprobs: bool = False,
        context: ContextPolicy = "error",
        n_keep: int = DEFAULT_KEEP,
        on_prefill: OnPrefill | None = None,
        drafter: AnyDrafter | None = None,
        accept: str = "match",
    ) -> Generator[Event, None, None]:
        """Continue `prompt` and stream the answer.

        Everything is checked in this call; compute begins with the first `next`. Each token gives
        one event, then comes a closing event with finish reason and statistics. Closing the
        generator early is allowed at any time; what was said stays in `tokens`.

        Args:
            prompt: text, or ids that are taken as they are. It replaces the sequence; keys and
                values of the longest common prefix with what is cached are reused.
            sampling: how to draw; default greedy.
            max_tokens: most tokens to generate; the context may end the answer before.
            stop: texts that end the answer and are not part of it.
            logprobs: give each token's log-probability under the unprocessed model.
            context: at a full context ``error`` ends with finish reason ``context``; ``slide``
                keeps the first `n_keep` tokens and the newest half of the rest and goes on. A
                window has no end, so there both must be left out.
            n_keep: see `context`; at most half the context is kept.
            on_prefill: called with (prompt tokens done, prompt tokens) as the prompt is read.
            drafter: guesses tokens for the model to confirm several at a time: a name
                (`registry.DRAFTERS`), a `Drafter`, or None for the one the model was loaded with.
                The text is that of plain decoding, up to ties closer than the model's rounding.
            accept: ``match`` keeps what the model itself says; ``relaxed`` is lossy: it keeps
                drafted tokens that are merely typical for the model.

        Raises:
            PromptError: the prompt is empty, not text, or holds ids outside the vocabulary.
            ContextLimitError: the prompt alone exceeds the context.
            OptionError: another argument is out of range.
            UnsupportedError: the drafter does not fit this model.
            BusyError: another generation on this model is not finished.
            DrafterError: while streaming, the drafter failed.
        """
        generation = self._start(
            prompt,
            sampling=sampling,
            max_tokens=max_tokens,
            stop=stop,
            stop_ids=None,
            logprobs=logprobs,
            context=context,
            n_keep=n_keep,
            on_prefill=on_prefill,
            drafter=drafter,
            accept=accept,
        )
        return self._events(generation)

    def generate_ids(
        self,
        prompt: Sequence[int],
        *,
        sampling: SamplingParams | None = None,
        max_tokens: int = DEFAULT_MAX_TOKENS,
        stop_ids: Iterable[int] | None = None,
        logprobs: bool = False,
        context: ContextPolicy = "error",
        n_keep: int = DEFAULT_KEEP,
        on_prefill: OnPrefill | None = None,
        drafter: AnyDrafter | None = None,
        accept: str = "match",
    ) -> Generator[tuple[int, float | None], None, FinishReason]:
        """Like `generate`, without text: yields (token, log-probability), returns the reason.

        Args:
            prompt: see `generate`.
            sampling: see `generate`.
            max_tokens: see `generate`.
            stop_ids: ids that end the answer and are not part of it; None takes the model's.
            logprobs: see `generate`.
            context: see `generate`.
            n_keep: see `generate`.
            on_prefill: see `generate`.
            drafter: see `generate`.
            accept: see `generate`.

        Raises:
            UserError: as in `generate`.
        """
        generation = self._start(
            prompt,
            sampling=sampling,
            max_tokens=max_tokens,
            stop=(),
            stop_ids=stop_ids,
            logprobs=logprobs,
            context=context,
            n_keep=n_keep,
            on_prefill=on_prefill,
            drafter=drafter,
            accept=accept,
        )
        return self._pairs(generation)

    def _start(
        self,
        prompt: str | bytes | Sequence[int],
        *,
        sampling: SamplingParams | None,
        max_tokens: int,
        stop: str | Iterable[str],
        stop_ids: Iterable[int] | None,
        logprobs: bool,
        context: str,
        n_keep: int,
        on_prefill: OnPrefill | None,
        drafter: AnyDrafter | None,
        accept: str,
    ) -> Generation:
        """Check everything, before any compute."""
        started = time.perf_counter()
        if self.busy:
            raise busy_error()
        params = sampling or SamplingParams()
        check_params(params, self.tokenizer.vocab)
        check_count("max_tokens", max_tokens, 1)
        check_count("n_keep", n_keep, 0)
        if context not in get_args(ContextPolicy):
            raise OptionError(f"context is {context!r}; it must be 'error' or 'slide'")
        if self._cache.is_endless and (context, n_keep) != ("error", DEFAULT_KEEP):
            raise OptionError(
                "context and n_keep say what happens at the end of the context, and with a window "
                "there is none; leave them out, or load the model without a window"
            )
        request = Request(
            prompt=self._prompt_ids(prompt),
            params=params,
            max_tokens=max_tokens,
            stop_ids=frozenset(self.tokenizer.eos if stop_ids is None else stop_ids),
            stops=check_stops(stop),
            logprobs=logprobs,
            slides=context == "slide",
            n_keep=min(n_keep, self.capacity // 2),
            prefill_chunk=self._chunk,
            on_prefill=on_prefill,
        )
        plan = self._drafters.plan(drafter, accept)
        setup = time.perf_counter() - started
        if plan is None:
            self._latest = Generation(request, self._cache, self.tokens, setup)
        else:
            self._latest = DraftedGeneration(request, self._cache, self.tokens, setup, plan)
        return self._latest

    def _prompt_ids(self, prompt: str | bytes | Sequence[int]) -> list[int]:
        if isinstance(prompt, (str, bytes)):
            ids = self.tokenizer.encode(prompt, limit=self.capacity) if prompt else []
        else:
            ids = _checked_ids(prompt, self.tokenizer.vocab)
        if not ids:
            raise PromptError("the prompt is empty; give some text")
        if len(ids) > self.capacity:
            raise ContextLimitError(
                f"the prompt has {len(ids)} tokens, the context holds {self.capacity}; "
                "shorten the prompt, or export the model with a larger capacity"
            )
        return ids

    def _events(self, generation: Generation) -> Generator[Event, None, None]:
        """Ids to text: open characters and possible stop strings are held back."""
        clock = generation.clock
        detokenizer = self.tokenizer.stream()
        stops = StopStrings(generation.request.stops)
        source = generation.ids()
        stopped = False
        try:
            for token, logprob in source:
                text, stopped = stops.push(detokenizer.push(token))
                clock.pause()
                yield Event(text, token, logprob)
                clock.resume()
                if stopped:
                    break
        finally:
            source.close()
        text = ""
        if not stopped:
            text, stopped = stops.push(detokenizer.finish())
            text += stops.finish()
        reason = "stop" if stopped else generation.reason
        yield Event(text, None, None, reason, generation.stats())

    def _pairs(
        self, generation: Generation
    ) -> Generator[tuple[int, float | None], None, FinishReason]:
        clock = generation.clock
        source = generation.ids()
        try:
            for item in source:
                clock.pause()
                yield item
                clock.resume()
        finally:
            source.close()
        return generation.reason


def _checked_ids(prompt: Sequence[int], vocab: int) -> list[int]:
    try:
        ids = [operator.index(token) for token in prompt]
    except TypeError:
        raise PromptError("the prompt must be text or a list of token ids") from None
    if ids and not 0 <= min(ids) <= max(ids) < vocab:
        wrong = next(token for token in ids if not 0 <= token < vocab)
        raise PromptError(f"the prompt holds the id {wrong}; ids go from 0 to {vocab - 1}")
    return ids
