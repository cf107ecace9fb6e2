import dataclasses

import numpy as np
import pytest
from gear_tools import contents
from hypothesis import given
from hypothesis import strategies as st

from forerun.errors import ContextLimitError, OptionError
from forerun.quant.gear import gear_layout
from forerun.runtime.gear.layout import CHUNK
from forerun.runtime.gear.store import GearArena
from forerun.runtime.manifest import KVLayout

DENSE = KVLayout(layers=2, heads=2, head_dim=4, capacity=330)


def arena():
    return GearArena(gear_layout(DENSE, "gear-kivi", rank=1))


def rows_of(tokens):
    """Rows that tell one token and layer from another; float32 [tokens, heads x head_dim]."""
    rng = np.random.default_rng(7)
    table = rng.standard_normal((1000, 8)).astype(np.float32)
    return table[np.asarray(tokens, np.int64) % 1000]


def write(store, tokens, pending=False):
    """What a step does: settle, write behind the buffer, and commit what is no tree."""
    store.make_room(len(tokens))
    store.settle(store.length)
    begin = store.offset + store.length - store.compressed * CHUNK
    for layer in range(2):
        for part, sign in (("key", 1), ("value", -1)):
            rows = sign * rows_of(tokens) + layer
            store.rows[f"{part}.{layer}"][begin : begin + len(tokens)] = rows
    if pending:
        store.pending = len(tokens)
    else:
        store.length += len(tokens)


def wanted(tokens):
    rows = np.stack([rows_of(tokens), rows_of(tokens) + 1]).reshape(2, len(tokens), 2, 4)
    return rows.swapaxes(1, 2)


def check(store, tokens, exact_from):
    held = contents(store)["key"]
    assert held.shape == (2, 2, len(tokens), 4)
    want = wanted(tokens)
    np.testing.assert_array_equal(held[:, :, exact_from:], want[:, :, exact_from:])
    np.testing.assert_allclose(held, want, atol=1.5)


def test_what_fills_a_chunk_is_compressed_and_the_rest_is_exact():
    store = arena()
    for token in range(200):
        write(store, [token])
        assert store.compressed == token // CHUNK
    store.settle(store.length)
    assert (store.compressed, store.length) == (3, 200)
    check(store, range(200), 3 * CHUNK)


def test_going_back_into_the_newest_chunk_leaves_no_trace():
    store = arena()
    write(store, range(100))
    store.rewind(70)
    check(store, range(70), CHUNK)
    store.rewind(30)
    assert store.compressed == 0
    check(store, range(30), 0)


def test_going_back_further_keeps_what_the_chunk_stood_for():
    store = arena()
    for start in range(0, 192, CHUNK):
        write(store, range(start, start + CHUNK))
    store.settle(store.length)
    held = contents(store)["value"][:, :, :40]
    store.rewind(40)
    assert store.compressed == 0
    np.testing.assert_allclose(contents(store)["value"], held, atol=1e-6)
    store.rewind(0)
    assert (store.length, store.compressed, store.offset) == (0, 0, 0)


def test_it_is_known_what_going_back_loses():
    store = arena()
    write(store, range(200))
    store.settle(store.length)
    found = {length: store.restorable(length) for length in (200, 192, 191, 130, 128, 100, 64, 9)}
    assert found == {200: 200, 192: 192, 191: 191, 130: 130, 128: 128, 100: 64, 64: 64, 9: 0}
    store.rewind(store.restorable(100))
    check(store, range(64), CHUNK)
    assert not store.is_endless and store.most_rows == 330


class Stop(BaseException):
    """As an interrupt from the keyboard."""


@pytest.mark.parametrize("move", ["drop", "restore"])
def test_an_interrupt_while_rows_move_leaves_an_empty_cache(move, monkeypatch):
    store = arena()
    for start in range(0, 192 if move == "restore" else 128, CHUNK):
        write(store, range(start, start + CHUNK))
    store.rows = Breaking(store.rows, after=2)
    with pytest.raises(Stop), store.guarded():
        store.settle(store.length) if move == "drop" else store.rewind(40)
    assert (store.length, store.compressed, store.offset, store.pending) == (0, 0, 0, 0)
    store.rows = dict(store.rows)
    write(store, range(100))
    check(store, range(100), CHUNK)


