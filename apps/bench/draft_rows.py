"""The figures of `forerun bench draft`, from its samples: speed-ups by category and overall."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from forerun.apps.bench.draft_turns import PLAIN
from forerun.apps.bench.spread import Ratio, Spread, ratio

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from forerun.apps.bench.draft_ties import Comparison
    from forerun.apps.bench.draft_turns import Sample

ALL = "all"
_RUN = 4


@dataclass(frozen=True)
class Pair:
    """A drafted answer and the plain one of the same prompt, setting and repetition."""

    drafted: Sample
    plain: Sample

    @property
    def category(self) -> str:
        """Kind of prompt."""
        return self.drafted.prompt.category

    @property
    def key(self) -> tuple[object, ...]:
        """What tells it from all other pairs."""
        return (self.drafted.drafter, *self.drafted.text_key)

    @property
    def measured(self) -> bool:
        """Whether both have a token after the first, so that there is a decode time."""
        return self.drafted.answer.later > 0 and self.plain.answer.later > 0

    @property
    def drafted_seconds(self) -> float:
        """Decode time for as many tokens as the plain answer has."""
        answer = self.drafted.answer
        return answer.seconds * self.plain.answer.later / answer.later


def pairs_of(samples: Iterable[Sample]) -> list[Pair]:
    """Every drafted sample with its plain one."""
    samples = list(samples)
    plain = {s.text_key: s for s in samples if s.drafter == PLAIN}
    return [Pair(s, plain[s.text_key]) for s in samples if s.drafter != PLAIN]


def make_rows(
    pairs: Sequence[Pair], comparisons: dict[tuple[object, ...], Comparison]
) -> list[dict[str, Any]]:
    """One row for each category, drafter and temperature, as in the JSON output.

    Args:
        pairs: as `pairs_of` makes them.
        comparisons: `Pair.key` to how the drafted text compares with the plain one.
    """
    groups: dict[tuple[str, str, float], list[Pair]] = defaultdict(list)
    for pair in pairs:
        groups[pair.category, pair.drafted.drafter, pair.drafted.temperature].append(pair)
    return [
        {
            "category": category,
            "drafter": drafter,
            "temperature": temperature,
            "schedule": _schedule(group),
            **_speed(group),
            **_drafting(group),
            **_sameness(group, comparisons),
        }
        for (category, drafter, temperature), group in groups.items()
    ]


def make_overall(
    pairs: Sequence[Pair], comparisons: dict[tuple[object, ...], Comparison]
) -> dict[str, Any]:
    """Figures of each drafter over all prompts; at the top level those of `auto`.

    Without `auto` they are those of the first drafter that was measured, and `drafter` says which.
    """
    drafters = list(dict.fromkeys(pair.drafted.drafter for pair in pairs))
    by_drafter = {
        drafter: {
            kind: _overall([p for p in chosen if p.drafted.drafter == drafter], comparisons)
            for kind, chosen in _by_kind(pairs).items()
        }
        for drafter in drafters
    }
    if not drafters:
        return {"drafter": None, "by_drafter": {}}
    headline = "auto" if "auto" in drafters else drafters[0]
    return {"drafter": headline, **by_drafter[headline], "by_drafter": by_drafter}


def _by_kind(pairs: Sequence[Pair]) -> dict[str, list[Pair]]:
    kinds: dict[str, list[Pair]] = {"greedy": [], "sampled": []}
    for pair in pairs:
        kinds["sampled" if pair.drafted.temperature > 0 else "greedy"].append(pair)
    return {kind: chosen for kind, chosen in kinds.items() if chosen}


def _overall(
    group: Sequence[Pair], comparisons: dict[tuple[object, ...], Comparison]
) -> dict[str, Any]:
    categories = dict.fromkeys(pair.category for pair in group)
    by_category = [speed_up([p for p in group if p.category == name]) for name in categories]
    known = [speed.paired.median for speed in by_category if speed]
    return {
        **_speed(group),
        "mean_of_categories": round(sum(known) / len(known), 3) if known else None,
        **_drafting(group),
        **_sameness(group, comparisons),
    }


def speed_up(group: Iterable[Pair]) -> Ratio | None:
    """Plain decode time / drafted decode time, each summed over the prompts of a repetition."""
    sums: dict[int, list[float]] = defaultdict(lambda: [0.0, 0.0, 0.0])
    for pair in group:
        if pair.measured:
            of_repeat = sums[pair.drafted.repeat]
            of_repeat[0] += pair.plain.answer.later
            of_repeat[1] += pair.drafted_seconds
            of_repeat[2] += pair.plain.answer.seconds
    if not sums or any(seconds <= 0 for _, *both in sums.values() for seconds in both):
        return None
    drafted = Spread(tuple(tokens / seconds for tokens, seconds, _ in sums.values()))
    plain = Spread(tuple(tokens / seconds for tokens, _, seconds in sums.values()))
    return ratio(drafted, plain)


def _speed(group: Sequence[Pair]) -> dict[str, Any]:
    """Speed-up and rates; None where no answer was longer than one token."""
    speed = speed_up(group)
    timed = [pair for pair in group if pair.measured]
    if speed is None:
        return {"speedup": None, "steady": None, "tok_s": None, "plain_tok_s": None}
    tokens = sum(pair.plain.answer.later for pair in timed)
    return {
        "speedup": speed.paired.to_json(3),
        "steady": speed.steady,
        "tok_s": round(tokens / sum(pair.drafted_seconds for pair in timed), 2),
        "plain_tok_s": round(tokens / sum(pair.plain.answer.seconds for pair in timed), 2),
    }


def _drafting(group: Sequence[Pair]) -> dict[str, Any]:
    """What the drafter proposed, and what of it was kept."""
    all_stats = [pair.drafted.answer.stats for pair in group]
    rounds = sum(stats.rounds for stats in all_stats)
    proposed = sum(stats.proposed for stats in all_stats)
    later = sum(pair.drafted.answer.later for pair in group)
    return {
        "tokens_per_round": round(later / rounds, 3) if rounds else None,
        "acceptance": (
            round(sum(stats.accepted for stats in all_stats) / proposed, 4) if proposed else None
        ),
        "acceptance_by_depth": _by_depth(group),
        "draft_ms_per_round": _per_round([stats.draft_ms for stats in all_stats], rounds),
        "verify_ms_per_round": _per_round([stats.verify_ms for stats in all_stats], rounds),
    }


def _per_round(times: Sequence[float], rounds: int) -> float | None:
    return round(sum(times) / rounds, 3) if rounds else None


def _by_depth(group: Sequence[Pair]) -> dict[str, dict[str, list[int]]]:
    """Source of a guess, then its depth, to [proposed, accepted]."""
    totals: dict[str, dict[str, list[int]]] = {}
    for pair in group:
        for source, depths in pair.drafted.answer.stats.acceptance.items():
            of_source = totals.setdefault(source, {})
            for depth, (proposed, accepted) in sorted(depths.items()):
                counts = of_source.setdefault(str(depth), [0, 0])
                counts[0] += proposed
                counts[1] += accepted
    return totals


def _sameness(
    group: Sequence[Pair], comparisons: dict[tuple[object, ...], Comparison]
) -> dict[str, Any]:
    """How many texts are those of plain decoding, and how far apart the others' choices were."""
    found = [comparisons[pair.key] for pair in group]
    gaps = [item.gap for item in found if item.gap is not None]
    return {
        "identical": all(item.same for item in found),
        "texts": len(found),
        "same_texts": sum(item.same for item in found),
        "near_ties": sum(item.near_tie for item in found),
        "largest_gap": round(max(gaps), 4) if gaps else None,
        "distinct_4grams": mean_of([distinct_share(p.plain.answer.tokens) for p in group]),
    }


def _schedule(group: Sequence[Pair]) -> str:
    """Schedules that were used, joined by ``+`` where the policy took more than one."""
    used = dict.fromkeys(pair.drafted.answer.stats.schedule for pair in group)
    return "+".join(used)


def distinct_share(tokens: Sequence[int]) -> float | None:
    """Share of an answer's runs of four tokens that are the first of their kind.

    A text that goes in circles is easy to draft; a gain on it says little about the drafter.
    """
    runs = [tuple(tokens[start : start + _RUN]) for start in range(len(tokens) - _RUN + 1)]
    return len(set(runs)) / len(runs) if runs else None


def mean_of(values: Sequence[float | None]) -> float | None:
    """Mean of what is known, or None."""
    known = [value for value in values if value is not None]
    return round(sum(known) / len(known), 3) if known else None
