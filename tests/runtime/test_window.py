"""Sinks and window: what is kept, where it stands, and what cannot be undone."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import edit_manifest, tiny_bundle

from forerun.errors import BundleError, ContextLimitError, OptionError
from forerun.runtime.manifest import KVLayout, Rotary, load_manifest
from forerun.runtime.prefix import PrefixCache
from forerun.runtime.runner import Runner
from forerun.runtime.window import WindowArena, open_window

ROWS, SINKS = 36, 4


def windowed(manifest, folder, rows=ROWS):
    """A runner whose cache is a window, as `load` builds it."""
    sized = dataclasses.replace(manifest, kv=dataclasses.replace(manifest.kv, capacity=rows))
    runner = Runner(sized, folder, threads=1, arena=open_window(manifest, rows))
    return runner


@pytest.fixture(scope="module")
def shallow(tmp_path_factory):
    """One layer: what it computes depends on the kept tokens alone, so it has an oracle."""
    folder = tmp_path_factory.mktemp("shallow")
    return tiny_bundle("llama", folder, layers=1, layer_window=(False,))


@pytest.fixture(scope="module")
def deep(tmp_path_factory):
    return tiny_bundle("llama", tmp_path_factory.mktemp("deep"))


def rotated(keys, positions, frequencies):
    """Keys [heads, rows, size] as they stand in a cache at those positions."""
    angle = positions[:, None] * np.array(frequencies)
    half = keys.shape[-1] // 2
    low, high = keys[..., :half], keys[..., half:]
    cos, sin = np.cos(angle), np.sin(angle)
    return np.concatenate([low * cos - high * sin, high * cos + low * sin], -1)


@given(st.integers(0, 2**32 - 1), st.lists(st.integers(1, 9), min_size=1, max_size=60))
@settings(max_examples=40, deadline=None)
def test_moved_keys_are_those_of_their_new_places(seed, steps):
    """Against keys that were never rotated, with two rotations in turn over the layers."""
    rng = np.random.default_rng(seed)
    rotary = Rotary(tuple(tuple(base ** -np.arange(4.0)) for base in (10.0, 3.0)), (0, 1, 0))
    arena = WindowArena(KVLayout(3, 2, 8, 40), rotary)
    plain = {role: [] for role in arena.arrays}
    kept = []
    for count in steps:
        arena.make_room(count)
        used = arena.used
        kept = kept[:SINKS] + kept[len(kept) - (used - SINKS) :] if used > SINKS else kept[:used]
        assert arena.position == used == len(kept)
        for role, array in arena.arrays.items():
            new = rng.standard_normal((2, count, 8))
            plain[role] += list(new.swapaxes(0, 1))
            if role.startswith("key"):
                where = np.arange(used, used + count)
                new = rotated(new, where, rotary.frequencies[rotary.layers[int(role[4:])]])
            array[0, :, used : used + count] = new
        kept += range(arena.length, arena.length + count)
        arena.length += count
    assert arena.used <= 40 and arena.length == sum(steps)
    for role, array in arena.arrays.items():
        expected = np.stack([plain[role][token] for token in kept], 1)
        if role.startswith("key"):
            places = np.arange(len(kept))
            frequencies = rotary.frequencies[rotary.layers[int(role[4:])]]
            expected = rotated(expected, places, frequencies)
        np.testing.assert_allclose(array[0, :, : len(kept)], expected, atol=2e-5)


def test_a_text_without_end_is_read_as_its_kept_tokens(shallow):
    manifest, folder = shallow
    ids = np.random.default_rng(0).integers(0, 200, 200)
    runner, plain = windowed(manifest, folder), Runner(manifest, folder, threads=1)
    for step, token in enumerate(ids):
        got = runner.step([token]).copy()
        if step % 17 == 0:
            gone = runner.arena.evicted
            kept = [*ids[:SINKS], *ids[SINKS + gone : step + 1]] if gone else ids[: step + 1]
            plain.arena.rewind(0)
            np.testing.assert_allclose(got, plain.step(kept), atol=2e-4)
    assert runner.arena.length == 200 and runner.arena.evicted > 150
    assert runner.arena.nbytes == runner.manifest.kv.nbytes < manifest.kv.nbytes


@given(st.integers(1, 60), st.integers(0, 12))
@settings(max_examples=25, deadline=None)
def test_rewinding_within_the_window_takes_rows_back(shallow, read, back):
    manifest, folder = shallow
    runner = windowed(manifest, folder)
    ids = np.random.default_rng(read).integers(0, 200, read + 1)
    for token in ids[:read]:
        runner.step([token])
    arena = runner.arena
    keep = max(read - back, 0)
    if arena.evicted and 0 < keep < SINKS + arena.evicted:
        with pytest.raises(ContextLimitError, match="evicted"):
            arena.rewind(keep)
        assert arena.length == read
        return
    arena.rewind(keep)
    again = runner.step([ids[-1]]).copy()
    plain = Runner(manifest, folder, threads=1)
    kept = [*ids[:keep][:SINKS], *ids[:keep][SINKS + arena.evicted :]]
    np.testing.assert_allclose(again, plain.step([*kept, ids[-1]]), atol=2e-4)


def test_a_reused_prefix_is_read_again_if_it_was_evicted(deep):
    cache = PrefixCache(windowed(*deep))
    ids = list(range(100))
    cache.feed(ids)
    assert cache.runner.arena.length == 100
    assert cache.keep_common([*ids[:95], 7]) == 95
    cache.feed(ids[95:])
    assert cache.keep_common([*ids[:20], 7]) == 0, "tokens before 20 are gone"
    assert cache.ids == [] and cache.runner.arena.length == 0
    fresh = PrefixCache(windowed(*deep)).feed(ids[:60]).copy()
    np.testing.assert_array_equal(cache.feed(ids[:60]), fresh)


def test_a_cache_in_float16_moves_too(shallow):
    layout = dataclasses.replace(shallow[0].kv, dtype="float16", bits=16)
    arena = open_window(dataclasses.replace(shallow[0], kv=layout), ROWS)
    arena.arrays["key.0"][...] = 1
    arena.length = ROWS
    arena.make_room(1)
    assert arena.evicted == 4 and arena.arrays["key.0"].dtype == np.float16


class Stop(BaseException):
    """As an interrupt from the keyboard."""


def test_an_interrupt_while_rows_move_leaves_an_empty_cache(shallow, monkeypatch):
    runner = windowed(*shallow)
    runner.step([1, 2, 3, 4, 5])
    for token in range(31):
        runner.step([token])
    with monkeypatch.context() as broken:
        broken.setattr("forerun.runtime.window._turned_back", stopped)
        with pytest.raises(Stop):
            runner.step([9])
    arena = runner.arena
    assert (arena.length, arena.evicted, arena.used, arena.position) == (0, 0, 0, 0)
    again = runner.step([1, 2, 3]).copy()
    np.testing.assert_array_equal(again, windowed(*shallow).step([1, 2, 3]))


def stopped(*_):
    raise Stop


def test_a_step_that_is_refused_evicts_nothing(shallow):
    runner = windowed(*shallow)
    for token in range(ROWS):
        runner.step([token])
    for wrong in ({"want": [7]}, {"parents": [3]}):
        with pytest.raises(OptionError):
            runner.step([1], **wrong)
    assert runner.arena.evicted == 0


def test_what_can_be_given_back_is_known(deep):
    arena = windowed(*deep).arena
    assert arena.is_endless and arena.restorable(20) == 20
    arena.pretend(100)
    assert (arena.length, arena.evicted, arena.used) == (100, 64, 36)
    assert [arena.restorable(length) for length in (0, 67, 68, 90)] == [0, 0, 68, 90]


def test_what_a_window_cannot_do(deep):
    manifest, folder = deep
    for rows in (SINKS + 31, manifest.kv.capacity + 1):
        with pytest.raises(OptionError, match="36 to 128 rows"):
            open_window(manifest, rows)
    eight = dataclasses.replace(manifest.kv, dtype="int8", bits=8)
    with pytest.raises(OptionError, match=r"fp32 or fp16.* a bundle that has one"):
        open_window(dataclasses.replace(manifest, kv=eight), ROWS)
    arena = open_window(manifest, ROWS)
    with pytest.raises(ContextLimitError, match="9 rows"):
        arena.make_room(9)
    with pytest.raises(OptionError, match="drafting"):
        arena.commit([0])
    edit_manifest(folder, lambda data: data.update(rotary=None))
    with pytest.raises(BundleError, match="rotated"):
        open_window(load_manifest(folder), ROWS)
