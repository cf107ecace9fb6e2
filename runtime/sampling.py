"""From logits to the next token: pure functions, one per step of the chain.

Order, as in Hugging Face transformers: repetition, presence and frequency penalties, logit bias,
temperature, top-k, top-p, min-p, typical. Each filter works on the renormalised survivors of the
one before and keeps at least one token. Ties are broken by the lower id, so results do not depend
on the platform. Greedy decoding (temperature 0) applies penalties and bias, and no filter.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from forerun.errors import BundleError
from forerun.runtime.noise import bits_to_gumbel, hash_bits
from forerun.runtime.types import SamplingParams

_BLOCK = 128
_SLACK = 1e-9


@dataclass(frozen=True)
class Distribution:
    """The tokens that may follow.

    Attributes:
        ids: int64 [N], ascending.
        scores: float64 [N], log-probabilities up to one common constant.
    """

    ids: np.ndarray
    scores: np.ndarray

    def log_probabilities(self) -> np.ndarray:
        """Normalised log-probabilities, float64 [N]."""
        shifted = self.scores - self.scores.max()
        return shifted - math.log(np.exp(shifted).sum())


def pick(
    logits: np.ndarray,
    params: SamplingParams,
    position: int,
    history: Sequence[int] | np.ndarray = (),
    answer_start: int = 0,
) -> int:
    """Choose the token at `position`.

    Args:
        logits: float32 [V] of the row before `position`; not changed.
        params: how to draw; checked by `options.check_params`.
        position: absolute position of the new token in its sequence.
        history: ids of prompt and answer so far; only read when a penalty is on.
        answer_start: where the answer begins in `history`.

    Raises:
        BundleError: the logits are not finite.
    """
    if changes_logits(params):
        logits = adjust_logits(logits, params, history, answer_start)
    if params.temperature == 0:
        return argmax(logits)
    return draw(filter_logits(logits, params), params.seed, position)


def process_logits(
    logits: np.ndarray,
    params: SamplingParams,
    history: Sequence[int] | np.ndarray = (),
    answer_start: int = 0,
) -> Distribution:
    """Apply penalties, bias, temperature and filters; arguments as in `pick`.

    At temperature 0 the result holds the greedy token alone.
    """
    if changes_logits(params):
        logits = adjust_logits(logits, params, history, answer_start)
    if params.temperature == 0:
        return Distribution(np.array([argmax(logits)]), np.zeros(1))
    return filter_logits(logits, params)


def argmax(logits: np.ndarray) -> int:
    """The lowest id with the largest logit.

    Raises:
        BundleError: the largest logit is not finite, so the model computed nonsense.
    """
    best = int(logits.argmax())
    if not math.isfinite(logits[best]):
        raise BundleError(
            "the model computed a logit that is not a finite number; its weights are damaged or "
            "the device cannot run it: pull or export it again"
        )
    return best


def draw(distribution: Distribution, seed: int, position: int) -> int:
    """Return ``argmax(log p + gumbel(seed, position, id))`` over the surviving ids."""
    ids, scores = distribution.ids, distribution.scores
    bits = hash_bits(seed, position, ids)
    # A token can only win if the largest noise of all would lift it over the best token's score.
    top = int(scores.argmax())
    highest, at_top = bits_to_gumbel(np.array([bits.max(), bits[top]]))
    # In this order the best token itself always passes; the slack is for what rounding hides.
    alive = np.flatnonzero(scores >= scores[top] - (highest - at_top) - _SLACK)
    return int(ids[alive[(scores[alive] + bits_to_gumbel(bits[alive])).argmax()]])


def logprob(logits: np.ndarray, token: int) -> float:
    """Log-probability of `token` under the unprocessed model distribution.

    Args:
        logits: float32 [V].
        token: an id below V.
    """
    best = logits.max()
    total = np.exp(logits - best).sum(dtype=np.float64)
    return float(logits[token]) - float(best) - math.log(total)


def changes_logits(params: SamplingParams) -> bool:
    """Whether penalties or a bias touch the logits."""
    return uses_history(params) or bool(params.logit_bias)


def uses_history(params: SamplingParams) -> bool:
    """Whether the next token depends on the ids so far other than through the model."""
    return (
        params.repetition_penalty != 1.0
        or params.presence_penalty != 0.0
        or params.frequency_penalty != 0.0
    )


def adjust_logits(
    logits: np.ndarray,
    params: SamplingParams,
    history: Sequence[int] | np.ndarray = (),
    answer_start: int = 0,
) -> np.ndarray:
    """Apply penalties and bias to a copy; float32 [V]. Arguments as in `pick`."""
    out = np.array(logits, dtype=np.float32)
    ids = np.asarray(history, dtype=np.int64)
    if params.repetition_penalty != 1.0 and ids.size:
        seen = np.unique(ids)
        values = out[seen]
        penalty = np.float32(params.repetition_penalty)
        out[seen] = np.where(values > 0, values / penalty, values * penalty)
    if (params.presence_penalty or params.frequency_penalty) and ids.size > answer_start:
        seen, counts = np.unique(ids[answer_start:], return_counts=True)
        out[seen] -= np.float32(params.presence_penalty)
        out[seen] -= np.float32(params.frequency_penalty) * counts.astype(np.float32)
    for token, value in params.logit_bias.items():
        out[token] += np.float32(value)
    return out


def filter_logits(logits: np.ndarray, params: SamplingParams) -> Distribution:
    """Apply temperature, then top-k, top-p, min-p and typical.

    Args:
        logits: float32 [V].
        params: temperature must be above 0.

    Raises:
        BundleError: the logits are not finite.
    """
    best = float(logits[argmax(logits)])
    ids = _all_ids(len(logits))
    if params.top_k:
        ids = keep_top_k(logits, params.top_k)
        logits = logits[ids]
    scores = logits.astype(np.float64)
    scores -= best
    with np.errstate(over="ignore"):  # -inf is right for a temperature next to 0
        scores /= params.temperature
    for is_on, keep in _FILTERS:
        if is_on(params):
            chosen = keep(scores, params)
            ids, scores = ids[chosen], scores[chosen]
    return Distribution(ids, scores)


def keep_top_k(logits: np.ndarray, k: int) -> np.ndarray:
    """Ids of the k largest logits, ascending; int64 [k]."""
    if k >= len(logits):
        return _all_ids(len(logits))
    some = np.flatnonzero(logits >= _bound_of_top_k(logits, k))
    values = logits[some]
    edge = np.partition(values, len(values) - k)[len(values) - k]
    above = some[values > edge]
    ties = some[values == edge][: k - len(above)]
    return np.sort(np.concatenate([above, ties]))


def _bound_of_top_k(logits: np.ndarray, k: int) -> np.floating | float:
    """A value that at least k logits reach, found without looking for the k largest.

    The k-th largest of the block maxima is one; sorting thousands of logits takes half a
    millisecond, and this a tenth of it.
    """
    blocks = len(logits) // _BLOCK
    if k > blocks // 2:
        return -np.inf
    tops = logits[: blocks * _BLOCK].reshape(blocks, _BLOCK).max(axis=1)
    return np.partition(tops, blocks - k)[blocks - k]


def keep_top_p(scores: np.ndarray, params: SamplingParams) -> np.ndarray:
    """Indices of the smallest set of most probable tokens that holds the mass (Holtzman 2019)."""
    logp = scores - _log_sum_exp(scores)
    # Tokens below this could not fill the remaining mass even all together: no need to sort them.
    floor = math.log(1.0 - params.top_p) - math.log(len(scores))
    some = np.flatnonzero(logp >= floor)
    order = some[np.argsort(-logp[some], kind="stable")]
    return np.sort(order[: _count_for_mass(np.exp(logp[order]), params.top_p)])


def keep_min_p(scores: np.ndarray, params: SamplingParams) -> np.ndarray:
    """Indices of tokens with at least this share of the best one's probability."""
    return np.flatnonzero(scores >= scores.max() + math.log(params.min_p))


