"""How a drafter with a model chooses: with the noise that the target will draw with.

At temperature 0 it takes the likeliest token. Above, it ranks log q + g where g is the target's
own noise of that position and token: where q is close to p both fall on the same token, so nearly
as many drafts are accepted as a residual sampler accepts, and drafts stay reproducible.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from forerun.runtime.drafting.top import top_ids
from forerun.runtime.noise import gumbel
from forerun.runtime.sampling import adjust_logits, argmax, changes_logits, filter_logits
from forerun.runtime.types import SamplingParams

if TYPE_CHECKING:
    from collections.abc import Sequence

    from forerun.runtime.drafting.vocab import VocabMap

# Tokens less likely than the best by e**-8 are not drafted; fewer if that leaves too many, since
# each costs noise and what is left out are rare choices of a flat distribution.
_REACH = 8.0
_MOST = 512

Choice = tuple[list[int], list[float]]


class CoupledPick:
    """Chooses draft tokens as the target will, from the drafter's logits.

    Args:
        vocab: the drafter's ids.
    """

    def __init__(self, vocab: VocabMap) -> None:
        self._vocab = vocab
        self._params = SamplingParams()
        self._skipped = 0
        self._adjusts = False

    def configure(self, params: SamplingParams, skipped: int = 0) -> None:
        """Take over how the target draws; arguments as in `combine.configure`."""
        bias = {
            self._vocab.to_draft([token])[0]: value
            for token, value in params.logit_bias.items()
            if self._vocab.knows(token)
        }
        self._params = replace(params, logit_bias=bias)
        self._skipped = skipped
        self._adjusts = changes_logits(self._params)

    def choose(
        self,
        logits: np.ndarray,
        position: int,
        count: int = 1,
        history: Sequence[int] = (),
        answer_start: int = 0,
    ) -> Choice:
        """The most promising tokens behind a row.

        Args:
            logits: float32 [N] over the drafter's ids; what comes behind them is not read.
            position: committed and drafted ids before the token.
            count: most tokens to give.
            history: those ids, as the drafter's; read only when a penalty is on.
            answer_start: where the answer begins in `history`.

        Returns:
            The target's ids, best first, and the estimate that each is right.
        """
        logits = logits[: len(self._vocab)]
        if self._adjusts:
            known = [token for token in history if token < len(logits)]
            lost = sum(token >= len(logits) for token in history[:answer_start])
            history, answer_start = known, answer_start - lost
            logits = adjust_logits(logits, self._params, history, answer_start)
        if self._params.temperature == 0:
            ids, shares = _likeliest(logits, count)
        else:
            ids, shares = self._drawn(logits, position + self._skipped, count)
        return self._vocab.to_target[ids].tolist(), shares.tolist()

    @property
    def uses_history(self) -> bool:
        """Whether `choose` reads the history."""
        return self._adjusts

    def _drawn(
        self, logits: np.ndarray, position: int, count: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Draft ids ranked by log q + g, and how clearly each one wins."""
        params = self._params
        best = logits[argmax(logits)]
        reach = _REACH * params.temperature
        near = np.flatnonzero(logits >= best - reach)
        while len(near) > _MOST and reach > 1e-3:
            reach *= 0.7
            near = near[logits[near] >= best - reach]
        left = filter_logits(logits[near], params)
        ids = near[left.ids]
        scores = left.scores + gumbel(params.seed, position, self._vocab.to_target[ids])
        order = np.argsort(-scores, kind="stable")[:count]
        weights = np.exp(scores - scores[order[0]])
        return ids[order], weights[order] / weights.sum()


def _likeliest(logits: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The `count` largest logits' ids and probabilities."""
    best = logits[argmax(logits)]
    total = float(np.exp(logits - best).sum())
    ids = top_ids(logits, min(count, len(logits)))
    return ids, np.exp((logits[ids] - best).astype(np.float64)) / total
