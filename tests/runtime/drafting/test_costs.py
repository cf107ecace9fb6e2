"""The table of step costs: measured, kept, corrected."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from forerun.devices.remember import Remembered
from forerun.errors import OptionError
from forerun.runtime.drafting import costs as module
from forerun.runtime.drafting.costs import (
    LiveCosts,
    StepCosts,
    costs_key,
    measure_costs,
    remember_costs,
    remembered_costs,
    target_costs,
)
from forerun.runtime.manifest import FileEntry
from forerun.runtime.runner import Runner
from tests.tiny import tiny_bundle

TABLE = StepCosts((1, 2, 4), (64, 512), ((0.010, 0.012, 0.020), (0.014, 0.016, 0.024)))


def test_between_measured_points_it_is_linear():
    assert TABLE.step(1, 64) == 0.010
    assert TABLE.step(3, 64) == pytest.approx(0.016)
    assert TABLE.step(1, 288) == pytest.approx(0.012)
    assert TABLE.step(3, 288) == pytest.approx(0.018)


def test_beyond_them_it_goes_on_as_steep():
    assert TABLE.step(6, 64) == pytest.approx(0.028)
    assert TABLE.step(1, 960) == pytest.approx(0.018)
    assert TABLE.step(1, 0) == 0.010
    assert TABLE.curve(64, 3) == pytest.approx([0, 0.010, 0.012, 0.016])


def test_a_falling_table_never_becomes_free():
    falling = StepCosts((1,), (64, 512), ((0.010,), (0.004,)))
    assert falling.step(1, 100_000) == pytest.approx(0.005)


@pytest.mark.parametrize(
    "rows, depths, seconds",
    [
        ((), (), ()),
        ((1, 2), (64,), ((0.1,),)),
        ((2, 1), (64,), ((0.1, 0.1),)),
        ((2,), (64,), ((0.1,),)),
        ((1,), (64, 32), ((0.1,), (0.1,))),
        ((1,), (64,), ((0.0,),)),
        ((1,), (64,), ((float("nan"),),)),
        ((1,), (64,), ((float("inf"),),)),
    ],
)
def test_a_broken_table_is_refused(rows, depths, seconds):
    with pytest.raises(OptionError):
        StepCosts(rows, depths, seconds)


def test_observed_rounds_heal_a_bad_measurement():
    live = LiveCosts(TABLE)
    for _ in range(100):
        live.observe(1, 64, 0.015)
        live.observe(4, 64, 0.020)
    extra = TABLE.overhead
    assert live.step(1, 64) - extra == pytest.approx(0.015, rel=0.1)
    assert live.step(4, 64) - extra == pytest.approx(0.020, rel=0.1)
    # What was not seen follows its neighbours, at other depths too.
    assert live.step(2, 64) > 0.013
    assert live.step(1, 512) - extra == pytest.approx(0.014 * 1.5, rel=0.1)


def test_a_hiccup_counts_little_and_nothing_runs_away():
    live = LiveCosts(TABLE)
    before = live.step(1, 64)
    live.observe(1, 64, 5.0)
    assert live.step(1, 64) < 1.06 * before
    for _ in range(500):
        live.observe(1, 64, 5.0)
    assert live.step(1, 64) == pytest.approx(0.030 + TABLE.overhead)
    for _ in range(500):
        live.observe(1, 64, 1e-9)
    assert live.step(1, 64) == pytest.approx(0.010 / 3 + TABLE.overhead)
    for bad in (0.0, -1.0, float("nan"), float("inf")):
        live.observe(1, 64, bad)
    live.observe(99, 64, 1.0)
    assert live.step(1, 64) == pytest.approx(0.010 / 3 + TABLE.overhead)


class Clock:
    """A runner whose steps take a set time on a clock of its own."""

    def __init__(self, monkeypatch, seconds, capacity=2048):
        self.now, self.seconds, self.ran = 0.0, seconds, []
        self.arena = SimpleNamespace(length=0, capacity=capacity, arrays={})
        self.arena.rewind = lambda length: setattr(self.arena, "length", length)
        self.arena.pretend = self.arena.rewind
        model = SimpleNamespace(vocab=100)
        self.manifest = SimpleNamespace(
            name="m",
            lowerings={},
            model=model,
            kv=SimpleNamespace(capacity=capacity),
            files={"model.onnx": FileEntry(1, "a")},
        )
        monkeypatch.setattr(module.time, "perf_counter", lambda: self.now)

    def step(self, ids, *, want="last"):
        assert want == "all"
        self.ran.append((len(ids), self.arena.length))
        self.now += self.seconds(len(ids), self.arena.length, len(self.ran))
        self.arena.length += len(ids)
        return np.zeros((len(ids), 1), np.float32)


def test_measured_is_what_the_steps_took(monkeypatch):
    runner = Clock(monkeypatch, lambda n, depth, _: 0.001 * n + 1e-6 * depth)
    seen = []
    costs = measure_costs(runner, (64, 512), (1, 2, 4), lambda *args: seen.append(args))
    assert costs.rows == (1, 2, 4) and costs.depths == (64, 512)
    np.testing.assert_allclose(costs.seconds[0], [0.001064, 0.002064, 0.004064])
    np.testing.assert_allclose(costs.seconds[1], [0.001512, 0.002512, 0.004512])
    assert runner.arena.length == 0
    assert seen[-1] == ("measure", 6, 6) and all(s[0] == "measure" for s in seen)


def test_one_slow_call_does_not_count_and_more_rows_never_cost_less(monkeypatch):
    def seconds(n, depth, call):
        return 9.0 if call == 1 else {1: 0.004, 2: 0.002, 4: 0.005}[n]

    costs = measure_costs(Clock(monkeypatch, seconds), (64,), (1, 2, 4))
    np.testing.assert_allclose(costs.seconds[0], [0.003, 0.003, 0.005])


def test_a_busy_machine_is_asked_more_often(monkeypatch):
    def seconds(n, depth, call):
        return 0.001 if call in (5, 9) else 0.001 * (2 + call % 3)

    runner = Clock(monkeypatch, seconds)
    costs = measure_costs(runner, (64,), (1, 2))
    assert costs.seconds[0][0] == pytest.approx(0.001) and 6 < len(runner.ran) <= 14
    always = Clock(monkeypatch, lambda n, depth, call: 1e-6 * 2**call)
    measure_costs(always, (64,), (1, 2))
    assert len(always.ran) == 14


def test_the_time_is_bounded_and_small_caches_are_measured_too(monkeypatch):
    runner = Clock(monkeypatch, lambda *_: 1.0)
    assert measure_costs(runner, (64, 512, 1900), (1, 2)).depths == (64,)
    assert len(runner.ran) == 4
    runner = Clock(monkeypatch, lambda *_: 0.001, capacity=100)
    assert measure_costs(runner, (64, 512)).depths == (64,)
    runner = Clock(monkeypatch, lambda *_: 0.001, capacity=20)
    costs = measure_costs(runner, (64, 512))
    assert costs.depths == (4,) and costs.rows[-1] == 16
    runner = Clock(monkeypatch, lambda *_: 0.001, capacity=4)
    assert measure_costs(runner).rows == (1, 2, 3)


def test_a_cache_in_use_is_not_measured_on(monkeypatch):
    runner = Clock(monkeypatch, lambda *_: 0.001)
    runner.arena.length = 3
    with pytest.raises(OptionError, match="empty"):
        measure_costs(runner)
    assert runner.arena.length == 3


def test_the_cache_is_empty_again_after_a_failure(monkeypatch):
    def fail(*_):
        raise RuntimeError("the device went away")

    runner = Clock(monkeypatch, fail)
    with pytest.raises(RuntimeError):
        measure_costs(runner)
    assert runner.arena.length == 0


def test_a_real_runner_is_measured_and_left_as_it_was(tmp_path):
    manifest, folder = tiny_bundle("llama", tmp_path)
    runner = Runner(manifest, folder, threads=1)
    before = runner.step([3, 4, 5]).copy()
    runner.arena.rewind(0)
    costs = measure_costs(runner)
    assert costs.depths == (64,) and costs.rows[-1] == 16
    np.testing.assert_array_equal(runner.step([3, 4, 5]), before)


def test_costs_are_remembered_by_machine_bundle_device_and_threads(tmp_path, monkeypatch):
    runner = Clock(monkeypatch, lambda *_: 0.001)
    key = costs_key(runner.manifest, "cpu", 2)
    remember_costs(key, TABLE, tmp_path)
    assert remembered_costs(key, tmp_path) == TABLE
    for device, threads in (("webgpu", 2), ("cpu", 1)):
        assert remembered_costs(costs_key(runner.manifest, device, threads), tmp_path) is None
    runner.manifest.kv.capacity = 100
    assert remembered_costs(costs_key(runner.manifest, "cpu", 2), tmp_path) is None
    runner.manifest.kv.capacity = 2048
    assert costs_key(runner.manifest, "cpu", 2) == key
    runner.manifest.files = {"model.onnx": FileEntry(1, "b")}
    assert remembered_costs(costs_key(runner.manifest, "cpu", 2), tmp_path) is None
    monkeypatch.setattr("forerun.devices.remember.cpu_name", lambda: "another processor")
    assert remembered_costs(key, tmp_path) is None


@pytest.mark.parametrize(
    "damage",
    [
        "",
        "[]",
        "{",
        "null",
        "ENTRY:1",
        'ENTRY:{"value": 3}',
        'ENTRY:{"value": {"rows": [1], "depths": [64], "seconds": [["x"]], "overhead": 0.1}}',
        'ENTRY:{"value": {"rows": [1], "depths": [64], "seconds": [[-1.0]], "overhead": 0.1}}',
        'ENTRY:{"value": {"rows": [1], "depths": [64], "seconds": [[1.0]], "more": 1}}',
    ],
)
def test_a_damaged_file_means_measuring_again(damage, tmp_path):
    remember_costs("key", TABLE, tmp_path)
    path = tmp_path / "costs.json"
    (full,) = json.loads(path.read_text())
    entry = damage.removeprefix("ENTRY:")
    path.write_text(f"{{{json.dumps(full)}: {entry}}}" if entry != damage else damage)
    assert remembered_costs("key", tmp_path) is None
    remember_costs("key", TABLE, tmp_path)
    assert remembered_costs("key", tmp_path) == TABLE


def test_the_file_stays_small_and_a_read_only_folder_is_no_error(tmp_path):
    store = Remembered("costs", tmp_path)
    for number in range(70):
        store.write(str(number), number)
    assert len(json.loads((tmp_path / "costs.json").read_text())) == 64
    assert store.read("69") == 69
    (tmp_path / "file").write_text("")
    Remembered("costs", tmp_path / "file").write("a", 1)
    assert Remembered("costs", tmp_path / "file").read("a") is None


def _wide(runner):
    return sum(1 for ran in runner.ran if ran[0] > 1)


def test_target_costs_measures_once_and_again_for_deeper_text(tmp_path, monkeypatch):
    monkeypatch.setenv("FORERUN_HOME", str(tmp_path))
    runner = Clock(monkeypatch, lambda *_: 0.001)
    first = target_costs(runner, "cpu", 2)
    ran = _wide(runner)
    assert ran and target_costs(runner, "cpu", 2) == first and _wide(runner) == ran
    deep = target_costs(runner, "cpu", 2, depths=module.DEEP)
    assert deep.depths == module.DEEP and _wide(runner) > ran
    ran = _wide(runner)
    assert target_costs(runner, "cpu", 2) == deep and _wide(runner) == ran
    target_costs(runner, "cpu", 2, fresh=True)
    assert _wide(runner) > ran


@pytest.mark.parametrize("now", [0.0001, 0.01])
def test_costs_that_are_no_longer_true_are_measured_again(now, tmp_path, monkeypatch):
    monkeypatch.setenv("FORERUN_HOME", str(tmp_path))
    seconds = [0.001]
    runner = Clock(monkeypatch, lambda *_: seconds[0])
    target_costs(runner, "cpu", 2)
    seconds[0] = now
    again = target_costs(runner, "cpu", 2)
    assert again.step(1, 64) == pytest.approx(now, rel=0.2)
    assert runner.arena.length == 0
