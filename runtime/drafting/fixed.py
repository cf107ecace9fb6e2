"""How much to draft: what a policy decides, and the one that always asks for the same."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from forerun.runtime.drafting.tree import TokenTree

DEFAULT_BUDGET = 4


class DraftPolicy(Protocol):
    """Decides how many tokens a round drafts and verifies. Depth: tokens in the KV cache."""

    def budget(self, depth: int) -> int:
        """Most nodes to ask the drafter for; 0 makes this round a plain step."""
        ...

    def keep_going(self, drafted: int, value: float, depth: int) -> bool:
        """Whether a next node of this value is worth drafting behind `drafted` ones."""
        ...

    def prune(self, tree: TokenTree, draft_seconds: float, depth: int) -> TokenTree:
        """The part of a tree that is worth verifying, which may be nothing."""
        ...

    def observe(
        self,
        tree: TokenTree,
        path: Sequence[int],
        draft_seconds: float,
        verify_seconds: float,
        depth: int,
        new_tokens: Sequence[int] = (),
    ) -> None:
        """Take note of a round, a plain one too.

        Args:
            tree: what was verified.
            path: its accepted nodes.
            draft_seconds: time the drafter took, with what it took to tell it of the round.
            verify_seconds: time of the model's step.
            depth: tokens in the KV cache before the round.
            new_tokens: what the round gave.
        """
        ...


@dataclass(frozen=True)
class FixedPolicy:
    """Asks for the same number of tokens in every round and verifies all of them.

    Attributes:
        nodes: that number.
    """

    nodes: int = DEFAULT_BUDGET

    def budget(self, depth: int) -> int:
        """See `DraftPolicy.budget`."""
        return self.nodes

    def keep_going(self, drafted: int, value: float, depth: int) -> bool:
        """See `DraftPolicy.keep_going`."""
        return True

    def prune(self, tree: TokenTree, draft_seconds: float, depth: int) -> TokenTree:
        """See `DraftPolicy.prune`."""
        return tree

    def observe(
        self,
        tree: TokenTree,
        path: Sequence[int],
        draft_seconds: float,
        verify_seconds: float,
        depth: int,
        new_tokens: Sequence[int] = (),
    ) -> None:
        """A fixed policy learns nothing."""
