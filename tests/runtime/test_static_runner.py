"""The static graph on the CPU: the same numbers and the same laws as the dynamic one."""

import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import edit_manifest, tiny_bundle

from forerun.devices import plugins
from forerun.errors import BundleError, ContextLimitError, DeviceError, OptionError
from forerun.runtime.manifest import load_manifest
from forerun.runtime.runner import Runner
from forerun.runtime.static_runner import StaticRunner


def static_bundle(folder, **changes):
    return tiny_bundle("llama", folder, capacity=64, static=True, **changes)


IDS = st.lists(st.integers(0, 257), min_size=1, max_size=20)


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """The two runners of one bundle."""
    manifest, folder = static_bundle(tmp_path_factory.mktemp("static"), hidden_states=True)
    return Runner(manifest, folder, threads=1), StaticRunner(manifest, folder, threads=1)


def close(a, b):
    np.testing.assert_allclose(a, b, atol=2e-4)


def rewound(both, length=0):
    for runner in both:
        runner.arena.rewind(length)


@given(IDS, IDS, st.data())
@settings(max_examples=25, deadline=None)
def test_chains_and_rewinding_equal_the_dynamic_graph(both, first, second, data):
    dynamic, static = both
    rewound(both)
    close(static.step(first, want="all"), dynamic.step(first, want="all"))
    keep = data.draw(st.integers(0, len(first)))
    rewound(both, keep)
    close(static.step(second, want="all"), dynamic.step(second, want="all"))
    assert static.arena.length == dynamic.arena.length == keep + len(second)
    close(static.features(), dynamic.features())


@given(IDS, st.data())
@settings(max_examples=25, deadline=None)
def test_trees_and_what_is_committed_equal_the_dynamic_graph(both, history, data):
    dynamic, static = both
    count = data.draw(st.integers(1, 11))
    ids = data.draw(st.lists(st.integers(0, 257), min_size=count, max_size=count))
    parents = [data.draw(st.integers(-1, row - 1)) for row in range(count)]
    path, row = [], data.draw(st.integers(0, count - 1))
    while row >= 0:
        path.insert(0, row)
        row = parents[row]
    rewound(both)
    for runner in both:
        runner.step(history, want="none")
    close(
        static.step(ids, parents=parents, want="all"),
        dynamic.step(ids, parents=parents, want="all"),
    )
    assert static.arena.length == len(history)
    for runner in both:
        runner.arena.commit(path)
    close(static.step([7, 8]), dynamic.step([7, 8]))


def test_the_cache_can_be_filled_to_its_last_slot(both):
    ids = np.arange(64) % 250
    rewound(both)
    dynamic, static = both
    whole = dynamic.step(ids, want="all").copy()
    close(static.step(ids[:61], want="all"), whole[:61])
    close(static.step(ids[61:], want="all"), whole[61:])
    assert static.arena.length == 64
    with pytest.raises(ContextLimitError, match="capacity of 64"):
        static.step([1])
    static.arena.rewind(61)
    tree = static.step(ids[61:], parents=[-1, 0, 1], want="all")
    close(tree, whole[61:])


def test_wanted_rows_and_hidden_states(both):
    dynamic, static = both
    ids = list(range(11))
    for want in ("last", "all", "none", [10, 0, 9], [3]):
        rewound(both)
        close(static.step(ids, want=want), dynamic.step(ids, want=want))
        close(static.hidden(), dynamic.hidden())


def test_no_hidden_states(tmp_path):
    manifest, folder = static_bundle(tmp_path)
    static = StaticRunner(manifest, folder, threads=1)
    with pytest.raises(OptionError, match="hidden"):
        static.hidden()
    static.close()


def test_wrong_input_leaves_the_runner_usable(both):
    rewound(both)
    dynamic, static = both
    expected = dynamic.step([1, 2, 3])
    static.step([1, 2])
    for bad in ([], [258], [-1], [[1]], [5] * 3000):
        with pytest.raises(OptionError):
            static.step(bad)
    with pytest.raises(OptionError, match="wanted rows"):
        static.step([1], want=[1])
    with pytest.raises(OptionError, match="parent"):
        static.step([1, 2], parents=[-1, 1])
    with pytest.raises(ContextLimitError):
        static.step([1] * 63)
    close(static.step([3]), expected)


def test_a_width_is_opened_when_it_is_needed(tmp_path):
    manifest, folder = static_bundle(tmp_path)
    static = StaticRunner(manifest, folder, threads=1)
    static.step([1])
    assert static.widths == (1, 4, 8) and static.opened == (1,)
    static.step([1, 2, 3])
    assert static.opened == (1, 4)
    assert static.session_time > 0


def test_bundles_without_a_static_form(tmp_path):
    manifest, folder = tiny_bundle("llama", tmp_path)
    with pytest.raises(BundleError, match="--static"):
        StaticRunner(manifest, folder)


@pytest.mark.parametrize("widths", [[], [4, 8], [1, 8, 4], [1, 1]])
def test_widths_of_a_manifest_are_checked(tmp_path, widths):
    _, folder = static_bundle(tmp_path)
    edit_manifest(folder, lambda data: data["lowerings"]["npu"].update(query_widths=widths))
    with pytest.raises(BundleError, match="widths"):
        StaticRunner(load_manifest(folder), folder)


def test_unknown_device_and_missing_plugin(tmp_path, monkeypatch):
    manifest, folder = static_bundle(tmp_path)
    with pytest.raises(OptionError, match="'gpu' is unknown"):
        StaticRunner(manifest, folder, device="gpu")
    monkeypatch.setattr(plugins, "_registered", set())
    monkeypatch.setitem(sys.modules, "onnxruntime_qnn", None)
    with pytest.raises(DeviceError, match="pip install onnxruntime-qnn"):
        StaticRunner(manifest, folder, device="qnn")


def test_a_device_lost_in_a_step_leaves_an_empty_cache_and_a_usable_runner(tmp_path):
    manifest, folder = static_bundle(tmp_path)
    static = StaticRunner(manifest, folder, threads=1)
    expected = static.step([1, 2, 3]).copy()
    spent = static.session_time

    class Lost:
        def run_with_iobinding(self, binding):
            raise RuntimeError("the device went away")

    # What the CPU raises is a bug and passes; any other device may go away.
    static._graphs[1]._session = Lost()
    with pytest.raises(RuntimeError):
        static.step([4])
    assert static.arena.length == 3
    static.device = "qnn"
    with pytest.raises(DeviceError, match=r"qnn failed in the middle of a step \(the device"):
        static.step([4])
    assert static.arena.length == 0 and static.opened == ()
    assert np.array_equal(static.step([1, 2, 3]), expected)
    assert static.session_time > spent


def test_a_broken_graph(tmp_path):
    manifest, folder = static_bundle(tmp_path)
    graph = folder / "model-npu.onnx"
    graph.write_bytes(graph.read_bytes()[:-100])
    with pytest.raises(BundleError, match="cannot be loaded"):
        StaticRunner(manifest, folder)
