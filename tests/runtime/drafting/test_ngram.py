import pytest
from draft_toys import plain, replay, verified
from hypothesis import given
from hypothesis import strategies as st

from forerun.errors import OptionError
from forerun.runtime.drafting.drafter import Outcome
from forerun.runtime.drafting.ngram import NgramDrafter

IDS = st.lists(st.integers(0, 5), min_size=1, max_size=40)


def proposed(ids, budget=4, **options):
    drafter = NgramDrafter(**options)
    drafter.begin(ids, None)
    return drafter.propose(budget)


def test_it_copies_what_followed_the_longest_match():
    text = [1, 2, 3, 7, 8, 9, 9, 2, 3, 5, 6, 1, 2, 3]
    tree = proposed(text, 3)
    assert tree.tokens == (7, 8, 9)
    assert tree.is_chain and set(tree.sources) == {"ngram"}


def test_the_most_recent_of_equal_matches_wins():
    assert proposed([1, 2, 3, 9, 1, 2, 4, 9, 1, 2], 1).tokens == (4,)


def test_a_repetition_feeds_on_itself():
    assert proposed([0, 7, 8, 7, 8, 7, 8], 5).tokens == (7, 8, 7, 8, 7)


def test_longer_matches_are_surer_and_rivals_less():
    prefix = [11, 12, 13, 14, 15, 16, 17, 18]
    long = proposed([*prefix, 20, *prefix], 1).confidences[0]
    short = proposed([16, 18, 20, 1, 16, 18], 1).confidences[0]
    rivals = proposed([16, 18, 20, 16, 18, 21, 16, 18], 1).confidences[0]
    assert long > short > rivals


def test_min_match_and_no_match():
    assert len(proposed([1, 2, 3, 1, 2], min_match=3)) == 0
    assert len(proposed([1, 2, 3, 1, 2], min_match=2)) == 4
    assert len(proposed([1, 2, 3, 9, 3], min_match=1)) == 4
    assert len(proposed([1, 2, 3, 4, 5])) == 0
    assert len(proposed([1], 4)) == 0
    assert len(proposed([1, 2, 1, 2], 0)) == 0


def test_it_goes_on_behind_an_edit():
    source = [1, 2, 3, 4, 5, 6, 7, 8]
    # One word became another, two did, and one was left out.
    assert proposed([*source, 0, 1, 2, 3, 40], 3).tokens == (5, 6, 7)
    assert proposed([*source, 0, 1, 2, 3, 40, 50], 3).tokens == (6, 7, 8)
    assert proposed([*source, 0, 1, 2, 3, 5], 3).tokens == (6, 7, 8)
    assert len(proposed([*source, 0, 1, 2, 3, 40], 3, resume=False)) == 0


def test_branches_offer_other_continuations():
    text = [1, 2, 3, 5, 6, 1, 2, 4, 7, 8, 1, 2]
    tree = proposed(text, 4, branches=2)
    firsts = {tree.tokens[node] for node in tree.children(-1)}
    assert firsts == {3, 4} and len(tree) == 4
    assert NgramDrafter(branches=2).proposes_trees and not NgramDrafter().proposes_trees


def test_copied_text_takes_few_rounds():
    text = list(range(1, 41))
    rounds, accepted, _ = replay(NgramDrafter(), [*text, 0], text, budget=8)
    assert rounds <= 8 and accepted >= 32


def test_hit_rates_follow_what_happens():
    drafter = NgramDrafter()
    text = [1, 2, 3, 1, 2]
    drafter.begin(text, None)
    first = drafter.propose(1).confidences[0]
    for _ in range(30):
        tree = drafter.propose(1)
        drafter.observe(verified(tree, [9, 9]))
        drafter.begin(text, None)
    missed = drafter.propose(1).confidences[0]
    for _ in range(60):
        tree = drafter.propose(1)
        drafter.observe(verified(tree, [3, 9]))
        drafter.begin(text, None)
    assert missed < 0.5 * first < drafter.propose(1).confidences[0]


def test_pruned_guesses_are_judged_too():
    told, untold = NgramDrafter(), NgramDrafter()
    for drafter in (told, untold):
        drafter.begin([1, 2, 3, 1, 2], None)
    for _ in range(10):
        tree = told.propose(2)
        told.observe(Outcome(tree.take([]), (), (3,), (2,)))
        untold.observe(plain(3))
        for drafter in (told, untold):
            drafter.begin([1, 2, 3, 1, 2], None)
    assert told.propose(1).confidences > untold.propose(1).confidences


@given(IDS, st.lists(st.tuples(st.booleans(), st.integers(0, 40), IDS), max_size=6))
def test_any_history_proposes_what_a_fresh_drafter_does(ids, events):
    drafter = NgramDrafter()
    drafter.begin(ids, None)
    for cuts, length, more in events:
        drafter.propose(3)
        if cuts:
            ids = ids[: max(length, 1)]
            drafter.rewind(len(ids))
        else:
            ids = ids + more
            drafter.observe(plain(*more))
    assert drafter.propose(6).tokens == proposed(ids, 6).tokens


@pytest.mark.parametrize("options", [{"min_match": 0}, {"branches": 9}, {"min_match": 99}])
def test_wrong_options_are_named(options):
    with pytest.raises(OptionError, match="got"):
        NgramDrafter(**options)
