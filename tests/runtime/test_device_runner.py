"""Runners on another device: KV cache there, failures as one error, the CPU as a way out."""

import dataclasses

import numpy as np
import onnxruntime as ort
import pytest
from tiny import tiny_bundle

from forerun.devices import session as sessions
from forerun.errors import BundleError, ContextLimitError, DeviceError, OptionError
from forerun.quant.quantize import quantize
from forerun.runtime import device_arena
from forerun.runtime import open as opening
from forerun.runtime.arena import lazy_zeros
from forerun.runtime.bound import BoundGraph
from forerun.runtime.device_arena import DeviceArena
from forerun.runtime.open import devices_for, open_runner
from forerun.runtime.prefix import PrefixCache
from forerun.runtime.runner import Runner


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return tiny_bundle("llama", tmp_path_factory.mktemp("llama"), capacity=64)


@pytest.fixture(scope="module")
def cpu(bundle):
    return Runner(*bundle, threads=1)


@pytest.fixture(scope="module")
def gpu(bundle, webgpu):
    runner = Runner(*bundle, threads=1, device=webgpu)
    yield runner
    runner.close()


def both(runners, act):
    return [np.array(act(runner)) for runner in runners]


def close(a, b):
    np.testing.assert_allclose(a, b, atol=2e-4)


# Few shapes, since every new one is compiled anew, which takes seconds in software.
@pytest.mark.gpu
@pytest.mark.parametrize(
    ("parents", "path"),
    [([-1, 0, 0, 1, -1], [0, 1, 3]), ([-1, -1, 1, 2, 1], [1, 4]), ([-1, 0, 1, 2, 3], [0, 1, 2])],
)
@pytest.mark.parametrize("keep", [0, 3, 7])
def test_any_steps_give_what_the_cpu_gives(cpu, gpu, parents, path, keep):
    pair, text, rows = (cpu, gpu), [5, 200, 31, 31, 7], [9, 80, 81, 3, 250]
    for runner in pair:
        runner.arena.rewind(0)
    close(*both(pair, lambda r: r.step(text, want="all")))
    close(*both(pair, lambda r: r.features()))
    close(*both(pair, lambda r: r.step(rows, want="all", parents=parents)))
    for runner in pair:
        runner.arena.commit(path)
    close(*both(pair, lambda r: r.step([7])))
    for runner in pair:
        runner.arena.rewind(keep)
    close(*both(pair, lambda r: r.step(rows, want="all")))
    assert gpu.arena.length == cpu.arena.length == keep + len(rows)


@pytest.mark.gpu
def test_the_cache_stays_on_the_device(gpu):
    assert isinstance(gpu.arena, DeviceArena) and gpu.device == "webgpu"
    values = gpu.arena.values()
    assert len(values) == 6 and {v.device_name().lower() for v in values.values()} != {"cpu"}
    before = {role: id(value) for role, value in values.items()}
    gpu.arena.rewind(0)
    gpu.step([1, 2, 3])
    assert {role: id(value) for role, value in gpu.arena.values().items()} == before
    assert gpu.arena.nbytes == 3 * 2 * 2 * 64 * 16 * 4
    assert np.abs(values["key.0"].numpy()[0, :, :3]).min() > 0
    with pytest.raises(ContextLimitError):
        gpu.step([1] * 62)


@pytest.mark.gpu
@pytest.mark.parametrize("weights", ["int4", "int4-exact"])
def test_quantized_bundles_run_there(webgpu, bundle, tmp_path, weights):
    manifest, ids = quantize(bundle[1], tmp_path / "q", weights=weights), list(range(40, 60))
    runners = [Runner(manifest, tmp_path / "q", threads=1, device=d) for d in ("cpu", webgpu)]
    want, got = both(runners, lambda r: r.step(ids, want="all"))
    assert np.abs(got - want).mean() < 0.1 * want.std()
    assert (got.argmax(-1) == want.argmax(-1)).mean() >= 0.8
    for runner in runners:
        runner.close()


@pytest.mark.gpu
def test_one_row_equals_several_there(webgpu, bundle, tmp_path):
    """What drafting relies on there, up to the last bits of float32."""
    manifest = quantize(bundle[1], tmp_path / "q", weights="int8")
    runner = Runner(manifest, tmp_path / "q", threads=1, device=webgpu)
    ids = [5, 90, 33, 120, 7, 7, 201, 14]
    wide = runner.step(ids, want="all").copy()
    runner.arena.rewind(0)
    single = np.concatenate([runner.step([token]).copy() for token in ids])
    np.testing.assert_allclose(wide, single, atol=1e-4)
    runner.close()


@pytest.fixture
def device(monkeypatch):
    """The name of a device that is the CPU in disguise, and a switch that makes it fail."""

    def on_cpu(graph, native, row):
        return ort.InferenceSession(graph, native, providers=["CPUExecutionProvider"])

    def allocate(row, shape, dtype):
        return ort.OrtValue.ortvalue_from_numpy(lazy_zeros(shape, dtype))

    monkeypatch.setattr(sessions, "whole_session", on_cpu)
    monkeypatch.setattr(device_arena, "allocate", allocate)
    switch = Switch()
    run = BoundGraph.run

    def failing(graph, *args):
        if graph._off_host:
            switch.check()
        return run(graph, *args)

    monkeypatch.setattr(BoundGraph, "run", failing)
    return switch


class Switch:
    """Makes the next steps on the device fail, after `left` more."""

    left = 10**9

    def check(self):
        self.left -= 1
        if self.left < 0:
            raise RuntimeError("device lost\nVK_ERROR_DEVICE_LOST")


