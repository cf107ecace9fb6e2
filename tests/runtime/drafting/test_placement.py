"""Which device runs what: the choice follows the formulas, and tells why in two lines."""

import pytest

from forerun.errors import DeviceError, UnsupportedError
from forerun.runtime.drafting import formulas
from forerun.runtime.drafting.costs import StepCosts
from forerun.runtime.drafting.placement import (
    ESTIMATES,
    DrafterPlace,
    TargetPlace,
    choose_placement,
)
from forerun.runtime.drafting.schedules import SCHEDULES


def best_schedule(target, drafter, **options):
    return choose_placement([target], [drafter], **options)


def target(device="cpu", seconds=0.010, growth=0.0, threads=2):
    lines = (tuple(seconds * (1 + growth * (n - 1)) for n in (1, 2, 16)),)
    return TargetPlace(device, threads, StepCosts((1, 2, 16), (64,), lines, 0.03 * seconds))


def drafter(c, alpha, device="cpu", seconds=0.010, **more):
    more.setdefault("runs_ahead", True)
    return DrafterPlace("model", device, 1, c * seconds, alpha, **more)


# (c, alpha) to the schedule that the published table calls best, where it is clearly so.
@pytest.mark.parametrize(
    "c, alpha, schedules",
    [
        (0.05, 0.5, {"serial"}),
        (0.05, 0.7, {"serial"}),
        (0.20, 0.7, {"pearl"}),
        (0.30, 0.7, {"pearl"}),
        (0.50, 0.5, {"pearl"}),
        (0.50, 0.85, {"pearl"}),
        (0.10, 0.85, {"pearl", "optimistic"}),
        (0.30, 0.85, {"pearl", "optimistic"}),
    ],
)
def test_the_schedule_is_the_one_the_formulas_favour(c, alpha, schedules):
    found = best_schedule(target("webgpu"), drafter(c, alpha))
    assert found.schedule in schedules
    assert found.overlaps == (found.schedule != "serial")
    assert found.target == "webgpu" and found.draft == "cpu"


def test_every_schedule_that_is_chosen_can_be_run():
    assert set(ESTIMATES) == set(SCHEDULES)


def test_drafters_without_a_model_and_single_devices_are_serial():
    assert best_schedule(target("webgpu"), drafter(0.5, 0.85, runs_ahead=False)).schedule in (
        "serial",
        "plain",
    )
    both = best_schedule(target("webgpu"), drafter(0.3, 0.8, device="webgpu"))
    assert both.schedule == "serial"


def test_shared_memory_ends_overlap_on_the_processor():
    free = best_schedule(target(), drafter(0.3, 0.8), kappa=0.0, cores=3)
    shared = best_schedule(target(), drafter(0.3, 0.8), kappa=0.6, cores=3)
    assert free.overlaps and shared.schedule == "serial"
    apart = best_schedule(target("webgpu"), drafter(0.3, 0.8), kappa=0.6)
    assert apart.overlaps and apart.speedup == free.speedup


def test_overlap_on_the_processor_needs_cores_for_both():
    assert best_schedule(target(), drafter(0.3, 0.8), cores=3).overlaps
    assert not best_schedule(target(), drafter(0.3, 0.8), cores=2).overlaps
    assert best_schedule(target(threads=1), drafter(0.3, 0.8), cores=2).overlaps
    assert best_schedule(target("webgpu"), drafter(0.3, 0.8), cores=1).overlaps


def test_several_first_tokens_pay_when_the_first_is_doubtful():
    doubtful = drafter(0.25, 0.4, firsts=(0.4, 0.8))
    assert best_schedule(target("webgpu"), doubtful).schedule == "duo"
    sure = drafter(0.25, 0.4, firsts=(0.4, 0.45))
    assert best_schedule(target("webgpu"), sure).schedule == "pearl"


def test_plain_decoding_when_nothing_pays():
    found = choose_placement([target(growth=1.0)], [drafter(0.5, 0.3)])
    assert (found.schedule, found.drafter, found.draft) == ("plain", "none", None)
    assert found.speedup == 1.0 and found.tokens == 0 and found.draft_threads == 0
    assert choose_placement([target()], []).schedule == "plain"


def test_the_faster_device_and_the_better_drafter_win():
    slow, fast = target("cpu", 0.030), target("webgpu", 0.010)
    copies = DrafterPlace("ngram", "cpu", 0, 1e-5, 0.8, hits=0.1, one_call=True)
    model = drafter(0.3, 0.75)
    found = choose_placement([slow, fast], [copies, model])
    assert (found.target, found.drafter) == ("webgpu", "model")
    assert choose_placement([slow, fast], [copies]).drafter == "ngram"
    alone = choose_placement([slow], [copies])
    expected = max(
        formulas.with_misses(0.1, 0.8, n, (1.0 + 0.03) / 1.03, 1e-5 / 0.0309 / n)
        for n in range(1, 17)
    )
    assert alone.speedup == pytest.approx(expected, rel=0.01)


def test_the_number_of_tokens_follows_what_rows_cost():
    cheap = best_schedule(target(growth=0.02), drafter(0.02, 0.9))
    dear = best_schedule(target(growth=0.35), drafter(0.02, 0.9))
    assert cheap.tokens > dear.tokens >= 1


def test_the_reason_has_two_lines_with_the_choice_and_the_next_best():
    found = choose_placement([target("cpu", 0.030), target("webgpu")], [drafter(0.3, 0.75)])
    first, second = found.reason.splitlines()
    assert "webgpu" in first and "model on cpu" in first and found.schedule in first
    assert "tokens/s" in first and "next best" in second
    alone = choose_placement([target()], [])
    assert "no drafter" in alone.reason and "nothing else" in alone.reason


def test_only_one_schedule_and_a_drafter_that_is_chosen():
    free = {"target": target("webgpu"), "drafter": drafter(0.3, 0.7)}
    assert best_schedule(**free).schedule == "pearl"
    for name in ("serial", "optimistic"):
        assert best_schedule(**free, schedule=name).schedule == name
    slow = {"target": target(growth=1.0), "drafter": drafter(0.5, 0.3)}
    assert best_schedule(**slow).schedule == "plain"
    found = best_schedule(**slow, is_chosen=True)
    assert found.drafter == "model" and found.speedup < 1
    assert "faster would be: plain decoding" in found.reason
    assert choose_placement([target()], [], is_chosen=True).schedule == "plain"


def test_drafting_can_be_kept_to_one_device_of_the_target():
    copies = DrafterPlace("ngram", "cpu", 0, 1e-5, 0.8, hits=0.9, one_call=True)
    places = [target("cpu", 0.020), target("webgpu", 0.010)]
    assert choose_placement(places, [copies]).target == "webgpu"
    kept = choose_placement(places, [copies], drafted_on="cpu")
    assert (kept.target, kept.drafter) in {("cpu", "ngram"), ("webgpu", "none")}
    assert choose_placement(places[1:], [copies], drafted_on="cpu").drafter == "none"


def test_a_schedule_that_nothing_can_follow_is_refused_and_duo_is_not():
    with pytest.raises(UnsupportedError, match="the schedule pearl needs a draft model"):
        choose_placement([target()], [drafter(0.3, 0.8)], cores=2, schedule="pearl")
    found = choose_placement([target("webgpu")], [drafter(0.3, 0.8)], schedule="duo")
    assert found.schedule == "duo"
    assert choose_placement([target()], [], schedule="pearl").schedule == "plain"


def test_no_device_is_an_error():
    with pytest.raises(DeviceError, match="forerun devices"):
        choose_placement([], [drafter(0.1, 0.7)])
