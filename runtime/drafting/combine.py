"""Drafters made of drafters: the first that knows something, both at once, one behind the other."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, cast

from forerun.errors import OptionError
from forerun.runtime.drafting.drafter import Outcome
from forerun.runtime.drafting.tree import TokenTree

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np

    from forerun.runtime.drafting.drafter import Drafter, KeepGoing
    from forerun.runtime.types import SamplingParams


class _Combined:
    """What all combinations share: everything but a proposal goes to every part."""

    def __init__(self, *parts: Drafter) -> None:
        if len(parts) < 2:
            raise OptionError(f"a combination takes at least 2 drafters, got {len(parts)}")
        self.parts = parts
        self._length = 0
        self.needs_features = any(part.needs_features for part in parts)
        self.proposes_trees = any(part.proposes_trees for part in parts)
        self.name = "+".join(part.name for part in parts)

    def configure(self, params: SamplingParams, skipped: int = 0) -> None:
        """Tell the parts that draw how the target draws; see `configure`."""
        for part in self.parts:
            configure(part, params, skipped)

    def begin(self, ids: Sequence[int], features: np.ndarray | None) -> None:
        """Take up a text."""
        self._length = len(ids)
        for part in self.parts:
            part.begin(ids, features)

    def observe(self, outcome: Outcome) -> None:
        """Tell every part; each picks out what it proposed itself."""
        self._length += len(outcome.new_tokens)
        for part in self.parts:
            part.observe(outcome)

    def rewind(self, length: int) -> None:
        """Forget the tokens from `length` on."""
        self._length = min(self._length, length)
        for part in self.parts:
            part.rewind(length)

    def close(self) -> None:
        """Close every part."""
        for part in self.parts:
            part.close()


class Fallback(_Combined):
    """The first drafter with something to say.

    Args:
        *parts: drafters, cheap ones first.
        least: confidence of the first token under which a proposal gives way to a later drafter's.
            If none reaches it, the first proposal of the largest first confidence is taken.

    Raises:
        OptionError: fewer than two drafters, or `least` is not from 0 to 1.
    """

    def __init__(self, *parts: Drafter, least: float = 0.0) -> None:
        super().__init__(*parts)
        if not 0 <= least <= 1:
            raise OptionError(f"least must be from 0 to 1, got {least}")
        self._least = least

    def propose(self, budget: int, keep_going: KeepGoing | None = None) -> TokenTree:
        """Ask one after the other."""
        best = TokenTree.EMPTY
        for part in self.parts:
            tree = part.propose(budget, keep_going)
            if _surety(tree) > _surety(best):
                best = tree
            if len(best) and _surety(best) >= self._least:
                break
        return best


class Union(_Combined):
    """What all drafters say, in one tree, equal paths merged.

    Every part may fill the budget; the nodes of least value are dropped.

    Args:
        *parts: at least two drafters.
    """

    def __init__(self, *parts: Drafter) -> None:
        super().__init__(*parts)
        self.proposes_trees = True

    def propose(self, budget: int, keep_going: KeepGoing | None = None) -> TokenTree:
        """Ask every part and keep the best `budget` nodes."""
        merged = TokenTree.EMPTY
        for part in self.parts:
            merged = merged.union(part.propose(budget, keep_going))
        return merged.limited(budget, budget)


class Chain(_Combined):
    """A horizontal cascade: the better drafter guesses first, the cheaper one goes on behind it.

    Args:
        first: guesses the first `count` tokens.
        count: at most that many of them.
        then: goes on behind the last node of the first one's best chain. It must take tokens
            back at little cost, as the drafters without a model do.

    Raises:
        OptionError: the count is not positive.
    """

    def __init__(self, first: Drafter, count: int, then: Drafter) -> None:
        super().__init__(first, then)
        if count < 1:
            raise OptionError(f"the first drafter must guess at least 1 token, got {count}")
        self._count = count

    def propose(self, budget: int, keep_going: KeepGoing | None = None) -> TokenTree:
        """Join the two proposals."""
        first, then = self.parts
        head = first.propose(min(self._count, budget), keep_going)
        if len(head) >= budget:
            return head
        stem = head.best_chain()
        tail = propose_behind(then, self._length, stem.tokens, budget - len(head), keep_going)
        return head.union(_joined(stem, tail))


def propose_behind(
    drafter: Drafter,
    length: int,
    ahead: Sequence[int],
    budget: int,
    keep_going: KeepGoing | None = None,
) -> TokenTree:
    """What a drafter proposes behind `length` committed ids and unverified ones, taken back after.

    Raises whatever the drafter raises; its text is cut back all the same.
    """
    if not ahead:
        return drafter.propose(budget, keep_going)
    try:
        drafter.observe(Outcome(TokenTree.EMPTY, (), tuple(ahead), ()))
        return drafter.propose(budget, keep_going)
    finally:
        drafter.rewind(length)


def configure(drafter: Drafter, params: SamplingParams, skipped: int = 0) -> None:
    """Tell a drafter how the target draws, if it draws itself; call it before `begin`.

    Args:
        drafter: any; those without a model need not know.
        params: of the generation.
        skipped: how many tokens were dropped from the text before, so that the token behind n
            committed ids has the position n + skipped.
    """
    setter = getattr(drafter, "configure", None)
    if setter is not None:
        setter(params, skipped)


class Reader(Protocol):
    """A drafter with a model that can read several guessed tokens in one step."""

    name: str
    needs_features: bool
    proposes_trees: bool

    def advance(self, ahead: Sequence[int], guess: Sequence[int]) -> tuple[list[int], list[float]]:
        """Its own tokens behind committed ids + `ahead`, as long as they equal the guess, and one.

        Returns:
            Ids and confidences, from none (it cannot draft here) to len(guess) + 1 of them.
        """
        ...


class Speculative(_Combined):
    """A vertical cascade: a draft model that is itself sped up by a cheaper drafter.

    The model verifies the cheaper drafter's guesses in steps of several rows and proposes what it
    would have proposed alone.

    Args:
        model: drafts, see `Reader`.
        helper: guesses what the model will draft; must take tokens back at little cost.
        most: tokens it may guess at once.

    Raises:
        OptionError: `most` is not positive, or the model cannot read guesses.
    """

    def __init__(self, model: Drafter, helper: Drafter, most: int = 6) -> None:
        super().__init__(model, helper)
        if most < 1 or not hasattr(model, "advance"):
            raise OptionError(
                f"{model.name} must be a drafter with a model of its own, and the guesses at "
                f"least 1, got {most}"
            )
        self._reader = cast("Reader", model)
        self._most = most
        self.proposes_trees = False

    def propose(self, budget: int, keep_going: KeepGoing | None = None) -> TokenTree:
        """The model's chain."""
        helper = self.parts[1]
        tokens: list[int] = []
        confidences: list[float] = []
        value = 1.0
        while len(tokens) < budget:
            if tokens and keep_going is not None and not keep_going(value):
                break
            room = min(self._most, budget - len(tokens) - 1)
            guess = _chain_behind(helper, self._length, tokens, room)
            new, sure = self._reader.advance(tokens, guess)
            if not new:
                break
            tokens += new
            confidences += sure
            for confidence in sure:
                value *= confidence
        return TokenTree.chain(tokens, confidences, self._reader.name)


def _chain_behind(helper: Drafter, length: int, tokens: list[int], room: int) -> tuple[int, ...]:
    if room < 1:
        return ()
    return propose_behind(helper, length, tokens, room).best_chain().tokens


def _joined(stem: TokenTree, tail: TokenTree) -> TokenTree:
    """`tail` behind the last node of a chain."""
    count = len(stem)
    return TokenTree(
        stem.tokens + tail.tokens,
        stem.parents + tuple(parent + count for parent in tail.parents),
        stem.confidences + tail.confidences,
        stem.sources + tail.sources,
    )


def _surety(tree: TokenTree) -> float:
    """Confidence in the best first token; -1 of an empty tree."""
    firsts = zip(tree.parents, tree.confidences, strict=True)
    return max((c for parent, c in firsts if parent == -1), default=-1.0)