class Breaking(dict):
    """Rows of which only a few can be reached."""

    def __init__(self, rows, after):
        super().__init__(rows)
        self.after = after

    def values(self):
        for number, array in enumerate(super().values()):
            if number == self.after:
                raise Stop
            yield array

    def __getitem__(self, role):
        self.after -= 1
        if self.after < 0:
            raise Stop
        return super().__getitem__(role)


def test_zeros_can_stand_for_any_length():
    store = GearArena(gear_layout(dataclasses.replace(DENSE, capacity=2000), "gear-kivi", rank=1))
    store.pretend(1900)
    assert (store.length, store.compressed) == (1900, 29)
    assert not contents(store)["key"].any()
    store.rewind(0)
    assert store.compressed == 0


def test_rows_of_a_tree_are_kept_in_the_order_of_the_commit():
    store = arena()
    write(store, range(100))
    write(store, [900, 100, 901, 101, 102], pending=True)
    store.commit([1, 3, 4])
    check(store, range(103), CHUNK)
    with pytest.raises(OptionError, match="pending"):
        store.commit([0])


def test_pending_rows_are_not_compressed():
    store = arena()
    write(store, range(60))
    write(store, range(60, 80), pending=True)
    assert store.compressed == 0
    store.rewind(60)
    check(store, range(60), 0)


def test_a_step_that_fails_in_the_middle_leaves_the_tokens_before_it():
    store = arena()
    write(store, range(100))
    with pytest.raises(RuntimeError, match="lost"), store.guarded():
        store.settle(128)
        raise RuntimeError("lost")
    assert store.compressed == 1
    check(store, range(100), CHUNK)


def test_a_step_that_fails_chunks_later_leaves_no_token_it_could_not_give_back():
    store = arena()
    write(store, range(100))
    with pytest.raises(KeyboardInterrupt), store.guarded():
        # The pieces of one step of many rows: two chunks are compressed on the way.
        store.settle(128)
        store.settle(192)
        raise KeyboardInterrupt
    assert store.compressed == 1
    check(store, range(CHUNK), CHUNK)


def test_a_rewind_that_is_broken_off_leaves_nothing(monkeypatch):
    store = arena()
    for start in (0, 50, 100, 150):
        write(store, range(start, start + 50))

    def stopped(self, chunk):
        raise KeyboardInterrupt

    monkeypatch.setattr(GearArena, "_restore", stopped)
    with pytest.raises(KeyboardInterrupt):
        store.rewind(10)
    assert (store.length, store.compressed) == (0, 0)


def test_capacity_need_not_be_a_whole_number_of_chunks():
    store = arena()
    for start in range(0, 330, 55):
        write(store, range(start, start + 55))
    with pytest.raises(ContextLimitError):
        store.make_room(1)
    store.settle(330)
    check(store, range(330), 5 * CHUNK)


def test_reserved_bytes_are_those_of_all_arrays():
    store = arena()
    assert store.nbytes == sum(a.nbytes for a in [*store.chunks.values(), *store.rows.values()])


@given(st.lists(st.tuples(st.sampled_from("stgr"), st.integers(1, 64)), max_size=25))
def test_any_sequence_holds_the_committed_tokens(moves):
    store, tokens = arena(), []
    lossy, number = 0, 0
    for move, count in moves:
        count = min(count, 330 - len(tokens))
        if move == "r":
            length = max(0, len(tokens) - 3 * count)
            if length < store.compressed * CHUNK - store.offset:
                lossy = length
            store.rewind(length)
            del tokens[length:]
            lossy = min(lossy, length)
        elif count:
            new = list(range(number, number + count))
            number += count
            write(store, new, pending=move in "tg")
            if move == "s":
                tokens += new
            else:
                store.commit(range(0, count, 2))
                tokens += new[::2]
        exact = max(lossy, store.compressed * CHUNK)
        check(store, tokens, exact)
