"""Cutting the rows of a step into pieces that fit a few fixed widths."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

# Finite in half precision, where a sum of it and a score still is; its softmax is exactly 0.
HIDDEN_IN_HALF = np.float32(-3e4)


@dataclass(frozen=True)
class Piece:
    """Rows `start` to `stop` of a step, run `width` rows wide."""

    start: int
    stop: int
    width: int


def cut(rows: int, room: int, widths: Sequence[int]) -> list[Piece]:
    """Cut a step into pieces: as few as possible, the last as narrow as possible.

    Padding rows write into free slots behind the real rows, so a piece must not be wider than
    the room that is left.

    Args:
        rows: of the step, at most `room`.
        room: free slots of the KV cache.
        widths: increasing, the first is 1.
    """
    pieces, start = [], 0
    while start < rows:
        left = rows - start
        fitting = [width for width in widths if width <= room - start]
        width = next((w for w in fitting if w >= left), fitting[-1])
        stop = min(rows, start + width)
        pieces.append(Piece(start, stop, width))
        start = stop
    return pieces


def fill_mask(mask: np.ndarray, piece: Piece, past: int, seen: np.ndarray) -> None:
    """Write the additive mask of a piece.

    Padding rows see what the last real row sees; nobody sees their slots.

    Args:
        mask: float32 [width, capacity], overwritten.
        piece: the rows.
        past: committed tokens, which every row sees.
        seen: from `ancestors`, of the whole step.
    """
    rows = np.minimum(np.arange(piece.start, piece.start + piece.width), piece.stop - 1)
    mask[:, :past] = 0
    mask[:, past:] = HIDDEN_IN_HALF
    mask[:, past : past + len(seen)][seen[rows]] = 0
