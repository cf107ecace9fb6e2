"""Laws of the step primitive on tiny random decoders."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import CONFIGS, tiny_bundle

from forerun.errors import BundleError, ContextLimitError, OptionError
from forerun.runtime.manifest import load_manifest
from forerun.runtime.runner import Runner

IDS = st.lists(st.integers(0, 257), min_size=1, max_size=12)


@pytest.fixture(scope="module")
def runner(tmp_path_factory):
    manifest, folder = tiny_bundle("llama", tmp_path_factory.mktemp("llama"), capacity=64)
    return Runner(manifest, folder, threads=1)


def fresh(runner, ids):
    runner.arena.rewind(0)
    return runner.step(ids, want="all").copy()


def close(a, b):
    np.testing.assert_allclose(a, b, atol=2e-4)


@given(IDS, IDS)
@settings(max_examples=30, deadline=None)
def test_chunks_equal_one_step(runner, first, second):
    whole = fresh(runner, first + second)
    runner.arena.rewind(0)
    close(runner.step(first, want="all"), whole[: len(first)])
    close(runner.step(second, want="all"), whole[len(first) :])
    assert runner.arena.length == len(first + second)


@given(IDS, st.data())
@settings(max_examples=40, deadline=None)
def test_each_path_of_a_tree_equals_a_chain(runner, history, data):
    count = data.draw(st.integers(1, 8))
    ids = data.draw(st.lists(st.integers(0, 257), min_size=count, max_size=count))
    parents = [data.draw(st.integers(-1, row - 1)) for row in range(count)]
    fresh(runner, history)
    tree = runner.step(ids, parents=parents, want="all").copy()
    assert runner.arena.length == len(history)
    path, row = [], data.draw(st.integers(0, count - 1))
    while row >= 0:
        path.insert(0, row)
        row = parents[row]
    runner.arena.commit(path)
    after = runner.step([7]).copy()
    chain = fresh(runner, history + [ids[i] for i in path])
    close(tree[path], chain[len(history) :])
    close(after, runner.step([7]))


@given(IDS, IDS, IDS, st.data())
@settings(max_examples=20, deadline=None)
def test_rewind_equals_fresh_prefill(runner, first, second, third, data):
    fresh(runner, first + second)
    keep = data.draw(st.integers(0, len(first + second)))
    runner.arena.rewind(keep)
    got = runner.step(third, want="all").copy()
    close(got, fresh(runner, (first + second)[:keep] + third)[keep:])


def test_wanted_rows(runner):
    every = fresh(runner, [1, 2, 3, 4])
    runner.arena.rewind(0)
    close(runner.step([1, 2, 3, 4], want=[0, 2]), every[[0, 2]])
    runner.arena.rewind(0)
    assert runner.step([1, 2, 3, 4], want="none").shape == (0, 258)
    runner.arena.rewind(0)
    close(runner.step(np.array([1, 2, 3, 4])), every[3:])


def test_limits_leave_the_runner_usable(runner):
    expected = fresh(runner, [1, 2, 3])
    runner.arena.rewind(0)
    runner.step([1, 2])
    with pytest.raises(ContextLimitError, match="capacity of 64"):
        runner.step([5] * 63)
    for bad in ([], [258], [-1], [[1]], [5] * 3000):
        with pytest.raises(OptionError):
            runner.step(bad)
    with pytest.raises(OptionError, match="wanted rows"):
        runner.step([1], want=[1])
    with pytest.raises(OptionError, match="parent"):
        runner.step([1, 2], parents=[-1, 1])
    with pytest.raises(OptionError, match="as many parents"):
        runner.step([1, 2], parents=[-1])
    assert runner.arena.length == 2
    close(runner.step([3]), expected[2:])


def test_commit_checks(runner):
    fresh(runner, [1])
    runner.step([2, 3], parents=[-1, -1])
    for bad in ([2], [-1], [1, 0], [0, 0]):
        with pytest.raises(OptionError):
            runner.arena.commit(bad)
    runner.arena.commit([1])
    assert runner.arena.length == 2
    with pytest.raises(OptionError, match="rewind"):
        runner.arena.rewind(3)


def test_cache_is_updated_in_place(runner):
    addresses = {k: a.ctypes.data for k, a in runner.arena.arrays.items()}
    fresh(runner, [1, 2, 3])
    assert {k: a.ctypes.data for k, a in runner.arena.arrays.items()} == addresses
    assert np.abs(runner.arena.arrays["key.0"][0, :, :3]).min(axis=(0, 2)).max() > 0
    assert runner.arena.nbytes == sum(a.nbytes for a in runner.arena.arrays.values())


def test_no_hidden_states(runner):
    with pytest.raises(OptionError, match="hidden"):
        runner.hidden()


@pytest.mark.parametrize("arch", ["mistral", "gemma3"])
def test_windows_hold_beyond_the_window(arch, tmp_path):
    manifest, folder = tiny_bundle(arch, tmp_path, capacity=64)
    window = CONFIGS[arch].sliding_window
    runner = Runner(manifest, folder, threads=1)
    ids = list(range(window * 4))
    whole = fresh(runner, ids)
    runner.arena.rewind(0)
    close(np.concatenate([runner.step([t]).copy() for t in ids]), whole)
    with pytest.raises(BundleError, match="cpu-tree"):
        runner.step([1, 2], parents=[-1, -1])


def test_unknown_lowering(tmp_path):
    manifest, folder = tiny_bundle("llama", tmp_path)
    with pytest.raises(BundleError, match="has no lowering"):
        Runner(manifest, folder, lowering="npu")


def test_truncated_graph(tmp_path):
    _, folder = tiny_bundle("llama", tmp_path)
    graph = folder / "model.onnx"
    graph.write_bytes(graph.read_bytes()[:-100])
    with pytest.raises(BundleError, match="bytes instead of"):
        load_manifest(folder).check_files(folder)
    with pytest.raises(BundleError, match="cannot be loaded"):
        Runner(load_manifest(folder), folder)
