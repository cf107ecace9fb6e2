import pytest
from hypothesis import given
from hypothesis import strategies as st

from forerun.errors import OptionError
from forerun.runtime.drafting.suffix import SuffixIndex
from forerun.runtime.prefix import common_prefix

IDS = st.lists(st.integers(0, 4), max_size=30)


def state(index):
    return index.ids, index._newest, index._older


def built(ids, order=2):
    index = SuffixIndex(order)
    index.extend(ids)
    return index


def test_common_prefix_of_a_list_and_a_tuple():
    assert common_prefix([1, 2, 3], (1, 2, 3)) == 3
    assert common_prefix((1, 2, 3), [1, 2, 4, 5]) == 2


@given(IDS, IDS, st.data(), st.integers(1, 4))
def test_a_cut_and_grown_index_is_that_of_the_text(first, second, data, order):
    index = built(first, order)
    kept = data.draw(st.integers(0, len(first)))
    index.truncate(kept)
    assert state(index) == state(built(first[:kept], order))
    index.extend(second)
    assert state(index) == state(built(first[:kept] + second, order))


@given(IDS, IDS)
def test_replaced_text_equals_a_new_index(first, second):
    index = built(first)
    index.replace(second)
    assert state(index) == state(built(second))


@given(IDS, st.integers(1, 3))
def test_ends_are_all_places_newest_first(ids, order):
    index = built(ids, order)
    gram = (1, 2, 1)[:order]
    places = [e for e in range(order - 1, len(ids)) if tuple(ids[e - order + 1 : e + 1]) == gram]
    assert list(index.ends(gram, 99)) == places[::-1]
    assert list(index.ends(gram, 1)) == places[::-1][:1]


@given(IDS, IDS)
def test_common_prefix(first, second):
    count = common_prefix(first, second)
    assert first[:count] == second[:count]
    assert first[count : count + 1] != second[count : count + 1] or count == len(first)


def test_wrong_numbers_are_named():
    with pytest.raises(OptionError, match="at least 1, got 0"):
        SuffixIndex(0)
    with pytest.raises(OptionError, match="cannot cut to 3 tokens: there are 2"):
        built([1, 2]).truncate(3)
