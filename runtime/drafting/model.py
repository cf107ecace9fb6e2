"""A small model that drafts, with a KV cache of its own.

It may sit on another device than the target and draft ahead of what is confirmed: before each
step the cache is cut to what the wanted text shares with it, so that nobody needs to tell the
drafter which guesses came true.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from forerun.errors import OptionError
from forerun.runtime.drafting.coupled import CoupledPick
from forerun.runtime.drafting.tree import TokenTree
from forerun.runtime.prefix import common_prefix

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from forerun.runtime.drafting.drafter import Outcome
    from forerun.runtime.drafting.vocab import VocabMap
    from forerun.runtime.prefix import StepRunner
    from forerun.runtime.types import SamplingParams

_CHUNK = 512
_LEAST_CAPACITY = 16


class ModelDrafter:
    """Drafts chains with a model; costs one of its steps per token.

    Its context may be shorter than the target's: then it reads the newest half of its capacity
    again whenever that is full, and drafts from there.

    Args:
        runner: of the draft model that nothing else uses.
        vocab: which ids of the target its ids are.
        name: of the drafter in statistics.

    Raises:
        OptionError: the model's capacity is too small to draft at all.
    """

    needs_features = False
    proposes_trees = False

    def __init__(self, runner: StepRunner, vocab: VocabMap, name: str = "model") -> None:
        capacity = runner.arena.capacity
        if capacity < _LEAST_CAPACITY:
            raise OptionError(
                f"the draft model has room for {capacity} tokens, it needs {_LEAST_CAPACITY}; "
                "export it with a larger capacity"
            )
        self.name = name
        self._runner: Any = runner
        self._vocab = vocab
        self._pick = CoupledPick(vocab)
        self._capacity = capacity
        self._ids: list[int] = []  # the committed text in the drafter's ids
        self._start = 0  # where its cached window begins in the text
        self._cached: list[int] = []
        self._answer_start = 0
        runner.arena.rewind(0)

    @property
    def backlog(self) -> int:
        """Committed tokens that the next proposal reads before it drafts."""
        return len(self._ids) - min(self._start + len(self._cached), len(self._ids))

    def configure(self, params: SamplingParams, skipped: int = 0) -> None:
        """Rank as the target draws; see `combine.configure`."""
        self._pick.configure(params, skipped)

    def begin(self, ids: Sequence[int], features: Any = None) -> None:
        """Take up a text. It is read with the first proposal, so that no unused draft costs."""
        text = self._vocab.to_draft(ids)
        if common_prefix(self._ids, text) <= self._start:
            self._start = 0
        self._ids = text
        self._answer_start = max(len(ids) - 1, 0)

    def propose(self, budget: int, keep_going: Callable[[float], bool] | None = None) -> TokenTree:
        """Draft a chain of at most `budget` tokens."""
        tokens: list[int] = []
        confidences: list[float] = []
        value = 1.0
        while len(tokens) < budget:
            if tokens and keep_going is not None and not keep_going(value):
                break
            new, sure = self.next_tokens(tokens, 1)
            if not new:
                break
            tokens += new
            confidences += sure
            value *= sure[0]
        return TokenTree.chain(tokens, confidences, self.name)

    def next_tokens(self, ahead: Sequence[int], count: int) -> tuple[list[int], list[float]]:
        """The `count` likeliest tokens behind committed ids and `ahead`; see `AheadDrafter`."""
        logits = self._read(self._vocab.to_draft(ahead), 1)
        if logits is None:
            return [], []
        return self._choose(logits[0], ahead, count)

    def advance(self, ahead: Sequence[int], guess: Sequence[int]) -> tuple[list[int], list[float]]:
        """Its own tokens behind `ahead`, read with a guess in one step; see `combine.Reader`."""
        text = [*ahead, *guess]
        logits = self._read(self._vocab.to_draft(text), 1 + len(guess))
        tokens: list[int] = []
        confidences: list[float] = []
        for row in () if logits is None else logits:
            new, sure = self._choose(row, text[: len(ahead) + len(tokens)], 1)
            tokens += new
            confidences += sure
            if len(tokens) > len(guess) or new[0] != guess[len(tokens) - 1]:
                break
        return tokens, confidences

    def observe(self, outcome: Outcome) -> None:
        """Append what was decided; what was drafted and came true stays cached."""
        self._ids += self._vocab.to_draft(outcome.new_tokens)

    def rewind(self, length: int) -> None:
        """Forget the tokens from `length` on."""
        del self._ids[length:]
        if length <= self._start:
            self._start = 0
        self._cut(min(len(self._cached), max(length - self._start, 0)))

    def close(self) -> None:
        """Free the model."""
        self._runner.close()

    def _choose(
        self, logits: np.ndarray, ahead: Sequence[int], count: int
    ) -> tuple[list[int], list[float]]:
        position = len(self._ids) + len(ahead)
        history: list[int] = []
        if self._pick.uses_history:
            history = self._ids + self._vocab.to_draft(ahead)
        return self._pick.choose(logits, position, count, history, self._answer_start)

    def _read(self, ahead: list[int], rows: int) -> np.ndarray | None:
        """Logits float32 [rows, N] of the last rows of text + ahead; None if it does not fit."""
        total, start = len(self._ids) + len(ahead), self._start
        if total - start > self._capacity:
            start = total - self._capacity // 2
        if start >= len(self._ids) or rows > total - start:
            return None
        self._start = start
        window = self._ids[start:] + ahead
        # A step that was broken off may have left more or fewer rows than were noted.
        self._cut(min(len(self._cached), self._runner.arena.length))
        self._cut(min(common_prefix(self._cached, window), len(window) - rows))
        return self._feed(window[len(self._cached) :], rows)

    def _feed(self, ids: list[int], rows: int) -> np.ndarray:
        """Run ids in chunks, the last of which holds all `rows` whose logits are wanted."""
        first = len(ids) - rows
        for at in range(0, first - _CHUNK + 1, _CHUNK):
            self._step(ids[at : at + _CHUNK], "none")
        rest = ids[first // _CHUNK * _CHUNK :]
        return self._step(rest, "last" if rows == 1 else range(len(rest) - rows, len(rest)))

    def _step(self, ids: list[int], want: Any) -> np.ndarray:
        logits = self._runner.step(ids, want=want)
        self._cached += ids
        return logits

    def _cut(self, length: int) -> None:
        if self._runner.arena.length > length:
            self._runner.arena.rewind(length)
        del self._cached[length:]
