"""Overlapped schedules: the drafter runs ahead on its own thread while the target verifies.

Each round runs the anchor and a block of drafted tokens through the target, and at the same time
drafts behind that block, as if it were right (PEARL, Liu 2024). If it was, and the target's next
token is the first one of what was drafted meanwhile, the rest of that is the next block, and the
drafter's time was hidden. If not, it is dropped, and the next round has either no block (PEARL) or
one that is drafted while the target waits (optimistic). When the first token is doubtful, several
short chains can be drafted instead of a long one (DuoDecoding, Lv 2025).

No call is under way between two rounds, whatever ended the round before.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from forerun.errors import UnsupportedError
from forerun.runtime.drafting.accept import AcceptRule, Pick
from forerun.runtime.drafting.ahead import AheadDrafter, BlockDraft
from forerun.runtime.drafting.drafter import Drafter, Outcome
from forerun.runtime.drafting.fixed import DraftPolicy
from forerun.runtime.drafting.follower import Follower, check_tokens
from forerun.runtime.drafting.pace import Pace
from forerun.runtime.drafting.rounds import MAX_NODES, Said, Verified, verify
from forerun.runtime.drafting.tally import DraftTally
from forerun.runtime.drafting.tree import TokenTree
from forerun.runtime.drafting.worker import Worker
from forerun.runtime.prefix import PrefixCache
from forerun.runtime.types import SamplingParams

# The first token of a branch stands for the target's own one: alone it saves nothing.
_LEAST_BRANCH = 2


@dataclass(frozen=True)
class Overlap:
    """How one overlapped schedule differs from the others.

    Attributes:
        forks: draft several chains when the first token is doubtful.
        redrafts: after a miss draft a block at once, while the target waits.
    """

    forks: bool = False
    redrafts: bool = False


@dataclass
class AheadCounts:
    """What running ahead gave.

    Attributes:
        tries: rounds whose whole block was right, so that the branches behind it counted.
        hits: how often one of them began with the target's next token.
        drafts: how often it drafted while the target verified.
        lengths: tokens of the best branch of each of these, added up.
        steps: draft steps that were run, those that were dropped included.
        steps_beside: those of them that were run while the target verified.
        behind: seconds by which these drafts took longer than the verification beside them.
        redrafts: seconds of the drafts that the target waited for from their start.
    """

    tries: int = 0
    hits: int = 0
    drafts: int = 0
    lengths: int = 0
    steps: int = 0
    steps_beside: int = 0
    behind: float = 0.0
    redrafts: float = 0.0


class AsyncRounds:
    """An overlapped schedule, for one generation; the interface is `rounds.Rounds`.

    Args:
        cache: the model and what its KV cache holds.
        drafter: guesses; it must be able to run ahead and have a device of its own.
        policy: whether to draft, and how many tokens of a block to verify.
        rule: what of a block becomes text.
        overlap: which schedule.
        params: how the model's tokens are drawn, for drafters that draw theirs alike.
        length: tokens to draft in a round; None takes as many as fit into a verification.
        cancelled: tells whether the generation is to end.

    Raises:
        UnsupportedError: the drafter cannot run ahead.

    Attributes:
        tally: what was drafted and accepted so far.
        ahead: what of it was done ahead.
    """

    def __init__(
        self,
        cache: PrefixCache,
        drafter: Drafter,
        policy: DraftPolicy,
        rule: AcceptRule,
        overlap: Overlap,
        *,
        params: SamplingParams | None = None,
        length: int | None = None,
        cancelled: Callable[[], bool] = lambda: False,
    ) -> None:
        self.tally = DraftTally()
        self.ahead = AheadCounts()
        self._cache, self._policy, self._rule = cache, policy, rule
        self._drafter = check_ahead(drafter)
        self._overlap, self._length, self._cancelled = overlap, length, cancelled
        self._vocab = cache.runner.manifest.model.vocab
        self._pace = Pace()
        self._worker: Worker | None = None
        self._block = TokenTree.EMPTY
        self._follower = Follower(drafter, cache, params or SamplingParams())
        self._verdict: Verified | None = None
        self._stopped = False

    def round(self, tokens: Sequence[int], pick: Pick, room: int) -> Said:
        """See `Rounds.round`.

        Raises:
            DrafterError: the drafter failed.
        """
        depth = len(self._cache.ids)
        started = time.perf_counter()
        self._follower.begin(tokens)
        length = self._draft_length(depth, room)
        block = self._next_block(length, depth, room)
        if self._cancelled():
            return []
        # Behind a block that is right comes the target's own token, then the next block.
        further = min(length + self._overlap.redrafts, room - len(block) - 1)
        done = self._race(tokens[-1], block, pick, further)
        waited = time.perf_counter() - started - done.seconds
        self._follower.observe(Outcome(block, done.walk.path, done.tokens, done.row_tokens))
        self._note(block, done, waited, depth)
        return done.said()

    def restart(self, skipped: int) -> None:
        """See `Rounds.restart`."""
        self._block = TokenTree.EMPTY
        self._follower.restart(skipped)

    def finish(self, length: int) -> None:
        """See `Rounds.finish`; ends the drafter's thread."""
        self._stopped = True
        worker, self._worker = self._worker, None
        if worker is not None:
            worker.close()
        self._block = TokenTree.EMPTY
        if self._follower.known:
            # Even if it knows of no more committed text: it ran ahead of that.
            with self._follower.asking():
                self._drafter.rewind(length)
        self._follower.finish(length)

    def _draft_length(self, depth: int, room: int) -> int:
        """Tokens of a block, 0 for a plain step."""
        space = min(self._cache.capacity - depth - 1, room - 1, MAX_NODES)
        budget = self._policy.budget(depth) if space > 0 else 0
        if budget <= 0:
            return 0
        if self._length is not None:
            return min(self._length, space)
        return min(budget, space, self._pace.length() - self._overlap.redrafts)

    def _next_block(self, length: int, depth: int, room: int) -> TokenTree:
        """What to verify: what was drafted ahead, or what is drafted now, or nothing."""
        block, self._block = self._block, TokenTree.EMPTY
        if not length:
            return TokenTree.EMPTY
        before = self.ahead.redrafts
        if not len(block) and self._overlap.redrafts:
            block = self._redraft(length, depth)
        space = min(self._cache.capacity - depth - 1, room - 1)
        # What was drafted beside a verification cost the target no time.
        waited = self.ahead.redrafts - before
        return self._policy.prune(block.limited(space, space), waited, depth)

    def _redraft(self, length: int, depth: int) -> TokenTree:
        drafted = 0

        def go_on(value: float) -> bool:
            nonlocal drafted
            drafted += 1
            return not self._cancelled() and self._policy.keep_going(drafted, value, depth)

        draft = BlockDraft(self._drafter, (), go_on)
        with self._follower.asking():
            self._thread().submit(lambda: draft.chain(length)).result()
        self._count(draft)
        self.ahead.redrafts += draft.seconds
        branch = draft.branches[0] if draft.branches else None
        return self._as_tree(branch.tokens, branch.confidences) if branch else TokenTree.EMPTY

    def _race(self, anchor: int, block: TokenTree, pick: Pick, length: int) -> Verified:
        """Verify the block and draft behind it at the same time; sets the next block."""
        if length < _LEAST_BRANCH:
            return verify(self._cache, self._rule, anchor, block, pick)
        self._verdict, self._stopped = None, False
        draft = BlockDraft(self._drafter, block.tokens, lambda value: self._go_on(draft, block))
        make = draft.forked if self._overlap.forks else draft.chain
        job = self._thread().submit(lambda: make(length))
        try:
            self._verdict = done = verify(self._cache, self._rule, anchor, block, pick)
        finally:
            self._stopped = self._verdict is None
            job.wait()
        with self._follower.asking():
            job.result()
        self._count(draft)
        self.ahead.drafts += 1
        self.ahead.steps_beside += draft.steps
        self.ahead.lengths += max(map(len, draft.branches), default=0)
        self.ahead.behind += max(draft.seconds - done.seconds, 0.0)
        self._pace.note(done.seconds, draft.seconds, draft.steps)
        self._block = self._adopt(draft, block, done)
        return done

    def _go_on(self, draft: BlockDraft, block: TokenTree) -> bool:
        """On the drafter's thread: whether another step can still be of use."""
        if self._stopped or self._cancelled():
            return False
        done = self._verdict
        if done is None:
            return True
        # The target waits from here on. That pays only if the alternative is to wait longer.
        return self._overlap.redrafts and self._followed(draft, block, done) is not None

    def _followed(self, draft: BlockDraft, block: TokenTree, done: Verified) -> int | None:
        """Number of the branch that the target went along."""
        if len(done.walk.path) < len(block):
            return None
        firsts = [branch.tokens[0] for branch in draft.branches]
        return firsts.index(done.tokens[-1]) if done.tokens[-1] in firsts else None

    def _adopt(self, draft: BlockDraft, block: TokenTree, done: Verified) -> TokenTree:
        if len(done.walk.path) < len(block):
            return TokenTree.EMPTY
        number = self._followed(draft, block, done)
        self.ahead.tries += 1
        self.ahead.hits += number is not None
        if number is None:
            return TokenTree.EMPTY
        branch = draft.branches[number]
        return self._as_tree(branch.tokens[1:], branch.confidences[1:])

    def _as_tree(self, tokens: Sequence[int], confidences: Sequence[float]) -> TokenTree:
        tree = TokenTree.chain(tokens, confidences, self._drafter.name)
        with self._follower.asking():
            check_tokens(tree, self._vocab)
        return tree

    def _note(self, block: TokenTree, done: Verified, waited: float, depth: int) -> None:
        tally = self.tally
        tally.add_round(block, done.walk.path, depth)
        tally.overruled += done.walk.overruled
        tally.verify_seconds += done.seconds
        path, tokens = done.walk.path, done.tokens
        self._policy.observe(block, path, waited, done.seconds, depth, tokens)

    def _count(self, draft: BlockDraft) -> None:
        self.tally.draft_seconds += draft.seconds
        self.ahead.steps += draft.steps

    def _thread(self) -> Worker:
        if self._worker is None:
            self._worker = Worker(f"drafter {self._drafter.name}")
        return self._worker


def check_ahead(drafter: Drafter) -> AheadDrafter:
    """The drafter, if it can run ahead.

    Raises:
        UnsupportedError: it cannot.
    """
    if isinstance(drafter, AheadDrafter) and not drafter.needs_features:
        return drafter
    raise UnsupportedError(
        f"the drafter {drafter.name} cannot draft behind unverified text; load the model with "
        "the schedule serial, or take a draft model"
    )
