"""The ids of a drafter whose vocabulary is smaller than the target's."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from forerun.errors import BundleError

if TYPE_CHECKING:
    from collections.abc import Iterable


class VocabMap:
    """Which id of the target each id of the drafter stands for.

    Args:
        to_target: int [N], the target's ids in the order of the drafter's.
        target_vocab: number of the target's ids.
        unknown: the drafter's id for what it has no id for: one of its own, or N, a row of its
            embedding that it never proposes.

    Raises:
        BundleError: an id is outside the target's vocabulary or comes twice, or `unknown` is
            outside 0..N.
    """

    def __init__(self, to_target: np.ndarray, target_vocab: int, unknown: int) -> None:
        ids = np.asarray(to_target, np.int64)
        if ids.ndim != 1 or not ids.size or ids.min() < 0 or ids.max() >= target_vocab:
            raise BundleError(
                f"the drafter's vocabulary holds ids outside the target's 0..{target_vocab - 1}; "
                "pull or train the drafter again"
            )
        if not 0 <= unknown <= len(ids):
            raise BundleError(
                f"the drafter's unknown id {unknown} is outside its own 0..{len(ids)}"
            )
        self.to_target = ids
        self._to_draft = np.full(target_vocab, unknown, np.int64)
        self._to_draft[ids] = np.arange(len(ids))
        if not np.array_equal(self._to_draft[ids], np.arange(len(ids))):
            raise BundleError("the drafter's vocabulary holds an id twice; pull or train it again")
        self._known = np.zeros(target_vocab, bool)
        self._known[ids] = True

    def __len__(self) -> int:
        return len(self.to_target)

    def to_draft(self, ids: Iterable[int]) -> list[int]:
        """The drafter's ids for ids of the target; `unknown` for those it lacks."""
        return [int(self._to_draft[token]) for token in ids]

    def knows(self, token: int) -> bool:
        """Whether the drafter has an id for this one of the target."""
        return bool(self._known[token])


def identity(vocab: int) -> VocabMap:
    """The map of a drafter with the target's own ids."""
    return VocabMap(np.arange(vocab), vocab, 0)
