import random

import numpy as np
import pytest

from forerun.runtime.drafting.calibration import Calibration
from forerun.runtime.drafting.tree import TokenTree


def chain(*confidences, source="head"):
    return TokenTree.chain(list(range(1, len(confidences) + 1)), confidences, source)


def test_before_anything_was_seen_a_node_is_worth_what_its_drafter_says():
    values = Calibration().value(chain(0.9, 0.5, 0.4))
    assert values.dtype == np.float64
    np.testing.assert_allclose(values, [0.9, 0.45, 0.18])


@pytest.mark.parametrize("truth", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("said", [0.05, 0.6, 1.0])
def test_what_was_seen_replaces_what_is_said(truth, said):
    calibration, rng = Calibration(), random.Random(1)
    for _ in range(400):
        calibration.observe(chain(said), [0] if rng.random() < truth else [])
    assert calibration.rate("head", 1, said) == pytest.approx(truth, abs=0.15)
    assert calibration.mean("head", 1) == pytest.approx(truth, abs=0.15)


def test_bins_keep_drafters_depths_and_confidences_apart():
    calibration = Calibration()
    for _ in range(50):
        calibration.observe(chain(0.9, 0.9), [0])
    assert calibration.rate("head", 1, 0.9) > 0.95
    assert calibration.rate("head", 2, 0.9) < 0.1
    assert calibration.rate("head", 3, 0.9) == pytest.approx(0.9)
    assert calibration.rate("head", 1, 0.3) == pytest.approx(0.3)
    assert calibration.rate("ngram", 1, 0.9) == pytest.approx(0.9)
    for _ in range(50):
        calibration.observe(chain(*[0.9] * 5), [0, 1, 2, 3, 4])
    assert calibration.rate("head", 4, 0.9) == calibration.rate("head", 9, 0.9) > 0.95


def test_the_past_fades():
    calibration = Calibration()
    for _ in range(300):
        calibration.observe(chain(0.9), [0])
    for _ in range(100):
        calibration.observe(chain(0.9), [])
    assert calibration.rate("head", 1, 0.9) < 0.25


def test_nodes_behind_a_wrong_one_are_not_counted():
    calibration = Calibration()
    calibration.observe(chain(0.5, 0.5), [])
    assert calibration.rate("head", 1, 0.5) < 0.5
    assert calibration.rate("head", 2, 0.5) == 0.5


def test_a_tree_counts_siblings_and_multiplies_along_paths():
    tree = TokenTree((5, 6, 7), (-1, -1, 1), (0.6, 0.3, 0.5), ("a", "a", "a"))
    calibration = Calibration()
    np.testing.assert_allclose(calibration.value(tree), [0.6, 0.3, 0.15])
    calibration.observe(tree, [1, 2])
    assert calibration.rate("a", 1, 0.6) < 0.6
    assert calibration.rate("a", 1, 0.3) > 0.3
    assert calibration.rate("a", 2, 0.5) > 0.5


def test_the_text_judges_what_was_not_verified():
    tree = chain(0.5, 0.5, 0.5)
    calibration, verified = Calibration(), Calibration()
    calibration.judge(tree, [1, 9])
    verified.observe(tree, [0])
    for depth in (1, 2, 3):
        assert calibration.rate("head", depth, 0.5) == verified.rate("head", depth, 0.5)


def test_draws_have_the_mean_and_are_wider_where_less_is_known():
    calibration, noise = Calibration(), random.Random(0)
    tree = chain(0.7)

    def spread():
        draws = [calibration.values(tree, noise)[0] for _ in range(2000)]
        single = [calibration.draw("head", 1, 0.7, noise) for _ in range(2000)]
        for some in (draws, single):
            assert np.mean(some) == pytest.approx(calibration.rate("head", 1, 0.7), abs=0.02)
        return np.std(draws)

    unknown = spread()
    for number in range(40):
        calibration.observe(tree, [0] if number % 10 < 7 else [])
    assert spread() < 0.5 * unknown
