"""Generation with a drafter: rounds that give several tokens, said one by one."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import replace

import numpy as np

from forerun.runtime import sampling as sample
from forerun.runtime.drafting.accept import ACCEPT_RULES
from forerun.runtime.drafting.plan import DraftPlan
from forerun.runtime.drafting.rounds import Said
from forerun.runtime.drafting.schedules import SCHEDULES
from forerun.runtime.generation import Generation, Request
from forerun.runtime.prefix import PrefixCache
from forerun.runtime.sampling import Distribution
from forerun.runtime.types import Stats


class DraftedGeneration(Generation):
    """One answer being made with the help of a drafter.

    With an exact accept rule it says what `Generation` says: each token is chosen from the row
    behind the accepted tokens before it, with its own position and history.

    Args:
        request: what to do.
        cache: the model and what its KV cache holds.
        tokens: the session's sequence.
        setup: seconds spent on the call before.
        plan: how to draft.
    """

    def __init__(
        self,
        request: Request,
        cache: PrefixCache,
        tokens: list[int],
        setup: float,
        plan: DraftPlan,
    ) -> None:
        super().__init__(request, cache, tokens, setup)
        self._plan = plan
        rule = ACCEPT_RULES[plan.accept].make(self._distribution)
        # Greedy text has no distribution; a lossy rule judges by the one it is the peak of.
        params = request.params
        self._law = params if params.temperature else replace(params, temperature=1.0)
        self._rounds = SCHEDULES[plan.schedule].make(
            cache,
            plan.drafter,
            plan.policy,
            rule,
            params=params,
            trees=plan.trees,
            cancelled=lambda: self.cancelled,
        )

    def stats(self) -> Stats:
        """See `Generation.stats`."""
        plan, tally = self._plan, self._rounds.tally
        stats = super().stats()
        said = max(stats.new_tokens - 1, 0)
        return replace(
            stats,
            proposed=tally.proposed,
            accepted=tally.accepted,
            overruled=tally.overruled,
            acceptance=tally.acceptance,
            draft_ms=1e3 * tally.draft_seconds,
            verify_ms=1e3 * tally.verify_seconds,
            speedup=self._speedup(said, stats.tpot_ms * said / 1e3),
            drafter=plan.drafter.name,
            schedule=plan.schedule,
            accept=plan.accept,
            devices={**stats.devices, "draft": plan.device},
        )

    def _speedup(self, said: int, seconds: float) -> float:
        """Time of as many plain steps / `seconds`; 0 if their cost is not known."""
        rounds, costs = self._rounds.tally.rounds, self._plan.costs
        if costs is None or not rounds or seconds <= 0:
            return 0.0
        plain = sum(tokens * costs.step(1, depth) for depth, tokens in rounds)
        # The last round may have given more than was said.
        return plain / seconds * said / sum(tokens for _, tokens in rounds)

    def _loop(self) -> Generator[tuple[int, float | None], None, None]:
        request, clock, tokens = self.request, self.clock, self._tokens
        self._take_prompt()
        said = self._first(self._read_prompt())
        while said:
            for token, logits in said:
                if token in request.stop_ids:
                    self.reason = "stop"
                    return
                logprob = sample.logprob(logits, token) if request.logprobs else None
                tokens.append(token)
                clock.token_done()
                yield token, logprob
                if self._history is not None:
                    self._history.append(token)
                if self.cancelled:
                    self.reason = "cancelled"
                    return
            said = self._next_round()

    def _settle(self) -> None:
        super()._settle()
        # A round may have cached more than was said.
        self._cache.rewind(min(len(self._cache.ids), len(self._tokens)))
        self._rounds.finish(len(self._tokens))

    def _first(self, logits: np.ndarray | None) -> Said:
        """What follows text that was read without a drafter."""
        return [] if logits is None else [(self._choose(logits), logits)]

    def _next_round(self) -> Said:
        """What follows the text; nothing if the answer ends here."""
        room = self.request.max_tokens - self.clock.new_tokens
        if self._ends():
            return []
        if len(self._tokens) <= self._cache.capacity:
            said = self._rounds.round(self._tokens, self._pick, room)
            if said:
                self.clock.rounds += 1
            else:
                self.reason = "cancelled"
            return said
        logits = self._slide()
        self._rounds.restart(self._position() - len(self._tokens))
        return self._first(logits)

    def _pick(self, logits: np.ndarray, path: Sequence[int]) -> int:
        """The model's token at a row, behind the accepted tokens of this round."""
        request = self.request
        position = self._position() + len(path)
        history = self._history_with(path)
        return sample.pick(logits, request.params, position, history, len(request.prompt))

    def _distribution(self, logits: np.ndarray, path: Sequence[int]) -> Distribution:
        history = self._history_with(path)
        return sample.process_logits(logits, self._law, history, len(self.request.prompt))

    def _history_with(self, path: Sequence[int]) -> Sequence[int]:
        return () if self._history is None else [*self._history, *path]
