"""Cutting steps for fixed widths, and what the rows of each piece may see."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from forerun.runtime.pieces import HIDDEN_IN_HALF, Piece, cut, fill_mask
from forerun.runtime.rows import ancestors

WIDTHS = (1, 4, 8)


@given(st.integers(1, 40), st.integers(0, 20))
def test_pieces_cover_the_rows_and_stay_in_the_cache(rows, spare):
    room = rows + spare
    pieces = cut(rows, room, WIDTHS)
    assert [p.start for p in pieces] == [0, *(p.stop for p in pieces[:-1])]
    assert pieces[-1].stop == rows
    for piece in pieces:
        assert piece.stop - piece.start <= piece.width
        assert piece.start + piece.width <= room


def test_the_narrowest_width_that_fits_is_taken():
    assert cut(1, 99, WIDTHS) == [Piece(0, 1, 1)]
    assert cut(3, 99, WIDTHS) == [Piece(0, 3, 4)]
    assert cut(5, 99, WIDTHS) == [Piece(0, 5, 8)]
    assert cut(9, 99, WIDTHS) == [Piece(0, 8, 8), Piece(8, 9, 1)]
    # Padding would stand behind the end of the cache.
    assert cut(3, 3, WIDTHS) == [Piece(0, 1, 1), Piece(1, 2, 1), Piece(2, 3, 1)]


def test_rows_see_their_ancestors_and_themselves():
    assert ancestors([-1, 0, 0, 2], 4).tolist() == [
        [True, False, False, False],
        [True, True, False, False],
        [True, False, True, False],
        [True, False, True, True],
    ]
    chain = ancestors([-1, 0, 1], 3)
    assert np.array_equal(ancestors(None, 3), chain)


def test_padding_rows_see_what_the_last_row_sees_and_nobody_sees_them():
    mask = np.full((4, 10), np.nan, np.float32)
    fill_mask(mask, Piece(1, 3, 4), 5, ancestors([-1, 0, 0], 3))
    shown = ["".join("x" if v == 0 else "." for v in row) for row in mask]
    assert shown == ["xxxxxxx...", "xxxxxx.x..", "xxxxxx.x..", "xxxxxx.x.."]
    assert set(np.unique(mask)) == {HIDDEN_IN_HALF, np.float32(0)}
    assert np.isfinite(np.float16(HIDDEN_IN_HALF) * np.float16(2))
