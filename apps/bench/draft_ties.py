"""Where a drafted text leaves the plain one, and whether that was a near-tie of the model.

A step of several rows may run other kernels than a step of one, which round differently; where two
tokens are all but equally likely, that decides between them. On a row-exact bundle it cannot.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

from forerun.runtime.noise import gumbel

if TYPE_CHECKING:
    from collections.abc import Sequence

    from forerun.apps.bench.draft_turns import Answer
    from forerun.runtime.types import SamplingParams

# In logits. Between steps of one row and of several, the logits of SmolLM2-135M in int4 that matter
# (the 50 largest) differ by 0.4 at most in a typical row, and by 0.9 in the worst of some hundred.
NEAR_TIE = 1.0


@dataclass(frozen=True)
class Comparison:
    """A drafted text beside the plain one.

    Attributes:
        same: whether all ids are the same.
        position: of the first that is not, in the answer; None if all are.
        gap: how far apart the two choices were for the model, noise included, in logits computed
            anew; None if all ids are the same.
        limit: up to which gap a difference is a near-tie.
    """

    same: bool
    position: int | None = None
    gap: float | None = None
    limit: float = NEAR_TIE

    @property
    def near_tie(self) -> bool:
        """Whether the texts differ, and only as two kernels may."""
        return self.gap is not None and self.gap < self.limit


class Scorer(Protocol):
    """Asks the model anew."""

    def logprob(self, ids: Sequence[int], token: int) -> float:
        """Log-probability of a token after a sequence."""
        ...

    @property
    def eos(self) -> frozenset[int]:
        """Ids that end an answer."""
        ...

    @property
    def row_exact(self) -> bool:
        """Whether a row computes the same however many there are: no excuse for a difference."""
        ...


def compare(
    scorer: Scorer, prompt: Sequence[int], params: SamplingParams, plain: Answer, drafted: Answer
) -> Comparison:
    """Compare two answers to one prompt, token by token.

    Args:
        scorer: of the model that gave them.
        prompt: ids.
        params: temperature and seed; filters and penalties are not looked at.
        plain: decoded without a drafter.
        drafted: decoded with one.
    """
    if plain.tokens == drafted.tokens:
        return Comparison(True)
    at = first_difference(plain.tokens, drafted.tokens)
    history = [*prompt, *plain.tokens[:at]]
    chosen, other = (
        # An answer that ends here has one of the end ids next.
        max(
            _score(scorer, history, token, params)
            for token in answer.tokens[at : at + 1] or scorer.eos
        )
        for answer in (plain, drafted)
    )
    return Comparison(False, at, abs(chosen - other), 0.0 if scorer.row_exact else NEAR_TIE)


def first_difference(a: Sequence[int], b: Sequence[int]) -> int:
    """Number of the first token that differs; the length of the shorter one if it begins both."""
    for index, (mine, theirs) in enumerate(zip(a, b, strict=False)):
        if mine != theirs:
            return index
    return min(len(a), len(b))


def _score(scorer: Scorer, history: Sequence[int], token: int, params: SamplingParams) -> float:
    """What the model's choice is the argmax of, in logits and up to a constant."""
    logprob = scorer.logprob(history, token)
    if params.temperature == 0:
        return logprob
    noise = gumbel(params.seed, len(history), np.array([token]))[0]
    return logprob + params.temperature * float(noise)
