import numpy as np
import pytest

from forerun.export.training.score import Scores

RIGHT = np.array(
    [[1, 1, 0], [1, 0, 1], [0, 1, 1], [1, 1, 1], [0, 0, 0], [1, 1, 1], [1, 1, 1]], bool
)
VALID = np.array([[1, 1, 1]] * 5 + [[1, 1, 0], [1, 0, 0]], bool)


def test_a_step_counts_only_where_all_before_were_right():
    scores = Scores(3)
    scores.add("story", RIGHT, VALID)
    # First: 5 of 7. Second: tried where the first was right and the answer goes on (rows 0, 1, 3,
    # 5), right in 3. Third: tried in rows 0 and 3 (row 5 ends), right in one.
    assert scores.total.rates() == pytest.approx([5 / 7, 3 / 4, 1 / 2])


def test_rounds_walk_over_the_answer():
    scores = Scores(3)
    scores.add("story", RIGHT, VALID)
    # Row 0 gains 2 + 1, row 3 gains 3 + 1: done.
    assert (scores.total.rounds, scores.total.tokens) == (2, 7)
    assert scores.total.per_round() == 3.5


def test_facts_tell_steps_and_categories():
    scores = Scores(3)
    scores.add("story", RIGHT, VALID)
    scores.add("list", RIGHT[:1], VALID[:1])
    facts = scores.facts()
    assert set(facts) == {"1", "2", "3", "tokens_per_round", "by_category"}
    assert facts["by_category"]["list"] == {"1": 1.0, "tokens_per_round": 3.0}
    assert facts["by_category"]["story"]["1"] == round(5 / 7, 4)
