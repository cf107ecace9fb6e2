"""Drafting and verifying in turn: one round after another on one cache."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from forerun.runtime.drafting.accept import AcceptRule, Pick, Walk
from forerun.runtime.drafting.drafter import Drafter, KeepGoing, Outcome
from forerun.runtime.drafting.fixed import DraftPolicy
from forerun.runtime.drafting.follower import Follower, blamed, check_tokens
from forerun.runtime.drafting.tally import DraftTally
from forerun.runtime.drafting.tree import TokenTree
from forerun.runtime.prefix import PrefixCache
from forerun.runtime.types import SamplingParams

__all__ = ["DraftRounds", "Rounds", "Said", "Verified", "blamed", "check_tokens", "verify"]

# A step's widest verification; wider ones pay on no device, and buffers stay small.
MAX_NODES = 64

Said = list[tuple[int, np.ndarray]]
"""What a round gave: tokens with the logits float32 [V] they were chosen from."""


class Rounds(Protocol):
    """A schedule of drafting and verifying, for one generation.

    Attributes:
        tally: what was drafted and accepted so far.
    """

    tally: DraftTally

    def round(self, tokens: Sequence[int], pick: Pick, room: int) -> Said:
        """Say what follows the text.

        Args:
            tokens: the text, one more than is cached.
            pick: the model's choice at a row, see `AcceptRule.walk`.
            room: most tokens to say, at least 1.

        Returns:
            At least one token, none only if the generation was cancelled before the step. The
            logits are valid until the next round.
        """
        ...

    def restart(self, skipped: int) -> None:
        """Text was dropped (a slide): the drafter takes up the rest anew in the next round.

        Args:
            skipped: tokens dropped so far; the noise of the token behind n others is that of
                position n + skipped.
        """
        ...

    def finish(self, length: int) -> None:
        """End, whatever happened; of the text, `length` tokens are kept."""
        ...


@dataclass(frozen=True)
class Verified:
    """A tree that the model has seen.

    Attributes:
        walk: what was accepted.
        tokens: the accepted tokens, then the model's own.
        row_tokens: ids of the rows that ran.
        logits: float32 [rows, V].
        seconds: time of the step.
    """

    walk: Walk
    tokens: tuple[int, ...]
    row_tokens: tuple[int, ...]
    logits: np.ndarray
    seconds: float

    def said(self) -> Said:
        """Each token with the row it was chosen from."""
        rows = (0, *(node + 1 for node in self.walk.path))
        return [(token, self.logits[row]) for token, row in zip(self.tokens, rows, strict=True)]


def verify(
    cache: PrefixCache, rule: AcceptRule, anchor: int, tree: TokenTree, pick: Pick
) -> Verified:
    """Run a tree behind the anchor in one step; the accepted rows stay cached.

    Chains run on the plain graph; trees need one with a mask.
    """
    rows = (anchor, *tree.tokens)
    is_chain = tree.is_chain
    started = time.perf_counter()
    logits = cache.try_rows(rows, None if is_chain else tree.row_parents())
    seconds = time.perf_counter() - started
    walk = rule.walk(tree, logits, pick)
    accepted = [tree.tokens[node] for node in walk.path]
    kept_rows = None if is_chain else [0, *(node + 1 for node in walk.path)]
    cache.accept([anchor, *accepted], kept_rows)
    return Verified(walk, (*accepted, walk.next_token), rows, logits, seconds)


class DraftRounds:
    """The serial schedule: draft, then verify, on the same thread.

    Args:
        cache: the model and what its KV cache holds.
        drafter: guesses.
        policy: how much.
        rule: what of it becomes text.
        params: how the model's tokens are drawn, for drafters that draw theirs alike.
        trees: whether the model may verify trees; otherwise their best chain is taken.
        cancelled: tells whether the generation is to end.
    """

    def __init__(
        self,
        cache: PrefixCache,
        drafter: Drafter,
        policy: DraftPolicy,
        rule: AcceptRule,
        *,
        params: SamplingParams | None = None,
        trees: bool = True,
        cancelled: Callable[[], bool] = lambda: False,
    ) -> None:
        self.tally = DraftTally()
        self._cache, self._drafter, self._policy, self._rule = cache, drafter, policy, rule
        self._trees, self._cancelled = trees, cancelled
        self._vocab = cache.runner.manifest.model.vocab
        self._follower = Follower(drafter, cache, params or SamplingParams())

    def round(self, tokens: Sequence[int], pick: Pick, room: int) -> Said:
        """See `Rounds.round`.

        Raises:
            DrafterError: the drafter failed.
        """
        depth = len(self._cache.ids)
        started = time.perf_counter()
        self._follower.begin(tokens)
        begun = time.perf_counter()
        tree = self._draft(depth, room)
        drafting = time.perf_counter() - begun
        tree = self._policy.prune(tree, drafting, depth)
        if self._cancelled():
            return []
        done = verify(self._cache, self._rule, tokens[-1], tree, pick)
        drafting += self._observe(tree, done)
        self.tally.draft_seconds += begun - started
        self._note(tree, done, drafting, depth)
        return done.said()

    def restart(self, skipped: int) -> None:
        """See `Rounds.restart`."""
        self._follower.restart(skipped)

    def finish(self, length: int) -> None:
        """See `Rounds.finish`."""
        self._follower.finish(length)

    def _draft(self, depth: int, room: int) -> TokenTree:
        """What the drafter proposes, cut to what fits into the context and the answer."""
        # One row is the anchor's; and the last token of the answer is the model's own.
        budget = min(self._cache.capacity - depth - 1, MAX_NODES)
        if room > 1 and budget > 0:
            budget = min(budget, self._policy.budget(depth))
        if room <= 1 or budget <= 0:
            return TokenTree.EMPTY
        if not (self._trees and self._drafter.proposes_trees):
            budget = min(budget, room - 1)
        with self._follower.asking():
            tree = self._drafter.propose(budget, self._keep_going(depth))
            check_tokens(tree, self._vocab)
        tree = tree if self._trees else tree.best_chain()
        return tree.limited(budget, room - 1)

    def _keep_going(self, depth: int) -> KeepGoing:
        drafted = 0

        def keep_going(value: float) -> bool:
            nonlocal drafted
            drafted += 1
            return not self._cancelled() and self._policy.keep_going(drafted, value, depth)

        return keep_going

    def _observe(self, tree: TokenTree, done: Verified) -> float:
        """Tell the drafter; returns the seconds it took."""
        started = time.perf_counter()
        features = self._cache.runner.features() if self._drafter.needs_features else None
        self._follower.observe(
            Outcome(tree, done.walk.path, done.tokens, done.row_tokens, done.logits, features)
        )
        return time.perf_counter() - started

    def _note(self, tree: TokenTree, done: Verified, drafting: float, depth: int) -> None:
        tally = self.tally
        tally.add_round(tree, done.walk.path, depth)
        tally.overruled += done.walk.overruled
        tally.draft_seconds += drafting
        tally.verify_seconds += done.seconds
        path, tokens = done.walk.path, done.tokens
        self._policy.observe(tree, path, drafting, done.seconds, depth, tokens)
