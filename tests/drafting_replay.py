"""Recorded decoding, replayed: which tokens a drafter would have got right, and what steps cost.

A record is drawn once and played to any policy, so that policies and fixed numbers of tokens meet
the same text. Time is counted, not taken.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from forerun.runtime.drafting.costs import StepCosts
from forerun.runtime.drafting.guide import Guide
from forerun.runtime.drafting.tree import TokenTree

DEPTH = 64
T1 = 0.011
# T(n) / T(1) of a row-exact int4 bundle, of one in between, and of one with cheap rows.
SHAPES = {
    "dear": (1, 1.35, 1.65, 1.9, 2.6, 3.3, 4.8, 6.2),
    "middle": (1, 1.15, 1.3, 1.45, 1.75, 2.1, 2.8, 3.5),
    "cheap": (1, 1.05, 1.1, 1.15, 1.3, 1.5, 1.9, 2.4),
}
LONGEST = 16


def step_costs(shape: str) -> StepCosts:
    seconds = tuple(T1 * ratio for ratio in SHAPES[shape])
    return StepCosts((1, 2, 3, 4, 6, 8, 12, 16), (DEPTH,), (seconds,))


@dataclass(frozen=True)
class Round:
    """What a drafter would say if it were asked now: nothing, or a chain with its truth."""

    confidences: tuple[float, ...]
    hits: tuple[bool, ...]

    @property
    def right(self) -> int:
        """Drafted tokens that are right before the first wrong one."""
        return next((i for i, hit in enumerate(self.hits) if not hit), len(self.hits))


def record(phases, rounds: int, seed: int = 0, said: float | None = None, blur: float = 0.1):
    """Draw rounds.

    Args:
        phases: (acceptance, share of rounds with a proposal) pairs that take turns.
        rounds: how many.
        seed: of the draw.
        said: what the drafter claims of every token; None lets it know the truth, blurred.
        blur: standard deviation of that.
    """
    rng = random.Random(seed)
    out, phase = [], 0
    for _ in range(rounds):
        if rng.random() < 1 / 60:
            phase = (phase + 1) % len(phases)
        alpha, share = phases[phase]
        count = LONGEST if rng.random() < share else 0
        claims = [
            min(max(rng.gauss(alpha, blur), 0.01), 0.99) if said is None else said
            for _ in range(count)
        ]
        out.append(Round(tuple(claims), tuple(rng.random() < alpha for _ in range(count))))
    return out


def play(policy, rounds, costs: StepCosts, draft_step: float = 0.0, seed: int = 1, source="x"):
    """Tokens per plain step that a policy gets out of a record.

    Args:
        policy: a `DraftPolicy`.
        rounds: the record.
        costs: the truth; what the policy observes scatters around it.
        draft_step: seconds of one draft step; 0 is a drafter that gives all it has at once.
        seed: of the scatter.
        source: name of the drafter.
    """
    truth, noise = Guide.of(costs).costs.curve(DEPTH), random.Random(seed)
    tokens = seconds = 0.0
    for now in rounds:
        tree, drafting = _draft(policy, now, draft_step, source)
        chosen = policy.prune(tree, drafting, DEPTH)
        right = min(now.right, len(chosen))
        own = right + 1 if right < min(now.right, len(tree)) else 0
        took = truth[len(chosen) + 1]
        seen = (took - costs.overhead) * noise.choice((0.9, 1.0, 1.0, 1.1, 1.2))
        new = (*range(1, right + 1), own)
        policy.observe(chosen, tuple(range(right)), drafting, seen, DEPTH, new)
        tokens += right + 1
        seconds += drafting + took
    return tokens / seconds * truth[1]


def _draft(policy, now: Round, draft_step: float, source: str):
    budget = min(policy.budget(DEPTH), len(now.hits))
    if not budget:
        return TokenTree.EMPTY, 0.0
    count = budget
    if draft_step:
        count, value = 1, now.confidences[0]
        while count < budget and policy.keep_going(count, value, DEPTH):
            value *= now.confidences[count]
            count += 1
    tree = TokenTree.chain(range(1, count + 1), now.confidences[:count], source)
    return tree, count * draft_step if draft_step else 2e-5


def play_fixed(count: int, rounds, costs: StepCosts, draft_step: float = 0.0) -> float:
    """The same with always `count` tokens, known beforehand: what hindsight compares with."""
    truth = Guide.of(costs).costs.curve(DEPTH)
    tokens = seconds = 0.0
    for now in rounds:
        drafted = min(count, len(now.hits))
        tokens += min(now.right, drafted) + 1
        seconds += drafted * draft_step + truth[drafted + 1]
    return tokens / seconds * truth[1]


def hindsight(rounds, costs: StepCosts, draft_step: float = 0.0) -> float:
    """The most that any fixed number of tokens gives."""
    return max(play_fixed(n, rounds, costs, draft_step) for n in range(LONGEST + 1))
