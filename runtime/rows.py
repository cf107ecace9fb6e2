"""Trees of rows: what a row may see, and at which position it stands."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from forerun.errors import OptionError

if TYPE_CHECKING:
    from collections.abc import Sequence

HIDDEN = np.float32(-1e30)
# Rows that one step may have.
MAX_ROWS = 2048


def tree_depths(parents: Sequence[int], count: int) -> np.ndarray:
    """Depth of each row: 0 for children of the history.

    Args:
        parents: the row before each row, or -1; parents come first.
        count: number of rows there must be.

    Raises:
        OptionError: a row's parent does not come before it, or the number of rows differs.
    """
    if len(parents) != count:
        raise OptionError(f"{count} rows need as many parents, got {len(parents)}")
    depths = np.zeros(count, np.int64)
    for row, parent in enumerate(parents):
        if not -1 <= parent < row:
            raise OptionError(f"row {row} must have a parent in -1..{row - 1}, got {parent}")
        depths[row] = depths[parent] + 1 if parent >= 0 else 0
    return depths


def ancestors(parents: Sequence[int] | None, count: int) -> np.ndarray:
    """Which rows of a step each row sees.

    Args:
        parents: the row before each row, or -1; None for a chain.
        count: rows.

    Returns:
        bool [count, count]; a row sees itself.
    """
    if parents is None:
        return np.tri(count, dtype=bool)
    seen = np.eye(count, dtype=bool)
    for row, parent in enumerate(parents):
        if parent >= 0:
            seen[row] |= seen[parent]
    return seen


def tree_bias(parents: Sequence[int], past: int) -> np.ndarray:
    """Additive mask of a tree behind `past` tokens.

    Returns:
        float32 [1, 1, S, past + S]: 0 where a row may look (history, ancestors, itself).
    """
    count = len(parents)
    seen = ancestors(parents, count)
    bias = np.zeros((1, 1, count, past + count), np.float32)
    bias[0, 0, :, past:] = np.where(seen, np.float32(0), HIDDEN)
    return bias


def check_ids(ids: np.ndarray, vocab: int, most: int) -> None:
    """Refuse ids that are no rows of a step.

    Raises:
        OptionError: none or more than `most`, another shape than [S], or outside the vocabulary.
    """
    if ids.ndim != 1 or not 1 <= len(ids) <= most:
        raise OptionError(f"a step takes 1 to {most} rows, got shape {ids.shape}")
    low, high = (ids[0], ids[0]) if len(ids) == 1 else (ids.min(), ids.max())
    if low < 0 or high >= vocab:
        raise OptionError(f"token ids must be in 0..{vocab - 1}, got {low}..{high}")


def wanted_rows(want: str | Sequence[int], count: int) -> np.ndarray:
    """Numbers of the rows whose logits are computed; at least one, since graphs need one.

    Args:
        want: ``last``, ``all``, ``none``, or row numbers.
        count: rows of the step.

    Raises:
        OptionError: no number, or one that is not that of a row.
    """
    if isinstance(want, str):
        return np.arange(count) if want == "all" else np.array([count - 1])
    rows = np.asarray(want, np.int64)
    if rows.ndim != 1 or not rows.size or rows.min() < 0 or rows.max() >= count:
        raise OptionError(f"wanted rows must be among the {count} rows, got {want!r}")
    return rows