def keep_typical(scores: np.ndarray, params: SamplingParams) -> np.ndarray:
    """Indices of the tokens whose surprise is nearest to the entropy (Meister 2022)."""
    logp = scores - _log_sum_exp(scores)
    p = np.exp(logp)
    distance = np.abs(-logp - float(-(p[p > 0] * logp[p > 0]).sum()))
    some, reach = np.arange(0), 1.0
    # Only tokens within reach are sorted; twice as far each time until they hold the mass.
    while p[some].sum() < params.typical_p and len(some) < len(p):
        some = np.flatnonzero(distance <= reach) if reach < 1e3 else np.arange(len(p))
        reach *= 2
    order = some[np.argsort(distance[some], kind="stable")]
    return np.sort(order[: _count_for_mass(p[order], params.typical_p)])


_FILTERS: tuple[
    tuple[Callable[[SamplingParams], bool], Callable[[np.ndarray, SamplingParams], np.ndarray]], ...
] = (
    (lambda p: p.top_p < 1.0, keep_top_p),
    (lambda p: p.min_p > 0.0, keep_min_p),
    (lambda p: p.typical_p < 1.0, keep_typical),
)


def _count_for_mass(p: np.ndarray, mass: float) -> int:
    """How many leading entries of `p` it takes to reach `mass`; at least 1."""
    return int(np.searchsorted(np.cumsum(p), mass, side="left")) + 1


def _log_sum_exp(scores: np.ndarray) -> float:
    best = scores.max()
    # Exponentials of float32 take a tenth of the time; the sum is good to 1e-7.
    return float(best) + math.log(np.exp((scores - best).astype(np.float32)).sum(dtype=np.float64))


@functools.lru_cache(maxsize=4)
def _all_ids(count: int) -> np.ndarray:
    ids = np.arange(count)
    ids.setflags(write=False)
    return ids
