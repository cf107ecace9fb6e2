import numpy as np
import pytest
from draft_toys import VOCAB, logits_for, plain, replay
from hypothesis import given
from hypothesis import strategies as st

from forerun.errors import OptionError
from forerun.runtime.drafting.drafter import Outcome
from forerun.runtime.drafting.recycle import RecycleDrafter
from forerun.runtime.drafting.top import top_ids
from forerun.runtime.drafting.tree import TokenTree

IDS = st.lists(st.integers(0, 5), min_size=1, max_size=30)


def taught(*pairs, **options):
    """A drafter that has seen rows (token, best, second)."""
    drafter = RecycleDrafter(VOCAB, **options)
    drafter.begin([49], None)
    for token, best, second in pairs:
        logits = logits_for(best, second=second)[None]
        drafter.observe(Outcome(TokenTree.EMPTY, (), (best,), (token,), logits))
    return drafter


def test_it_proposes_what_the_target_thought_before():
    drafter = taught((1, 2, 3), (2, 4, 5), (4, 6, 7))
    drafter.begin([30, 1], None)
    tree = drafter.propose(3)
    assert tree.tokens == (2, 4, 6) and tree.is_chain
    assert set(tree.sources) == {"recycle"}
    assert len(taught().propose(3)) == 0


def test_rows_off_the_path_are_not_learned():
    drafter = RecycleDrafter(VOCAB)
    drafter.begin([1], None)
    tree = TokenTree.chain((2, 3), (0.5, 0.5), "x")
    logits = np.stack([logits_for(2), logits_for(7), logits_for(9)])
    drafter.observe(Outcome(tree, (0,), (2, 7), (1, 2, 3), logits))
    drafter.begin([30, 2], None)
    assert drafter.propose(1).tokens == (7,)
    drafter.begin([30, 3], None)
    assert len(drafter.propose(1)) == 0


def test_clear_rows_are_surer_than_doubtful_ones():
    drafter = RecycleDrafter(VOCAB)
    for token, lead in ((1, 0.1), (2, 9.0)):
        row = logits_for(5, second=6)
        row[6] = row[5] - lead
        drafter.begin([token], None)
        drafter.observe(Outcome(TokenTree.EMPTY, (), (5,), (token,), row[None]))
    chances = []
    for token in (1, 2):
        drafter.begin([30, token], None)
        chances.append(drafter.propose(1).confidences[0])
    assert chances[0] < chances[1]


def test_trigrams_of_the_text_are_used():
    drafter = RecycleDrafter(VOCAB)
    drafter.begin([1, 2, 3, 4, 9, 1, 2], None)
    assert drafter.propose(2).tokens == (3, 4)
    drafter.begin([1, 2, 3, 1, 2, 3, 1, 2, 7, 1, 2], None)
    assert drafter.propose(1).tokens == (3,)


def test_trees_are_best_first():
    drafter = taught((1, 2, 3), (2, 4, 5), (3, 6, 7), branches=2)
    drafter.begin([30, 1], None)
    tree = drafter.propose(6)
    assert drafter.proposes_trees
    assert tree.tokens[0] == 2 and {tree.tokens[c] for c in tree.children(-1)} == {2, 3}
    values = tree.values()
    assert np.all(np.diff(values) <= 1e-12)


def test_a_second_pass_over_a_text_is_drafted():
    drafter = RecycleDrafter(VOCAB)
    text = [(7 * i) % 43 for i in range(40)]
    first = replay(drafter, [44], text)
    second = replay(drafter, [45], text)
    assert second[0] < first[0] and second[1] > 20


@given(IDS, st.lists(st.tuples(st.booleans(), st.integers(0, 30), IDS), max_size=6))
def test_any_history_proposes_what_a_fresh_drafter_does(ids, events):
    drafter, fresh = RecycleDrafter(VOCAB, branches=2), RecycleDrafter(VOCAB, branches=2)
    drafter.begin(ids, None)
    for cuts, length, more in events:
        if cuts:
            ids = ids[: max(length, 1)]
            drafter.rewind(len(ids))
        else:
            ids = ids + more
            drafter.observe(plain(*more))
    fresh.begin(ids, None)
    assert drafter.propose(6) == fresh.propose(6)


@given(st.lists(st.integers(0, 9), min_size=5, max_size=40), st.integers(1, 5))
def test_top_ids_are_those_of_a_stable_sort(values, count):
    row = np.array(values, np.float32)
    assert top_ids(row, count).tolist() == np.argsort(-row, kind="stable")[:count].tolist()
    assert row.tolist() == values


@pytest.mark.parametrize("options", [{"width": 0}, {"branches": 17}, {"vocab": 0}])
def test_wrong_options_are_named(options):
    with pytest.raises(OptionError, match="got"):
        RecycleDrafter(**{"vocab": VOCAB, **options})
