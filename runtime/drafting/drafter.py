"""What a drafter is, and what it is told about a verified round."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from forerun.runtime.drafting.tree import TokenTree

KeepGoing = Callable[[float], bool]


@dataclass(frozen=True)
class Outcome:
    """One verified round. The arrays are valid only while `Drafter.observe` runs.

    Attributes:
        tree: what was verified; empty after a plain step.
        path: nodes of the tree that were accepted, from a child of the anchor on.
        new_tokens: the accepted tokens and the model's own next one.
        row_tokens: ids of the rows that ran: the anchor, then the tree's tokens.
        logits: float32 [rows, V] of those rows.
        features: float32 [rows, F], the model's tapped hidden states of those rows; None if the
            bundle has none.
    """

    tree: TokenTree
    path: tuple[int, ...]
    new_tokens: tuple[int, ...]
    row_tokens: tuple[int, ...]
    logits: np.ndarray | None = None
    features: np.ndarray | None = None


class Drafter(Protocol):
    """Guesses what follows. The committed ids are the text so far, the anchor last.

    A drafter may guess anything at all: the accept rule decides what becomes text. It is used by
    one generation at a time.
    """

    @property
    def name(self) -> str:
        """What it is called in options and statistics."""
        ...

    @property
    def needs_features(self) -> bool:
        """Whether `begin` and `observe` must be given the model's hidden states."""
        ...

    @property
    def proposes_trees(self) -> bool:
        """Whether it may propose anything but chains."""
        ...

    def begin(self, ids: Sequence[int], features: np.ndarray | None) -> None:
        """Take up a new text. Cheap when `ids` extend what is known already, as in a chat.

        Args:
            ids: the committed ids: the prompt and the first token of the answer.
            features: float32 [n, F] of the last n rows that ran before the anchor, those of
                ids[-1 - n : -1]; None if there are none.
        """
        ...

    def propose(self, budget: int, keep_going: KeepGoing | None = None) -> TokenTree:
        """Guess what follows the committed ids.

        Args:
            budget: most nodes.
            keep_going: for drafters whose every further token costs time: called with the value
                of the next node (the product of confidences up to it) before it is drafted; they
                end the draft when it says False.
        """
        ...

    def observe(self, outcome: Outcome) -> None:
        """Take note of a round: the committed ids now end with `outcome.new_tokens`."""
        ...

    def rewind(self, length: int) -> None:
        """Forget the committed ids from `length` on."""
        ...

    def close(self) -> None:
        """Free what is held; the drafter cannot be used afterwards."""
        ...
