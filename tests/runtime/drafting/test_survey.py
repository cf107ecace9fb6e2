"""Measuring a model with its drafters on this machine, and placing them by that."""

import dataclasses
import json
import math
import shutil

import pytest

from forerun.devices.request import DeviceRequest
from forerun.errors import BundleError, DeviceError, OptionError
from forerun.runtime import open as opening
from forerun.runtime.drafting import costs, survey
from forerun.runtime.drafting import draft_costs as costing
from forerun.runtime.drafting.costs import StepCosts, costs_key, remember_costs
from forerun.runtime.drafting.draft_costs import (
    DraftCosts,
    draft_costs_key,
    measure_drafter,
    remember_draft_costs,
    remembered_draft_costs,
)
from forerun.runtime.drafting.registry import DrafterContext
from forerun.runtime.drafting.survey import (
    Bandwidth,
    TooSlowError,
    acceptance_of,
    measured_bandwidth,
    measured_drafters,
    measured_target,
    place,
)
from forerun.runtime.drafting.tree import TokenTree
from tests.tiny import tiny_bundle

CPU = DeviceRequest("cpu", "cpu")


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("FORERUN_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def believed(monkeypatch):
    """Remembered costs are taken for true."""
    monkeypatch.setattr(costs, "_still_true", lambda runner, known: True)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return tiny_bundle("llama", tmp_path_factory.mktemp("tiny"))


class Slow:
    """Takes 2 ms a call and 3 ms a token on a clock of its own."""

    name, needs_features, proposes_trees = "slow", True, False

    def __init__(self, monkeypatch):
        self.now, self.begun, self.told, self.length = 0.0, None, [], None
        monkeypatch.setattr(costing.time, "perf_counter", lambda: self.now)

    def begin(self, ids, features):
        self.begun = ids, features

    def propose(self, budget, keep_going):
        assert keep_going(0.1)
        self.now += 0.003 * budget
        return TokenTree.chain([1] * budget, [0.5] * budget, self.name)

    def observe(self, outcome):
        self.now += 0.002
        self.told.append(outcome)

    def rewind(self, length):
        self.length = length


def test_a_drafter_costs_a_part_per_call_and_a_part_per_token(made, monkeypatch):
    drafter = Slow(monkeypatch)
    costs = measure_drafter(drafter, made[0])
    assert costs.name == "slow" and costs.device == "cpu" and not costs.runs_ahead
    assert costs.call_seconds == pytest.approx(0.002)
    assert costs.step_seconds == pytest.approx(0.003)
    assert costs.seconds(4) == pytest.approx(0.014)
    assert drafter.length == 0
    ids, _ = drafter.begun
    # The text repeats itself, and what is told of it goes on with it.
    assert ids[:10] == ids[48:58] and drafter.told[0].new_tokens[0] == ids[len(ids) - 48]
    assert drafter.told[0].logits.shape == (1, made[0].model.vocab)


@pytest.mark.parametrize("damage", ['{"name": "x"}', "3", '{"call_seconds": -1.0}'])
def test_drafter_costs_are_remembered_and_damage_is_not_trusted(damage, home):
    costs = DraftCosts("x", "cpu", 0.001, 0.002)
    remember_draft_costs("key", costs)
    assert remembered_draft_costs("key") == costs
    assert remembered_draft_costs("other") is None
    path = home / "cache" / "draft-costs.json"
    data = json.loads(path.read_text())
    (entry,) = data.values()
    value = json.loads(damage)
    entry["value"] = {**entry["value"], **value} if "call_seconds" in damage else value
    path.write_text(json.dumps(data))
    assert remembered_draft_costs("key") is None


def test_costs_of_a_trained_drafter_end_with_its_files(tmp_path):
    (tmp_path / "drafter.json").write_text("{}")
    first = draft_costs_key("t", "head", tmp_path)
    assert first == draft_costs_key("t", "head", tmp_path)
    (tmp_path / "drafter.json").write_text('{"a": 1}')
    assert (
        len({first, draft_costs_key("t", "head", tmp_path), draft_costs_key("t", "head", None)})
        == 3
    )


def test_the_target_is_measured_only_when_nothing_true_is_remembered(made, believed, monkeypatch):
    seen = []
    first = measured_target(*made, "cpu", 1, lambda *args: seen.append(args[0]))
    assert seen and set(seen) == {"measure"}
    seen.clear()
    assert measured_target(*made, "cpu", 1, lambda *args: seen.append(args[0])) == first
    assert not seen
    monkeypatch.setattr(costs, "_still_true", lambda runner, known: False)
    measured_target(*made, "cpu", 1, lambda *args: seen.append(args[0]))
    assert seen, "a table that is no longer true is measured again"


def test_a_slow_device_is_measured_again_with_as_few_rows(made, monkeypatch):
    key = costs_key(made[0], "cpu", 1)
    remember_costs(key, StepCosts((1, 2), (64,), ((9.0, 9.0),)))
    assert measured_target(*made, "cpu", 1).rows == (1, 2)


def test_every_drafter_that_is_here_is_measured_once(made, monkeypatch):
    context = DrafterContext(*made, threads=1)
    seen = []
    found = measured_drafters(context, "target", lambda *args: seen.append(args))
    assert [row.name for row in found] == ["ngram", "recycle"]
    assert all(row.seconds(4) > 0 and not row.runs_ahead for row in found)
    assert seen[-1] == ("drafters", 2, 2)
    monkeypatch.setattr(survey, "measure_drafter", None)
    assert measured_drafters(context, "target") == found


def test_a_draft_model_is_measured_too_and_may_run_ahead(made, tmp_path):
    manifest, folder = made
    name = tmp_path / "m" / "int4"
    shutil.copytree(folder, name)
    shutil.copytree(folder, tmp_path / "m" / "drafters" / "model")
    context = DrafterContext(manifest, name, threads=1)
    row = measured_drafters(context, "target")[-1]
    assert row.name == "model" and row.runs_ahead and row.step_seconds > 0
    assert acceptance_of("model", context) == survey.HABITS["model"]


def test_bandwidth_is_measured_once(monkeypatch):
    rates = iter([4e9, 6e9])
    monkeypatch.setattr(survey, "read_bandwidth", lambda threads: next(rates))
    monkeypatch.setattr(survey, "default_threads", lambda: 2)
    first = measured_bandwidth()
    assert first == Bandwidth(4e9, 6e9, 2) == measured_bandwidth()
    assert first.kappa == pytest.approx(1 / 3)
    survey.Remembered("bandwidth").write("2", ["fast", 1])
    rates = iter([1e9, 2e9])
    assert measured_bandwidth().alone == 1e9


def test_a_placement_comes_from_what_was_measured(made, believed):
    manifest, folder = made
    cheap = StepCosts((1, 16), (64,), ((0.010, 0.011),))
    remember_costs(costs_key(manifest, "cpu", 1), cheap)
    found = place(manifest, folder, CPU, threads=1)
    assert (found.target, found.drafter, found.draft) == ("cpu", "ngram", "cpu")
    assert found.schedule == "serial" and found.speedup > 1.1
    assert found.reason.count("\n") == 1
    assert place(manifest, folder, CPU, drafter="none", threads=1).schedule == "plain"
    assert place(manifest, folder, CPU, drafter="recycle", threads=1).drafter == "recycle"
    dear = StepCosts((1, 16), (64,), ((0.010, 0.160),))
    remember_costs(costs_key(manifest, "cpu", 1), dear)
    assert place(manifest, folder, CPU, threads=1).schedule == "plain"


def test_auto_looks_at_the_devices_that_are_here_and_that_the_bundle_has_forms_for(
    made, monkeypatch
):
    manifest, folder = made
    tried = []

    def measured(manifest, folder, device, threads, progress, limit):
        tried.append(device)
        return StepCosts((1, 16), (64,), ((0.010, 0.011),))

    monkeypatch.setattr(survey, "measured_target", measured)
    monkeypatch.setattr(opening, "missing", lambda row: "")
    found = place(manifest, folder, DeviceRequest(None, None), drafter="none", threads=1)
    assert found.target == "cpu" and tried == ["cpu", "webgpu"]
    with pytest.raises(OptionError):
        place(manifest, folder, DeviceRequest("abacus", "cpu"), threads=1)


def test_threads_measured_for_the_default_layout_do_for_the_others(made, monkeypatch):
    whole, folder = made
    view = dataclasses.replace(whole, name="view")
    best = {id(whole): 3, id(view): None}
    monkeypatch.setattr("forerun.runtime.probe.best_threads", lambda m: best[id(m)])
    monkeypatch.setattr(survey, "measured_target", lambda *_, **__: TABLE)
    assert place(view, folder, CPU, drafter="none", whole=whole).threads == 3
    best[id(view)] = 4
    assert place(view, folder, CPU, drafter="none", whole=whole).threads == 4
    assert place(view, folder, CPU, drafter="none", threads=1, whole=whole).threads == 1


def test_a_device_that_was_asked_for_must_have_a_form(made):
    with pytest.raises(BundleError):
        place(*made, DeviceRequest("qnn", "cpu"), drafter="none", threads=1)


TABLE = StepCosts((1, 16), (64,), ((0.010, 0.011),))


def limits_of(monkeypatch, devices, slow):
    """Which limit each device gets, where `slow` ones exceed theirs."""
    limits = {}

    def measured(manifest, folder, device, threads, progress, limit=math.inf):
        limits[device] = limit
        if device in slow:
            raise TooSlowError(device, 2.5)
        return TABLE

    monkeypatch.setattr(survey, "measured_target", measured)
    monkeypatch.setattr("forerun.runtime.open.devices_for", lambda manifest: devices)
    return limits


def test_a_slow_device_is_out_and_the_reason_says_so(made, monkeypatch):
    limits = limits_of(monkeypatch, ["cpu", "webgpu"], {"webgpu"})
    drafters = []

    def measured_drafters(context, key, progress, limit):
        drafters.append(context.device)
        return []

    monkeypatch.setattr(survey, "measured_drafters", measured_drafters)
    found = place(*made, DeviceRequest(None, None), threads=1)
    # Nothing is faster than plain decoding by more than the tokens of a round.
    assert limits == {"cpu": math.inf, "webgpu": pytest.approx(0.17)}
    assert drafters == ["cpu"]
    first, second = found.reason.splitlines()
    assert "target on cpu" in first and second.endswith("webgpu is out, a step takes 2.5 s")
    limits = limits_of(monkeypatch, ["cpu", "webgpu"], {})
    place(*made, DeviceRequest("webgpu", "cpu"), threads=1)
    assert limits == {"webgpu": math.inf}, "a device that was asked for is never out"


def test_one_step_is_enough_to_see_that_a_device_is_slow(made, monkeypatch):
    monkeypatch.setattr(survey, "_step_seconds", lambda runner: 0.5)
    monkeypatch.setattr(survey, "target_costs", None)
    with pytest.raises(TooSlowError, match=r"cpu is out, a step takes 0\.5 s"):
        measured_target(*made, "cpu", 1, limit=0.4)
    with monkeypatch.context() as remembered:
        remembered.setattr("forerun.runtime.open.open_runner", None)
        with pytest.raises(TooSlowError):
            measured_target(*made, "cpu", 1, limit=0.4)
    # One that is merely slow is measured with few rows.
    costs = measured_target(*made, "cpu", 1, limit=1.0)
    assert costs.rows == (1, 2, 4, 8) and len(costs.depths) == 1


def test_a_slow_drafter_is_not_measured_further(made, monkeypatch):
    drafter = Slow(monkeypatch)
    with pytest.raises(DeviceError, match=r"slow takes 0\.005 s on webgpu"):
        measure_drafter(drafter, made[0], "webgpu", 0.004)
    assert len(drafter.told) == 2


def test_a_chosen_drafter_stays_even_if_plain_decoding_is_faster(made, believed):
    manifest, folder = made
    dear = StepCosts((1, 16), (64,), ((0.010, 0.160),))
    remember_costs(costs_key(manifest, "cpu", 1), dear)
    for name in ("ngram", "ngram+recycle", "auto"):
        found = place(manifest, folder, CPU, drafter=name, threads=1, is_chosen=True)
        assert (found.drafter, found.schedule, found.draft) == (name, "serial", "cpu")
        assert f"drafter {name} on cpu" in found.reason and "faster would be" in found.reason
    unknown = place(manifest, folder, CPU, drafter="psychic", threads=1, is_chosen=True)
    assert unknown.drafter == "none"


def test_threads_that_are_given_are_not_split(made, tmp_path, monkeypatch):
    manifest, folder = made
    name = tmp_path / "m" / "int4"
    shutil.copytree(folder, name)
    shutil.copytree(folder, tmp_path / "m" / "drafters" / "model")
    seen = []

    def measured(manifest, folder, device, threads, progress, limit=math.inf):
        seen.append(threads)
        return TABLE

    monkeypatch.setattr(survey, "measured_target", measured)
    monkeypatch.setattr(survey, "default_threads", lambda: 3)
    place(manifest, name, CPU, threads=2)
    assert seen == [2]
    place(manifest, name, CPU)
    assert seen == [2, 3, 2]
