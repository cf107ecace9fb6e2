"""Rows and ratios of what the peers' modes measured."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from forerun.apps.bench.draft_rows import ALL, mean_of
from forerun.apps.bench.spread import Spread, ratio, spread
from forerun.apps.bench.turns import OURS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from forerun.apps.bench.peers import Runtime

PLAIN_MODE = "plain"


@dataclass(frozen=True)
class Turn:
    """What one turn of one mode gave.

    Attributes:
        category: of the prompt.
        repeat: number of the repetition.
        steps: tokens after the first.
        seconds: time they took.
        proposed: drafted tokens, if the runtime tells.
        accepted: of them, if the runtime tells.
        rounds: steps after the prompt, if the runtime tells.
        distinct: see `distinct_share`.
    """

    category: str
    repeat: int
    steps: int
    seconds: float
    proposed: int | None
    accepted: int | None
    rounds: int | None
    distinct: float | None


Turns = dict[str, list[Turn]]


def rates(turns: Sequence[Turn], category: str) -> Spread | None:
    """Tokens per second of each repetition, over all its prompts of a category."""
    sums: dict[int, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for turn in turns:
        if category in (ALL, turn.category) and turn.steps > 0:
            sums[turn.repeat][0] += turn.steps
            sums[turn.repeat][1] += turn.seconds
    return spread([steps / seconds for steps, seconds in sums.values() if seconds > 0])


def make_rows(modes: dict[str, Runtime], turns: Turns, category: str) -> list[dict[str, Any]]:
    """One row for each mode: its rate, and how much faster than the same runtime's plain mode."""
    rows = []
    for key, runtime in modes.items():
        here = [turn for turn in turns.get(key, []) if category in (ALL, turn.category)]
        rate, plain = rates(here, category), rates(_plain_of(modes, turns, runtime), category)
        gain = ratio(rate, plain) if rate and plain and runtime.mode != PLAIN_MODE else None
        rows.append(
            {
                "runtime": runtime.name,
                "weights": runtime.weights,
                "mode": runtime.mode,
                "category": category,
                "tok_s": rate.to_json() if rate else None,
                "speedup": gain.paired.to_json(3) if gain else None,
                "steady": gain.steady if gain else None,
                "tokens_per_round": _share([t.steps for t in here], [t.rounds for t in here]),
                "acceptance": _share([t.accepted for t in here], [t.proposed for t in here]),
                "distinct_4grams": mean_of([turn.distinct for turn in here]),
            }
        )
    return rows


def _plain_of(modes: dict[str, Runtime], turns: Turns, runtime: Runtime) -> list[Turn]:
    for key, other in modes.items():
        if (other.name, other.weights, other.mode) == (runtime.name, runtime.weights, PLAIN_MODE):
            return turns.get(key, [])
    return []


def _share(part: Sequence[int | None], whole: Sequence[int | None]) -> float | None:
    """Sum / sum, over the turns that told both."""
    known = [(a, b) for a, b in zip(part, whole, strict=True) if a is not None and b is not None]
    total = sum(b for _, b in known)
    return round(sum(a for a, _ in known) / total, 4) if total else None


def make_ratios(modes: dict[str, Runtime], turns: Turns, category: str) -> list[dict[str, Any]]:
    """How many times faster forerun with its drafter is than the best peer, plain and drafting."""
    ours = next(key for key, m in modes.items() if m.name == OURS and m.mode != PLAIN_MODE)
    mine = rates(turns.get(ours, []), category)
    found = []
    for what in ("plain decoding", "speculative decoding"):
        rivals = {
            key: rate
            for key, mode in modes.items()
            if mode.name != OURS and (mode.mode == PLAIN_MODE) == (what == "plain decoding")
            if (rate := rates(turns.get(key, []), category)) is not None
        }
        if not rivals or mine is None:
            continue
        best = max(rivals, key=lambda key: rivals[key].median)
        made = ratio(mine, rivals[best])
        if made is not None:
            peer = modes[best]
            title = f"{peer.name} {peer.weights} {peer.mode}"
            found.append({"what": what, "category": category, "peer": title, **made.to_json()})
    return found
