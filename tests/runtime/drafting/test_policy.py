"""The policies: the rule itself, replayed records against hindsight, and what an attack costs."""

import numpy as np
import pytest

from forerun.errors import OptionError
from forerun.runtime.drafting.account import Account
from forerun.runtime.drafting.fixed import FixedPolicy
from forerun.runtime.drafting.guide import Guide
from forerun.runtime.drafting.measured import MeasuredPolicy
from forerun.runtime.drafting.policy import POLICIES, make_policy, policy_maker
from forerun.runtime.drafting.tree import TokenTree
from tests.drafting_replay import DEPTH, SHAPES, T1, hindsight, play, record, step_costs


def policy(shape="middle", name="measured"):
    return make_policy(name, Guide.of(step_costs(shape)))


def chain(*confidences):
    return TokenTree.chain(range(1, len(confidences) + 1), confidences, "x")


def rich(found):
    """The policy with an account that bears everything, so that the rule alone decides."""
    found.account.credit = 100.0
    return found


@pytest.mark.parametrize("draft", [0.0, 0.3, 1.5])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_number_of_nodes_is_the_one_with_the_most_tokens_per_second(shape, draft):
    rng = np.random.default_rng(3)
    costs = step_costs(shape)
    for _ in range(50):
        found = rich(policy(shape))
        tree = chain(*rng.uniform(0.3, 0.98, 12))
        values = tree.values()
        spent = draft * T1
        times = [costs.step(n + 1, DEPTH) + costs.overhead for n in range(13)]
        rates = [(1 + values[:n].sum()) / (spent + times[n]) for n in range(13)]
        best = int(np.argmax(rates))
        gain = (1 + values[:best].sum()) * times[0] / times[best]
        assert len(found.prune(tree, spent, DEPTH)) == (best if gain > 1.02 else 0)


def test_a_tree_keeps_its_best_nodes_with_their_parents():
    tree = TokenTree((1, 2, 3, 4, 5), (-1, -1, 0, 1, 3), (0.05, 0.9, 0.9, 0.9, 0.9), ("x",) * 5)
    kept = rich(policy()).prune(tree, 0.0, DEPTH)
    assert kept.tokens == (2, 4, 5) and kept.parents == (-1, 0, 1)
    assert policy().prune(TokenTree.EMPTY, 0.0, DEPTH) is TokenTree.EMPTY


def test_nothing_is_verified_that_is_slower_than_plain_decoding():
    assert len(rich(policy("dear")).prune(chain(0.2, 0.9, 0.9), 0.0, DEPTH)) == 0
    assert len(rich(policy("cheap")).prune(chain(0.2, 0.9, 0.9), 0.0, DEPTH)) > 0


def test_an_unknown_drafter_may_lose_little_at_first():
    found = policy("dear")
    first = found.budget(DEPTH)
    costs = step_costs("dear")
    assert 1 <= first < 16
    assert costs.step(first + 1, DEPTH) <= 2.6 * costs.step(1, DEPTH)
    assert len(found.prune(chain(*[0.99] * 16), 0.0, DEPTH)) <= first
    for _ in range(40):
        tree = found.prune(chain(*[0.99] * found.budget(DEPTH)), 0.0, DEPTH)
        found.observe(tree, range(len(tree)), 0.0, costs.step(len(tree) + 1, DEPTH), DEPTH)
    assert found.budget(DEPTH) > first


def test_pruned_nodes_are_judged_by_the_text_too():
    found = policy("dear")
    for number in range(30):
        found.budget(DEPTH)
        rows = len(found.prune(chain(0.15), 0.0, DEPTH))
        assert number or not rows
        found.observe(TokenTree.EMPTY, (), 0.0, T1, DEPTH, (1,))
    assert found.guide.calibration.rate("x", 1, 0.15) > 0.9
    found.budget(DEPTH)
    assert len(found.prune(chain(0.15), 0.0, DEPTH)) == 1


