"""Copying from the text so far: prompt lookup and input-guided aggressive decoding.

When the text ends as an earlier place of it went, what followed there is proposed. After an edit,
when the last one or two tokens differ from that place, the copy goes on behind the difference
(Ge et al. 2022, "Lossless Acceleration for Seq2seq Generation with Aggressive Decoding").
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from forerun.errors import OptionError
from forerun.runtime.drafting.hits import Guesses, HitRates
from forerun.runtime.drafting.suffix import SuffixIndex
from forerun.runtime.drafting.tree import TokenTree

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Sequence

    from forerun.runtime.drafting.drafter import Outcome

_LONGEST = 24
_PLACES = 96
_RIVAL = 4
_GAPS = (1, 2)
_GAP_MATCH = 3
_GAP_REACH = 8
# Chance that the next token is the copied one, by tokens that matched, as measured on answers of
# a small model; what is measured in use replaces it.
_PRIORS = ((2, 0.50), (3, 0.57), (4, 0.70), (6, 0.80), (9, 0.85), (14, 0.90), (_LONGEST, 0.96))
# What share of the remaining doubt goes when 1, 2, 3 or more places say the same.
_AGREEMENT = (0.0, 0.5, 0.7)
_FACTORS = {"copy": 1.0, "rivals": 0.55, "gap1": 0.8, "gap2": 0.4}


@dataclass(frozen=True)
class Copy:
    """A place to copy from.

    Attributes:
        start: position of the first token to copy.
        matched: tokens before it that equal the end of the text.
        how: ``copy``, ``rivals`` if another place as good goes on otherwise, ``gap1``, ``gap2``.
        places: how many places go on with the same token, at most 3.
    """

    start: int
    matched: int
    how: str = "copy"
    places: int = 1

    def kind(self, depth: int) -> tuple[str, int, int]:
        """What the hit rate of the token number `depth` is counted under."""
        how = "copy" if self.how == "rivals" and depth else self.how
        return how, _level(self.matched + depth), self.places


class NgramDrafter:
    """Proposes what followed the longest earlier match of the text's end.

    Args:
        min_match: tokens that must match.
        branches: different continuations to offer; above 1 the proposals are trees.
        resume: go on with a copy behind one or two tokens that differ.

    Raises:
        OptionError: an argument is out of range.
    """

    name = "ngram"
    needs_features = False

    def __init__(self, min_match: int = 2, branches: int = 1, resume: bool = True) -> None:
        if not 1 <= min_match <= _LONGEST or not 1 <= branches <= 8:
            raise OptionError(
                f"min_match must be in 1..{_LONGEST} and branches in 1..8, "
                f"got {min_match} and {branches}"
            )
        self.proposes_trees = branches > 1
        self._branches = branches
        self._resume = resume
        self._index = SuffixIndex(min_match)
        self._rates = HitRates(_prior)
        self._guesses = Guesses(self._rates)

    def begin(self, ids: Sequence[int], features: Any = None) -> None:
        """Take up a text; what it shares with the one before stays indexed."""
        self._index.replace(ids)

    def propose(self, budget: int, keep_going: Callable[[float], bool] | None = None) -> TokenTree:
        """Copy at most `budget` tokens; empty if nothing matches."""
        copies = self._copies() if budget > 0 else []
        if not copies:
            return TokenTree.EMPTY
        tokens: list[int] = []
        parents: list[int] = []
        kinds: list[Hashable] = []
        share = budget if len(copies) == 1 else max(budget // len(copies), 1)
        for number, copy in enumerate(copies):
            room = budget - share * (len(copies) - 1) if number == 0 else share
            parent = -1
            for depth, token in enumerate(self._copied(copy.start, room)):
                parents.append(parent)
                parent = len(tokens)
                tokens.append(token)
                kinds.append(copy.kind(depth))
            if len(tokens) >= budget:
                break
        confidences = tuple(map(self._rates.rate, kinds))
        sources = (self.name,) * len(tokens)
        tree = TokenTree(tuple(tokens), tuple(parents), confidences, sources)
        self._guesses.remember(self._index.ids, tree, kinds)
        return tree

    def observe(self, outcome: Outcome) -> None:
        """Append what was decided, and count which guesses were right."""
        before = len(self._index)
        self._index.extend(outcome.new_tokens)
        self._guesses.judge(self._index.ids, before)

    def rewind(self, length: int) -> None:
        """Forget the tokens from `length` on."""
        self._index.truncate(length)

    def close(self) -> None:
        """Nothing to free."""

    def _copies(self) -> list[Copy]:
        """Where to copy from, best first, with different first tokens."""
        best = self._longest(0)
        if not best and self._resume:
            for gap in _GAPS:
                best = self._resumed(gap)
                if best:
                    break
        return best[: self._branches]

    def _longest(self, gap: int) -> list[Copy]:
        """Earlier places like the text's end without its last `gap` tokens, longest first."""
        ids, order = self._index.ids, self._index.order
        last = len(ids) - 1 - gap
        if last < order:
            return []
        found: dict[int, Copy] = {}
        for end in self._index.ends(ids[last - order + 1 : last + 1], _PLACES):
            if end >= last:
                continue
            place = Copy(end + 1, _match(ids, end, last, order))
            same = found.get(ids[end + 1])
            if same is not None:
                longer = place if place.matched > same.matched else same
                place = replace(longer, places=min(same.places + 1, len(_AGREEMENT)))
            found[ids[end + 1]] = place
            if place.matched >= _LONGEST and place.places == len(_AGREEMENT):
                break
        copies = sorted(found.values(), key=lambda copy: (-copy.matched, -copy.start))
        rivals = sum(copy.matched >= min(copies[0].matched, _RIVAL) for copy in copies)
        return [replace(copy, how="rivals") for copy in copies] if rivals > 1 else copies

    def _resumed(self, gap: int) -> list[Copy]:
        """Places behind a difference of `gap` tokens at the end of the text."""
        copies = [copy for copy in self._longest(gap) if copy.matched >= _GAP_MATCH]
        if not copies:
            return []
        ids, start = self._index.ids, copies[0].start
        last = len(ids) - 1
        reach = ids[start : min(start + _GAP_REACH, last)]
        # The copy left something out and is back in step, or it says the same in other words.
        start += reach.index(ids[last]) + 1 if ids[last] in reach else gap
        return [Copy(start, 0, f"gap{gap}")] if start <= last else []

    def _copied(self, start: int, count: int) -> list[int]:
        """Tokens from `start` on; past the end of the text the copy feeds on itself."""
        out = self._index.ids[start : start + count]
        period = len(self._index) - start
        while len(out) < count:
            out.append(out[len(out) - period])
        return out


def _match(ids: list[int], end: int, last: int, known: int) -> int:
    """How many tokens up to `end` equal those up to `last`, of which `known` are known to."""
    count = known
    limit = min(_LONGEST, end + 1)
    while count < limit and ids[end - count] == ids[last - count]:
        count += 1
    return count


def _level(matched: int) -> int:
    """The step of `_PRIORS` a match belongs to."""
    return next((n for n, (most, _) in enumerate(_PRIORS) if matched <= most), len(_PRIORS) - 1)


def _prior(kind: Any) -> float:
    how, level, places = kind
    rate = _PRIORS[level][1]
    return _FACTORS[how] * (rate + (1 - rate) * _AGREEMENT[places - 1])
