import pytest
from draft_toys import VOCAB, ToyRunner, plain, verified
from hypothesis import given
from hypothesis import strategies as st

from forerun.errors import OptionError
from forerun.runtime.drafting.combine import Chain, Fallback, Speculative, Union, configure
from forerun.runtime.drafting.model import ModelDrafter
from forerun.runtime.drafting.ngram import NgramDrafter
from forerun.runtime.drafting.recycle import RecycleDrafter
from forerun.runtime.drafting.tree import TokenTree
from forerun.runtime.drafting.vocab import identity
from forerun.runtime.types import SamplingParams

IDS = st.lists(st.integers(0, 4), min_size=1, max_size=20)


class Scripted:
    """Always proposes the same tree and notes what it is told."""

    needs_features = False
    proposes_trees = False

    def __init__(self, name, *tokens, confidence=0.5):
        self.name, self.ids, self.told = name, [], []
        self.tree = TokenTree.chain(tokens, [confidence] * len(tokens), name)

    def configure(self, params, skipped=0):
        self.told.append(("configure", params, skipped))

    def begin(self, ids, features):
        self.ids = list(ids)

    def propose(self, budget, keep_going=None):
        self.told.append(("propose", len(self.ids), budget))
        return self.tree.take(range(min(budget, len(self.tree))))

    def observe(self, outcome):
        self.ids += outcome.new_tokens

    def rewind(self, length):
        del self.ids[length:]

    def close(self):
        self.told.append("close")


def test_fallback_takes_the_first_that_speaks():
    silent, first, second = Scripted("a"), Scripted("b", 1, 2), Scripted("c", 3)
    drafter = Fallback(silent, first, second)
    drafter.begin([9], None)
    assert drafter.propose(4).tokens == (1, 2)
    assert not second.told and drafter.name == "a+b+c"


def test_fallback_can_ask_for_surer_ones():
    unsure, sure = Scripted("a", 1, confidence=0.3), Scripted("b", 2, confidence=0.6)
    assert Fallback(unsure, sure, least=0.5).propose(4).tokens == (2,)
    assert Fallback(unsure, sure, least=0.2).propose(4).tokens == (1,)
    # Nobody is sure enough: the surest is taken.
    assert Fallback(sure, unsure, least=0.9).propose(4).tokens == (2,)
    with pytest.raises(OptionError, match="from 0 to 1, got 2"):
        Fallback(unsure, sure, least=2)


def test_union_merges_and_keeps_the_best_within_the_budget():
    drafter = Union(Scripted("a", 1, 2, 3), Scripted("b", 1, 5, confidence=0.9))
    tree = drafter.propose(3)
    assert drafter.proposes_trees and len(tree) == 3
    assert tree.tokens[0] == 1 and tree.confidences[0] == 0.9
    assert {tree.tokens[c] for c in tree.children(0)} == {5, 2}


def test_chain_goes_on_behind_the_first_one():
    first, then = Scripted("a", 1, 2, 3), Scripted("b", 7, 8)
    drafter = Chain(first, 2, then)
    drafter.begin([9, 9], None)
    tree = drafter.propose(4)
    assert tree.tokens == (1, 2, 7, 8) and tree.is_chain
    assert tree.sources == ("a", "a", "b", "b")
    assert ("propose", 4, 2) in then.told and then.ids == [9, 9]
    assert drafter.propose(1).tokens == (1,)
    drafter = Chain(Scripted("a"), 2, then)
    drafter.begin([9], None)
    assert drafter.propose(4).tokens == (7, 8)


def test_the_tail_of_a_chain_follows_from_its_stem():
    drafter = Chain(Scripted("a", 1), 1, NgramDrafter())
    drafter.begin([5, 1, 2, 3, 4, 5], None)
    assert drafter.propose(4).tokens == (1, 2, 3, 4)
    assert drafter.propose(4).sources == ("a", "ngram", "ngram", "ngram")


def make(kind):
    parts = NgramDrafter(), RecycleDrafter(VOCAB)
    model = ModelDrafter(ToyRunner(capacity=200), identity(VOCAB))
    return {
        "fallback": lambda: Fallback(*parts, least=0.4),
        "union": lambda: Union(*parts),
        "chain": lambda: Chain(model, 2, parts[0]),
        "speculative": lambda: Speculative(model, parts[0]),
        "nested": lambda: Fallback(
            parts[1], Chain(Speculative(model, parts[0]), 2, NgramDrafter()), least=0.3
        ),
    }[kind]()


@pytest.mark.parametrize("kind", ["fallback", "union", "chain", "speculative", "nested"])
@given(IDS, st.lists(st.tuples(st.booleans(), st.integers(1, 20), IDS), max_size=5))
def test_any_history_proposes_what_a_fresh_one_does(kind, ids, events):
    drafter, fresh = make(kind), make(kind)
    drafter.begin(ids, None)
    for cuts, length, more in events:
        if cuts:
            ids = ids[:length]
            drafter.rewind(len(ids))
        else:
            ids = ids + more
            drafter.observe(plain(*more))
    fresh.begin(ids, None)
    assert drafter.propose(5) == fresh.propose(5)


@pytest.mark.parametrize("kind", ["fallback", "union", "chain", "speculative", "nested"])
def test_rounds_of_a_combination(kind):
    drafter = make(kind)
    text = [1, 2, 3, 4, 5] * 6
    drafter.begin(text[:8], None)
    done = 8
    while done < 28:
        tree = drafter.propose(4)
        outcome = verified(tree, text[done:], with_logits=False)
        drafter.observe(outcome)
        done += len(outcome.new_tokens)
    drafter.close()


def test_parts_are_told_how_the_target_draws_and_closed():
    parts = Scripted("a"), Scripted("b")
    drafter = Fallback(*parts)
    params = SamplingParams(temperature=1.0)
    configure(drafter, params, 3)
    configure(NgramDrafter(), params)
    drafter.close()
    assert all(part.told == [("configure", params, 3), "close"] for part in parts)


def test_wrong_parts_are_named():
    with pytest.raises(OptionError, match="at least 2 drafters, got 1"):
        Fallback(NgramDrafter())
    with pytest.raises(OptionError, match="at least 1 token, got 0"):
        Chain(NgramDrafter(), 0, NgramDrafter())