def drafted(found, confidences, step):
    """Draft until the policy says stop, as drafters with a model do."""
    budget, count, value = found.budget(DEPTH), 1, confidences[0]
    while count < budget and found.keep_going(count, value, DEPTH):
        value *= confidences[count]
        count += 1
    tree = found.prune(chain(*confidences[:count]), count * step * T1, DEPTH)
    costs = step_costs("cheap")
    verify = costs.step(len(tree) + 1, DEPTH)
    found.observe(tree, range(len(tree)), count * step * T1, verify, DEPTH)
    return count


def test_drafting_goes_on_as_long_as_the_next_node_is_worth_its_time():
    lengths = {}
    for step in (0.02, 0.4):
        for confidence in (0.98, 0.5):
            found = rich(policy("cheap"))
            for _ in range(20):
                rich(found)
                lengths[step, confidence] = drafted(found, [confidence] * 16, step)
                found.guide.calibration = Guide.of(step_costs("cheap")).calibration
    assert lengths[0.02, 0.98] > lengths[0.02, 0.5]
    assert lengths[0.02, 0.98] > lengths[0.4, 0.98]
    assert lengths[0.4, 0.5] == 1
    assert not rich(policy()).keep_going(16, 1.0, DEPTH)


STEADY = {"good": [(0.7, 1.0)], "copying": [(0.95, 0.9)], "poor": [(0.4, 1.0)]}


@pytest.mark.parametrize("draft_step", [0.0, 0.1])
@pytest.mark.parametrize("text", STEADY)
@pytest.mark.parametrize("shape", SHAPES)
def test_it_is_near_the_best_fixed_number_of_hindsight(shape, text, draft_step):
    costs, gains, bests = step_costs(shape), [], []
    for seed in range(4):
        rounds = record(STEADY[text], 1500, seed)
        found = policy(shape)
        play(found, record(STEADY[text], 150, 99), costs, draft_step * T1)
        gains.append(play(found, rounds, costs, draft_step * T1))
        bests.append(hindsight(rounds, costs, draft_step * T1))
    assert np.mean(gains) >= 0.97 * np.mean(bests)
    assert min(gains) >= 0.97


@pytest.mark.parametrize("draft_step", [0.0, 0.1])
@pytest.mark.parametrize("shape", SHAPES)
def test_where_the_text_changes_it_beats_every_fixed_number(shape, draft_step):
    phases = [(0.05, 0.9), (0.9, 0.95), (0.3, 0.5)]
    costs, gains, bests = step_costs(shape), [], []
    for seed in range(4):
        rounds = record(phases, 1500, seed)
        gains.append(play(policy(shape), rounds, costs, draft_step * T1))
        bests.append(hindsight(rounds, costs, draft_step * T1))
    assert np.mean(gains) > 1.1 * np.mean(bests)
    assert min(gains) > 1


@pytest.mark.parametrize("name", ["measured", "thompson"])
@pytest.mark.parametrize("draft_step", [0.0, 0.1, 0.5])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_drafter_that_is_always_wrong_costs_little(shape, draft_step, name):
    rounds = record([(0.0, 1.0)], 500, said=1.0)
    costs = step_costs(shape)
    found = policy(shape, name)
    assert play(found, rounds, costs, draft_step * T1) >= 0.97
    # And the next text less.
    assert play(found, rounds, costs, draft_step * T1) >= 0.985


@pytest.mark.parametrize("shape", SHAPES)
def test_a_drafter_that_turns_bad_when_it_is_trusted_costs_little(shape):
    costs = step_costs(shape)
    found = policy(shape)
    play(found, record([(0.98, 1.0)], 300, said=0.99), costs)
    assert play(found, record([(0.0, 1.0)], 500, said=0.99), costs) >= 0.97


@pytest.mark.parametrize("shape", SHAPES)
def test_a_drafter_that_turns_good_is_found_again(shape):
    costs = step_costs(shape)
    found = policy(shape)
    play(found, record([(0.0, 1.0)], 2000, said=0.9), costs, 0.1 * T1)
    rounds = record([(0.95, 1.0)], 1500, said=0.9)
    gain = play(found, rounds, costs, 0.1 * T1)
    assert gain > 0.8 * hindsight(rounds, costs, 0.1 * T1)


