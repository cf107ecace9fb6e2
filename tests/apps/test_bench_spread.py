import pytest

from forerun.apps.bench.spread import SCATTER_LIMIT, Spread, ratio, spread


def test_spread_reports_median_extremes_and_all_runs():
    found = spread([100.0, None, 90.0, 110.0])
    assert found is not None
    assert found.to_json() == {
        "median": 100.0,
        "min": 90.0,
        "max": 110.0,
        "scatter": 0.2,
        "runs": [100.0, 90.0, 110.0],
    }


def test_spread_of_nothing_is_none():
    assert spread([None, None]) is None


def test_scatter_is_relative_to_the_median_and_the_limit_is_inclusive():
    assert Spread((90.0, 100.0, 110.0)).steady
    assert not Spread((90.0, 100.0, 110.1)).steady
    assert Spread((90.0, 100.0, 110.1)).scatter > SCATTER_LIMIT


def test_ratio_of_medians():
    made = ratio(Spread((150.0, 152.0, 148.0)), Spread((100.0, 99.0, 101.0)))
    assert made is not None
    assert made.value == pytest.approx(1.5)
    assert made.steady


def test_drift_of_the_machine_cancels_in_paired_ratios_but_is_said():
    ours, theirs = Spread((200.0, 150.0, 100.0)), Spread((100.0, 75.0, 50.0))
    made = ratio(ours, theirs)
    assert made is not None
    assert made.paired.values == (2.0, 2.0, 2.0)
    assert made.to_json()["steady"] is False


def test_one_shaky_side_makes_the_ratio_unsteady():
    steady, shaky = Spread((100.0, 101.0, 99.0)), Spread((100.0, 50.0, 99.0))
    for pair in ((steady, shaky), (shaky, steady)):
        made = ratio(*pair)
        assert made is not None
        assert not made.steady


def test_no_ratio_to_nothing():
    assert ratio(Spread((1.0,)), Spread((0.0,))) is None