def test_a_lost_device_is_one_error_and_the_next_step_opens_it_anew(bundle, cpu, device):
    runner = Runner(*bundle, threads=1, device="webgpu")
    cache = PrefixCache(runner)
    cache.feed([1, 2, 3])
    spent, device.left = runner.session_time, 0
    with pytest.raises(DeviceError, match=r"webgpu failed in the middle of a step.*DEVICE_LOST"):
        cache.feed([4])
    assert runner.arena.length == 0
    with pytest.raises(DeviceError, match="webgpu failed"):
        runner.step([4])
    device.left = 10**9
    assert cache.keep_common([1, 2, 3, 4]) == 0, "nothing is taken as cached"
    got = cache.feed([1, 2, 3, 4]).copy()
    cpu.arena.rewind(0)
    close(got, cpu.step([1, 2, 3, 4]))
    assert runner.session_time > spent


def test_trees_are_committed_on_the_device(bundle, cpu, device, monkeypatch):
    runner = Runner(*bundle, threads=1, device="webgpu")
    for r in (runner, cpu):
        r.arena.rewind(0)
        r.step([9, 8])
        r.step([1, 2, 3, 4], parents=[-1, -1, 1, 2], want="all")
        r.arena.commit([1, 2, 3])
    close(runner.step([5]).copy(), cpu.step([5]))
    runner.step([1, 2], parents=[-1, -1])
    monkeypatch.setattr(runner.arena, "_open_mover", lambda: 1 / 0)
    with pytest.raises(DeviceError, match="division by zero"):
        runner.arena.commit([1])
    assert runner.arena.length == 0


def test_a_bundle_without_the_form(bundle, device, tmp_path):
    manifest, folder = bundle
    forms = {n: f for n, f in manifest.lowerings.items() if "webgpu" not in n}
    with pytest.raises(BundleError, match="no lowering 'webgpu', only cpu, cpu-tree; export"):
        Runner(dataclasses.replace(manifest, lowerings=forms), folder, device="webgpu")
    forms = {n: f for n, f in manifest.lowerings.items() if n != "webgpu-move"}
    runner = Runner(dataclasses.replace(manifest, lowerings=forms), folder, device="webgpu")
    runner.step([9])
    runner.step([1, 2], parents=[-1, -1])
    runner.arena.commit([0])
    runner.step([1, 2], parents=[-1, -1])
    with pytest.raises(BundleError, match="webgpu-move"):
        runner.arena.commit([1])


@pytest.mark.parametrize("tree", [False, True])
def test_falling_back_reads_the_text_again(bundle, cpu, device, tree):
    told = []
    runner = open_runner(
        *bundle, device="webgpu", threads=1, allow_fallback=True, on_fallback=told.append
    )
    assert runner.device == "webgpu" and runner.threads == 1
    pair = runner, cpu
    cpu.arena.rewind(0)
    close(*both(pair, lambda r: r.step([1, 2, 3])))
    if tree:
        for r in pair:
            r.step([4, 5, 6], parents=[-1, -1, 1])
            r.arena.commit([1, 2])
    for r in pair:
        r.step([7, 8, 9])
        r.arena.rewind(r.arena.length - 1)
    device.left = 0
    close(*both(pair, lambda r: r.step([10, 11], want="all")))
    close(*both(pair, lambda r: r.features()))
    assert runner.device == "cpu" and runner.arena.length == cpu.arena.length
    assert len(told) == 1 and "DEVICE_LOST" in told[0] and "going on on the cpu" in told[0]
    close(*both(pair, lambda r: r.step([12])))
    assert runner.session_time > 0
    runner.close()


def test_falling_back_while_a_tree_is_committed(bundle, cpu, device, monkeypatch):
    with pytest.warns(RuntimeWarning, match="going on on the cpu"):
        runner = open_runner(*bundle, device="webgpu", threads=1, allow_fallback=True)
        monkeypatch.setattr(runner.cache, "_open_mover", lambda: 1 / 0)
        cpu.arena.rewind(0)
        for r in (runner, cpu):
            r.step([1, 2, 3])
            r.step([4, 5, 6], parents=[-1, -1, 1])
            r.arena.commit([1, 2])
    assert runner.device == "cpu" and runner.arena.known == [1, 2, 3, 5, 6]
    close(*both((runner, cpu), lambda r: r.step([12])))


def test_without_leave_nothing_falls_back(bundle, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime_ep_webgpu", None)
    monkeypatch.setattr("forerun.devices.plugins._registered", set())
    with pytest.raises(DeviceError, match="pip install onnxruntime-ep-webgpu"):
        open_runner(*bundle, device="webgpu")
    told = []
    runner = open_runner(*bundle, device="webgpu", allow_fallback=True, on_fallback=told.append)
    assert runner.device == "cpu" and "going on on the cpu" in told[0]
    with pytest.raises(OptionError, match="another device than the cpu"):
        open_runner(*bundle, device="cpu", allow_fallback=True)
    with pytest.raises(OptionError, match="unknown"):
        open_runner(*bundle, device="gpu")


def test_static_devices_get_the_static_runner(tmp_path, bundle):
    with pytest.raises(BundleError, match="--static"):
        open_runner(*bundle, device="qnn")


def test_the_devices_that_are_here_and_that_a_bundle_has_a_form_for(bundle, monkeypatch):
    monkeypatch.setattr(opening, "missing", lambda row: "" if row.name == "cpu" else "not here")
    assert devices_for(bundle[0]) == ["cpu"]
    monkeypatch.setattr(opening, "missing", lambda row: "")
    assert devices_for(bundle[0]) == ["cpu", "webgpu"]
