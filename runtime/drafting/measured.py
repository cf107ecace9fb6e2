"""The policy: draft and verify as many tokens as measured costs and acceptance make worth it."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

from forerun.runtime.drafting.account import Account
from forerun.runtime.drafting.tree import TokenTree

if TYPE_CHECKING:
    from collections.abc import Sequence

    from forerun.runtime.drafting.guide import Guide

MOST_NODES = 16
_MARGIN = 1.02
_SMOOTH = 0.05
# Until it is known what a draft step costs, a drafter that takes such steps takes few.
_FIRST_DRAFT = 2
# Drafting pauses when this many proposals in a row took noticeable time and were not worth a row.
_REFUSALS, _NOTICEABLE = 3, 0.03


def kept(tree: TokenTree, order: Sequence[int], count: int) -> TokenTree:
    """The tree of the first `count` nodes in an order that has parents before children."""
    if count == len(tree.tokens):
        return tree
    if not count:
        return TokenTree.EMPTY
    if count == 1 + max(order[:count]):
        return TokenTree(
            tree.tokens[:count],
            tree.parents[:count],
            tree.confidences[:count],
            tree.sources[:count],
        )
    return tree.take(order[:count])


class MeasuredPolicy:
    """Verify the n nodes with the most tokens per second; none if plain decoding is as fast.

    The value of a node is the product of the calibrated acceptances on its path. What a round may
    lose if all of it is wrong is bounded by an `Account`, so that a drafter whose quality is
    unknown starts with few tokens, and a bad one is asked less and less often.

    Args:
        guide: costs and acceptance; shared with an `AutoDrafter` if there is one.
        most: largest number of nodes.
    """

    name = "measured"

    def __init__(self, guide: Guide, most: int = MOST_NODES) -> None:
        self.guide = guide
        self.account = Account()
        self._most = min(most, guide.costs.most - 1)
        self._proposed, self._spent = TokenTree.EMPTY, 0.0
        self._tokens, self._time = 1.0, 0.0
        self._draft_step = 0.0
        self._refused = 0
        self._asked = 0
        self._said = 1.0
        self._expected = 1.0
        self._source = ""

    def budget(self, depth: int) -> int:
        """How many nodes to ask the drafter for; 0 while drafting pauses."""
        self._asked, self._said, self._expected = 0, 1.0, 1.0
        self._proposed = TokenTree.EMPTY
        if self.account.paused:
            return 0
        rows = self._affordable(depth)
        if not rows or self._refused >= _REFUSALS:
            self._pause(depth)
            return 0
        return rows

    def keep_going(self, drafted: int, value: float, depth: int) -> bool:
        """Whether one more node is worth its draft step and its row.

        Args:
            drafted: nodes so far, a chain.
            value: of the last of them, the product of the drafter's confidences.
            depth: cached tokens.
        """
        if drafted >= (self._most if self._draft_step else _FIRST_DRAFT):
            return False
        calibration, source = self.guide.calibration, self._source
        self._expected *= calibration.rate(source, drafted, self._confidence(value))
        curve = self.guide.costs.curve(depth)
        cost = self._draft_step + curve[drafted + 2] - curve[drafted + 1]
        gain = self._expected * calibration.mean(source, drafted + 1)
        return gain > self._rate(curve[1]) * cost

    def prune(self, tree: TokenTree, draft_seconds: float, depth: int) -> TokenTree:
        """The nodes to verify; none if a plain step gives more tokens per second.

        Args:
            tree: as proposed.
            draft_seconds: time the proposal took.
            depth: cached tokens.
        """
        self._proposed, self._spent = tree, draft_seconds
        if not tree.tokens:
            return tree
        if self._asked:
            self._source = tree.sources[-1]
        order, values = self._ranked(tree)
        count = self._count(values, draft_seconds, depth)
        return kept(tree, order, count)

    def observe(
        self,
        tree: TokenTree,
        path: Sequence[int],
        draft_seconds: float,
        verify_seconds: float,
        depth: int,
        new_tokens: Sequence[int] = (),
    ) -> None:
        """Learn from a round, plain ones too.

        Args:
            tree: what was verified, i.e. what `prune` returned.
            path: its accepted nodes.
            draft_seconds: time the proposal took.
            verify_seconds: time of the target's step.
            depth: cached tokens before the round.
            new_tokens: what the round gave. With them, pruned nodes are judged too, at no cost.
        """
        rows, tokens = len(tree.tokens) + 1, len(path) + 1
        costs = self.guide.costs
        costs.observe(rows, depth, verify_seconds)
        if new_tokens:
            self.guide.calibration.judge(self._proposed, new_tokens)
        else:
            self.guide.calibration.observe(tree, path)
        curve = costs.curve(depth)
        # The model's time, not the clock's: a hiccup of the machine is not the drafter's fault.
        seconds = draft_seconds + (curve[rows] if rows < len(curve) else verify_seconds)
        self.account.settle(tokens, seconds / curve[1])
        self._tokens += _SMOOTH * (tokens - self._tokens)
        self._time = seconds if not self._time else self._time + _SMOOTH * (seconds - self._time)
        if tree.tokens:
            self._refused = 0
        elif self._proposed.tokens and self._spent > _NOTICEABLE * curve[1]:
            self._refused += 1
        if self._asked:
            self._note_draft(self._spent / max(self._asked, len(self._proposed.tokens)))
            self._asked = 0

    def _ranked(self, tree: TokenTree) -> tuple[list[int], list[float]]:
        return self.guide.ranked(tree)

    def _confidence(self, value: float) -> float:
        """The drafter's confidence in its last node, from the products up to it."""
        before, self._said = self._said, value
        self._asked += 1
        return min(value / before, 1.0) if before > 0 else 0.0

    def _count(self, values: list[float], draft_seconds: float, depth: int) -> int:
        """n*: the draft is made already, so plain decoding is beaten without its time."""
        affordable = self._affordable(depth)
        count, _ = self.guide.best(values, draft_seconds, depth, affordable)
        curve = self.guide.costs.curve(depth)
        tokens = 1.0 + sum(values[:count])
        return count if tokens * curve[1] > _MARGIN * curve[count + 1] else 0

    def _affordable(self, depth: int) -> int:
        """Nodes that the account can bear to be wrong."""
        curve = self.guide.costs.curve(depth)
        bound, step = (1 + self.account.credit) * curve[1], self._draft_step
        rows = self._most
        while rows and curve[rows + 1] + rows * step > bound:
            rows -= 1
        return rows

    def _pause(self, depth: int) -> None:
        curve = self.guide.costs.curve(depth)
        self._refused = 0
        self.account.pause((curve[2] + self._draft_step) / curve[1] - 1)

    def _rate(self, plain: float) -> float:
        """Tokens per second at present, not less than plain decoding gives."""
        return max(1.0 / plain, self._tokens / self._time if self._time else 0.0)

    def _note_draft(self, seconds: float) -> None:
        known = self._draft_step
        self._draft_step = seconds if not known else known + 0.1 * (seconds - known)


class ThompsonPolicy(MeasuredPolicy):
    """The same rule with acceptances drawn from their Beta laws, as in EESD.

    Uncertain bins are tried now and then, which a mean never does. Draws come from a fixed seed;
    they decide how much is verified, never what the text says.
    """

    name = "thompson"

    def __init__(self, guide: Guide, most: int = MOST_NODES, seed: int = 0) -> None:
        super().__init__(guide, most)
        self._noise = random.Random(seed)

    def keep_going(self, drafted: int, value: float, depth: int) -> bool:
        """Go on with the drawn chance that the last node is right (EESD's Bernoulli draw)."""
        if drafted >= (self._most if self._draft_step else _FIRST_DRAFT):
            return False
        said = self._confidence(value)
        chance = self.guide.calibration.draw(self._source, drafted, said, self._noise)
        return self._noise.random() < chance

    def _ranked(self, tree: TokenTree) -> tuple[list[int], list[float]]:
        return self.guide.ranked(tree, self._noise)
