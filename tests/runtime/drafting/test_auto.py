"""Choosing among drafters: free ones first, a costly one when it pays, not for long if not."""

import random

import numpy as np
import pytest

from forerun.errors import OptionError
from forerun.runtime.drafting import auto as module
from forerun.runtime.drafting.auto import AutoDrafter
from forerun.runtime.drafting.drafter import Outcome
from forerun.runtime.drafting.policy import policy_maker
from forerun.runtime.drafting.tree import TokenTree
from tests.drafting_replay import DEPTH, T1, step_costs


class Clock:
    """Time that passes only when a drafter takes some."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        monkeypatch.setattr(module.time, "perf_counter", lambda: self.now)


class Scripted:
    """Guesses the script, each token right with a set chance.

    Args:
        name: of the drafter.
        clock: that its work takes time on.
        step: seconds of a draft step.
        alpha: chance that a token is right; a function of the position may be given.
        share: of the rounds in which it says anything.
    """

    needs_features = False
    proposes_trees = False

    def __init__(self, name, clock, step=0.0, alpha=0.8, share=1.0, seed=0):
        self.name, self.clock, self.step = name, clock, step
        self.alpha = alpha if callable(alpha) else lambda at: alpha
        self.share, self.rng = share, random.Random(seed)
        self.length = self.asked = 0
        self.calls = []

    def configure(self, params, skipped=0):
        self.calls.append(("configure", params, skipped))

    def begin(self, ids, features):
        self.length = len(ids)
        self.calls.append(("begin", len(ids), features is not None))

    def propose(self, budget, keep_going=None):
        self.asked += 1
        if self.rng.random() >= self.share:
            return TokenTree.EMPTY
        tokens, value = [], 1.0
        while len(tokens) < budget:
            if self.step and tokens and keep_going is not None and not keep_going(value):
                break
            at = self.length + len(tokens)
            self.clock.now += self.step
            value *= min(max(self.alpha(at), 0.01), 0.99)
            tokens.append(at if self.rng.random() < self.alpha(at) else 0)
        said = [min(max(self.alpha(self.length + i), 0.01), 0.99) for i in range(len(tokens))]
        return TokenTree.chain(tokens, said, self.name)

    def observe(self, outcome):
        self.length += len(outcome.new_tokens)

    def rewind(self, length):
        self.length = length

    def close(self):
        self.calls.append(("close",))


def decode(drafter, clock, rounds=800, shape="middle", name="measured", policy=None):
    """Run rounds of the text 1, 2, 3, ...; returns tokens per plain step and the policy."""
    costs = step_costs(shape)
    policy = policy or policy_maker(costs, name)(drafter)
    plain = costs.step(1, DEPTH) + costs.overhead
    length, start = 1, clock.now
    drafter.begin([0], None)
    for _ in range(rounds):
        budget, before, asked = policy.budget(DEPTH), clock.now, [0]

        def keep_going(value, asked=asked):
            asked[0] += 1
            return policy.keep_going(asked[0], value, DEPTH)

        tree = drafter.propose(budget, keep_going) if budget else TokenTree.EMPTY
        tree = policy.prune(tree, clock.now - before, DEPTH)
        right = 0
        while right < len(tree) and tree.tokens[right] == length + right:
            right += 1
        new = tuple(range(length, length + right + 1))
        path = tuple(range(right))
        drafter.observe(Outcome(tree, path, new, (length - 1, *tree.tokens)))
        drafting = clock.now - before
        took = costs.step(len(tree) + 1, DEPTH)
        policy.observe(tree, path, drafting, took, DEPTH, new)
        clock.now += took + costs.overhead
        length += right + 1
    return (length - 1) / (clock.now - start) * plain, policy


def test_the_better_free_proposal_is_taken(monkeypatch):
    clock = Clock(monkeypatch)
    poor, good = Scripted("a", clock, alpha=0.3), Scripted("b", clock, alpha=0.9)
    auto = AutoDrafter([poor, good])
    policy_maker(step_costs("middle"))(auto)
    auto.begin([0], None)
    assert set(auto.propose(8).sources) == {"b"}
    # Without costs there is nothing to compare by: the first one speaks.
    auto = AutoDrafter([poor, good])
    auto.begin([0], None)
    assert set(auto.propose(8).sources) == {"a"}


def test_a_costly_drafter_that_pays_is_asked(monkeypatch):
    clock = Clock(monkeypatch)
    free = Scripted("ngram", clock, alpha=0.9, share=0.2)
    head = Scripted("head", clock, step=0.1 * T1, alpha=0.75)
    both, _ = decode(AutoDrafter([free], [head]), clock)
    alone, _ = decode(Scripted("head", clock, step=0.1 * T1, alpha=0.75), clock)
    copies, _ = decode(Scripted("ngram", clock, alpha=0.9, share=0.2), clock)
    assert both > max(alone, copies) > 1.1
    assert head.asked > 400


def test_a_costly_drafter_that_does_not_pay_is_left_alone(monkeypatch):
    clock = Clock(monkeypatch)
    free = Scripted("ngram", clock, alpha=0.9, share=0.5)
    head = Scripted("head", clock, step=0.3 * T1, alpha=0.05)
    both, _ = decode(AutoDrafter([free], [head]), clock)
    copies, _ = decode(Scripted("ngram", clock, alpha=0.9, share=0.5), clock)
    assert head.asked < 80
    assert both > 0.96 * copies


@pytest.mark.parametrize("shape", ["dear", "cheap"])
def test_two_that_are_always_wrong_cost_little(monkeypatch, shape):
    clock = Clock(monkeypatch)
    free = Scripted("ngram", clock, alpha=0.0)
    head = Scripted("head", clock, step=0.2 * T1, alpha=0.0)
    speedup, _ = decode(AutoDrafter([free], [head]), clock, rounds=500, shape=shape)
    assert speedup >= 0.97


def test_where_copies_are_sure_the_costly_drafter_is_not_asked(monkeypatch):
    clock = Clock(monkeypatch)
    free = Scripted("ngram", clock, alpha=0.97)
    head = Scripted("head", clock, step=0.3 * T1, alpha=0.6)
    decode(AutoDrafter([free], [head]), clock)
    assert head.asked < 100


def test_a_costly_drafter_that_turns_good_is_found_again(monkeypatch):
    clock = Clock(monkeypatch)
    head = Scripted("head", clock, step=0.1 * T1, alpha=lambda at: 0.9 if at > 1500 else 0.0)
    auto = AutoDrafter([Scripted("ngram", clock, share=0.0)], [head])
    decode(auto, clock, rounds=1400)
    before = head.asked
    _, policy = decode(auto, clock, rounds=200)
    head.alpha = lambda at: 0.9
    speedup, _ = decode(auto, clock, rounds=1000, policy=policy)
    assert head.asked - before > 600
    assert speedup > 1.5 and auto.speedups()["head"] > 1.5


def test_it_passes_everything_on(monkeypatch):
    clock = Clock(monkeypatch)
    free, head = Scripted("ngram", clock), Scripted("head", clock, step=1.0)
    head.needs_features = True
    auto = AutoDrafter([free], [head])
    assert auto.needs_features and not auto.proposes_trees and auto.name == "auto"
    auto.configure("params", 3)
    auto.begin([1, 2, 3], np.zeros((2, 4), np.float32))
    auto.rewind(2)
    auto.close()
    expected = [("configure", "params", 3), ("begin", 3, False), ("close",)]
    assert free.calls == expected
    assert head.calls == [expected[0], ("begin", 3, True), expected[2]]
    assert free.length == head.length == 2
    assert auto.propose(0) is TokenTree.EMPTY
    with pytest.raises(OptionError, match="at least one"):
        AutoDrafter([])
