import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from forerun.errors import OptionError
from forerun.runtime.drafting.tree import TokenTree


@st.composite
def trees(draw, most=12, vocab=4):
    count = draw(st.integers(0, most))
    parents = tuple(draw(st.integers(-1, node - 1)) for node in range(count))
    tokens = tuple(draw(st.integers(0, vocab - 1)) for _ in range(count))
    confidences = tuple(draw(st.floats(0, 1)) for _ in range(count))
    return TokenTree(tokens, parents, confidences, ("test",) * count)


def paths(tree):
    """Every path from the anchor, as tokens, with the largest confidence of its last node."""
    found = {}
    for node in range(len(tree)):
        path = tuple(tree.tokens[n] for n in tree.path_to(node))
        found[path] = max(found.get(path, 0), tree.confidences[node])
    return found


def test_a_chain():
    tree = TokenTree.chain([5, 6, 7], [0.5, 0.5, 1.0], "x")
    assert tree.is_chain and len(tree) == 3
    assert tree.parents == (-1, 0, 1) and tree.sources == ("x",) * 3
    assert tree.depths().tolist() == [1, 2, 3]
    assert tree.values().tolist() == [0.5, 0.25, 0.25]
    assert tree.row_parents() == [-1, 0, 1, 2]
    assert tree.path_to(2) == [0, 1, 2] and tree.path_to(-1) == []


def test_the_empty_tree():
    assert len(TokenTree.EMPTY) == 0 and TokenTree.EMPTY.is_chain
    assert TokenTree.EMPTY.row_parents() == [-1]
    assert TokenTree.EMPTY.children(-1) == []
    assert TokenTree.EMPTY.best_chain() is TokenTree.EMPTY


@pytest.mark.parametrize(
    "columns, text",
    [
        (((1,), (0,), (1.0,), ("x",)), "parent"),
        (((1, 2), (-1, -2), (1.0, 1.0), ("x", "x")), "parent"),
        (((1,), (-1,), (1.0,), ()), "lengths"),
        (((1,), (-1,), (1.5,), ("x",)), "confidences"),
        (((1,), (-1,), (float("nan"),), ("x",)), "confidences"),
    ],
)
def test_what_is_no_tree_is_refused(columns, text):
    with pytest.raises(OptionError, match=text):
        TokenTree(*columns)


@given(trees())
def test_every_node_but_the_anchor_is_the_child_of_one(tree):
    children = [child for node in range(-1, len(tree)) for child in tree.children(node)]
    assert sorted(children) == list(range(len(tree)))
    for node, depth in enumerate(tree.depths()):
        assert len(tree.path_to(node)) == depth
        assert tree.values()[node] == pytest.approx(
            np.prod([tree.confidences[n] for n in tree.path_to(node)])
        )


@given(trees(), trees())
def test_a_union_has_the_paths_of_both(a, b):
    both = a.union(b)
    expected = paths(a)
    for path, confidence in paths(b).items():
        expected[path] = max(expected.get(path, 0), confidence)
    assert set(paths(both)) == set(expected)
    assert len(both) <= len(a) + len(b)
    assert both.take(range(len(a))).tokens == a.tokens
    assert b.union(TokenTree.EMPTY).tokens == b.tokens


def test_a_union_merges_equal_paths_and_keeps_the_larger_confidence():
    a = TokenTree.chain([1, 2], [0.5, 0.5], "a")
    b = TokenTree.chain([1, 3], [0.9, 0.1], "b")
    both = a.union(b)
    assert both.tokens == (1, 2, 3) and both.parents == (-1, 0, 0)
    assert both.confidences == (0.9, 0.5, 0.1) and both.sources == ("b", "a", "b")
    assert a.union(a) == a


@given(trees(), st.data())
def test_take_keeps_the_paths_of_what_is_taken(tree, data):
    leaves = data.draw(st.lists(st.integers(0, len(tree) - 1)) if len(tree) else st.just([]))
    nodes = {n for leaf in leaves for n in tree.path_to(leaf)}
    taken = tree.take(nodes)
    assert len(taken) == len(nodes)
    for new, old in enumerate(sorted(nodes)):
        expected = [tree.tokens[n] for n in tree.path_to(old)]
        assert [taken.tokens[n] for n in taken.path_to(new)] == expected


def test_take_refuses_what_is_not_closed():
    tree = TokenTree.chain([1, 2, 3], [1.0] * 3, "x")
    with pytest.raises(OptionError, match="parent"):
        tree.take([1])
    with pytest.raises(OptionError, match="not among"):
        tree.take([0, 3])


@given(trees(), st.integers(0, 12), st.integers(0, 6))
def test_a_limited_tree_keeps_what_is_worth_most(tree, nodes, depth):
    small = tree.limited(nodes, depth)
    assert len(small) <= nodes and all(small.depths() <= depth)
    assert set(paths(small)) <= set(paths(tree))
    shallow = sorted(tree.values()[tree.depths() <= depth], reverse=True)
    assert sorted(small.values(), reverse=True) == pytest.approx(shallow[:nodes])


@given(trees())
def test_the_best_chain_is_worth_the_most_of_all_paths(tree):
    best = tree.best_chain()
    assert best.is_chain and bool(len(best)) == bool(len(tree))
    totals = [tree.values()[tree.path_to(node)].sum() for node in range(len(tree))]
    assert best.values().sum() == pytest.approx(max(totals, default=0))