def test_a_wrong_first_measurement_heals():
    """The table says rows are free, or very dear; the rounds say what they really cost."""
    rounds = record([(0.7, 1.0)], 2000)
    truth = step_costs("middle")
    for table in ("cheap", "dear"):
        found = MeasuredPolicy(Guide.of(step_costs(table)))
        play(found, rounds, truth)
        assert play(found, rounds, truth) >= 0.95 * hindsight(rounds, truth)


def test_pauses_get_longer_without_gains_and_short_again_with_one():
    account = Account()

    def pause(trial=0.4):
        account.pause(trial)
        length = 0
        while account.paused:
            account.settle(1, 1.0)
            length += 1
        return length

    lengths = []
    for _ in range(6):
        account.settle(1, 2.2)
        lengths.append(pause())
    assert lengths == [8, 16, 32, 64, 100, 100]
    assert account.credit == 0.8
    account.settle(1, 1.3)
    assert pause(2.0) == 25
    assert account.credit == 4.0
    account.settle(5, 1.0)
    assert pause() == 8


def test_gains_do_not_pile_up():
    account = Account()
    for _ in range(1000):
        account.settle(4, 1.0)
    assert account.credit == 8.0


@pytest.mark.parametrize("name", POLICIES)
def test_every_policy_keeps_a_closed_part_of_the_tree_and_gains_on_good_drafts(name):
    found = policy("cheap", name)
    tree = TokenTree(
        tuple(range(12)), (-1, -1, 0, 0, 1, 2, 2, 5, 6, 7, 7, 8), (0.8,) * 12, ("x",) * 12
    )
    for _ in range(20):
        found.budget(DEPTH)
        kept = found.prune(tree, 1e-4, DEPTH)
        assert set(kept.tokens) <= set(tree.tokens)
        found.observe(kept, (), 1e-4, T1, DEPTH)
    rounds = record([(0.9, 1.0)], 400)
    assert play(policy("cheap", name), rounds, step_costs("cheap")) > 2.0
    assert play(policy("cheap", name), rounds, step_costs("cheap"), 0.05 * T1) > 1.5


def test_the_variants_do_what_their_papers_say():
    # EAGLE-2: the best N by confidence alone, whatever rows cost and however often they are wrong.
    tree = chain(*[0.9] * 12)
    assert len(policy("dear", "confidence").prune(tree, 0.0, DEPTH)) == 8
    assert policy("dear", "confidence").keep_going(7, 0.0, DEPTH)
    # OPT-Tree: no level whose expected gain is under delta.
    assert len(policy("dear", "opt-tree").prune(chain(0.9, 0.9, 0.05, 0.9), 0.0, DEPTH)) == 2
    found = policy("dear", "opt-tree")
    assert found.keep_going(1, 0.5, DEPTH) and not found.keep_going(1, 0.01, DEPTH)
    for _ in range(50):
        found.observe(chain(0.9), (0,), 0.8 * T1, T1, DEPTH)
    assert not found.keep_going(1, 0.5, DEPTH)
    # EESD: draws differ from round to round where little is known.
    drawn = rich(policy("middle", "thompson"))
    assert len({len(drawn.prune(chain(*[0.6] * 8), 0.0, DEPTH)) for _ in range(30)}) > 2
    # fixed: as told.
    assert len(policy("dear", "fixed:3").prune(tree, 0.0, DEPTH)) == 12
    assert policy("dear", "fixed:3").budget(DEPTH) == 3
    assert policy("dear", "fixed").budget(DEPTH) == 4


@pytest.mark.parametrize(
    "name", ["", "best", "fixed:", "fixed:-1", "fixed:65", "measured:3", "fixed:²"]
)
def test_an_unknown_policy_is_refused(name):
    with pytest.raises(OptionError, match="policy"):
        policy("middle", name)
    with pytest.raises(OptionError, match="policy"):
        policy_maker(step_costs("middle"), name)


def test_each_drafter_gets_a_policy_and_a_chooser_shares_its_guide():
    class Chooser:
        def follow(self, guide):
            self.guide = guide

    make = policy_maker(step_costs("middle"))
    chooser = Chooser()
    found = make(chooser)
    assert isinstance(found, MeasuredPolicy) and chooser.guide is found.guide
    assert make(object()).guide is not found.guide
    assert isinstance(policy_maker(step_costs("middle"), "fixed:2")(object()), FixedPolicy)
