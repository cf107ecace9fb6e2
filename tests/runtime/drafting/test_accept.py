"""Acceptance laws on a tiny vocabulary, where everything can be enumerated."""

import itertools
from collections import Counter

import numpy as np
import pytest

from forerun.runtime import sampling
from forerun.runtime.drafting.accept import ACCEPT_RULES, MatchWalk, Relaxed, Walk
from forerun.runtime.drafting.tree import TokenTree
from forerun.runtime.types import SamplingParams

VOCAB, LENGTH = 3, 3


def tree_of(*paths):
    tree = TokenTree.EMPTY
    for path in paths:
        tree = tree.union(TokenTree.chain(path, [0.5] * len(path), "test"))
    return tree


TREES = {
    "empty": tree_of(),
    "chain": tree_of((0, 1)),
    "wrong chain": tree_of((2, 2)),
    "one child each": tree_of((1, 0)),
    "two children": tree_of((0, 1), (1, 2)),
    "two levels": tree_of((0, 0), (0, 2), (1, 1)),
    "three children": tree_of((0, 1), (1,), (2, 0), (2, 1)),
    "all": tree_of(*itertools.product(range(3), repeat=2)),
}


def model(context):
    """Logits float32 [V] after a context; any function of it will do."""
    seed = [7, *context]
    return np.random.default_rng(seed).normal(0, 1.5, VOCAB).astype(np.float32)


def rows_of(tree, context):
    paths = [[tree.tokens[n] for n in tree.path_to(node)] for node in range(-1, len(tree))]
    return np.stack([model([*context, *path]) for path in paths])


def speculate(rule_of, tree_after, params):
    """Text of LENGTH tokens: rounds with a tree each, cut where the text ends."""
    text: list[int] = []
    while len(text) < LENGTH:
        tree = tree_after(text)

        before = tuple(text)

        def pick(row, path, before=before):
            return sampling.pick(row, params, len(before) + len(path), [*before, *path])

        walk = rule_of(params).walk(tree, rows_of(tree, text), pick)
        text += [*(tree.tokens[node] for node in walk.path), walk.next_token]
    return tuple(text[:LENGTH])


def plain(params):
    text: list[int] = []
    while len(text) < LENGTH:
        text.append(sampling.pick(model(text), params, len(text), text))
    return tuple(text)


def law():
    """Probability of every text under the model, exactly."""
    p = {}
    for text in itertools.product(range(VOCAB), repeat=LENGTH):
        rows = [sampling.process_logits(model(text[:i]), WARM) for i in range(LENGTH)]
        logp = [row.log_probabilities()[token] for row, token in zip(rows, text, strict=True)]
        p[text] = float(np.exp(sum(logp)))
    return p


WARM = SamplingParams(temperature=1.0)


def match(params):
    return MatchWalk()


def relaxed(params):
    return Relaxed(lambda row, path: sampling.process_logits(row, WARM))


def chi_square(counts, expected, total):
    return sum((counts[text] - total * p) ** 2 / (total * p) for text, p in expected.items())


@pytest.mark.parametrize("name", TREES)
@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(),
        SamplingParams(temperature=0.8),
        SamplingParams(temperature=1.5, repetition_penalty=1.4, presence_penalty=0.3),
        SamplingParams(temperature=1.0, frequency_penalty=0.7, top_k=2, logit_bias={1: 0.5}),
    ],
)
def test_the_text_of_a_seed_is_that_of_plain_decoding(name, params):
    for seed in range(40):
        seeded = SamplingParams(**{**vars(params), "seed": seed})
        assert speculate(match, lambda _: TREES[name], seeded) == plain(seeded)


@pytest.mark.parametrize("name", TREES)
def test_the_law_of_the_text_is_that_of_the_model(name):
    """26 degrees of freedom: chi-square exceeds 57 once in 2000 draws of 2000 seeds."""
    expected, total = law(), 2000
    assert sum(expected.values()) == pytest.approx(1)
    drawn = Counter(
        speculate(match, lambda _: TREES[name], SamplingParams(temperature=1.0, seed=seed))
        for seed in range(total)
    )
    assert chi_square(drawn, expected, total) < 57


class OneMore(Exception):
    """The walk wants a choice that the script does not hold."""


def outcomes(tree, rows, chosen=()):
    """(text of the round, its probability) for every course of the model's choices."""
    script, weight = iter(chosen), 1.0

    def pick(row, path):
        nonlocal weight
        token = next(script, None)
        if token is None:
            raise OneMore
        weight *= float(np.exp(sampling.process_logits(row, WARM).log_probabilities())[token])
        return token

    try:
        walk = MatchWalk().walk(tree, rows, pick)
    except OneMore:
        for token in range(VOCAB):
            yield from outcomes(tree, rows, (*chosen, token))
    else:
        yield (*(tree.tokens[node] for node in walk.path), walk.next_token), weight


@pytest.mark.parametrize("name", TREES)
def test_one_round_s_law_is_exactly_that_of_the_model(name):
    texts = list(outcomes(TREES[name], rows_of(TREES[name], [])))
    assert sum(weight for _, weight in texts) == pytest.approx(1, abs=1e-12)
    whole = law()
    for text, weight in texts:
        share = sum(p for other, p in whole.items() if other[: len(text)] == text)
        assert weight == pytest.approx(share, abs=1e-12)


def test_rows_behind_the_first_mismatch_are_not_picked():
    tree = TREES["all"]
    seen = []

    def pick(row, path):
        seen.append(tuple(path))
        return 9

    assert MatchWalk().walk(tree, rows_of(tree, []), pick) == Walk((), 9)
    assert seen == [()]


def test_the_path_goes_down_the_tree():
    tree = tree_of((0, 1), (1, 2), (1, 0))
    tokens = iter([1, 0, 2])
    walk = MatchWalk().walk(tree, rows_of(tree, []), lambda row, path: next(tokens))
    assert [tree.tokens[node] for node in walk.path] == [1, 0] and walk.next_token == 2
    assert tree.parents[walk.path[1]] == walk.path[0]


def test_relaxed_acceptance_changes_the_law_and_says_so():
    tree = TREES["chain"]
    distribution = sampling.process_logits(model([]), WARM)
    rule = relaxed(WARM)
    distance = rule.total_variation(tree, -1, distribution)
    assert distance > 0.05
    assert not rule.exact and not ACCEPT_RULES["relaxed"].exact
    assert "lossy" in ACCEPT_RULES["relaxed"].summary
    assert MatchWalk().exact and ACCEPT_RULES["match"].exact
    # The first token's law, drawn, is that far from the model's.
    p = np.exp(distribution.log_probabilities())
    seeds = 3000
    drawn = Counter(
        speculate(relaxed, lambda _: tree, SamplingParams(temperature=1.0, seed=seed))[0]
        for seed in range(seeds)
    )
    found = sum(abs(drawn[token] / seeds - p[token]) for token in range(VOCAB)) / 2
    assert found == pytest.approx(distance, abs=0.03)


def test_relaxed_acceptance_counts_what_it_overrules_and_keeps_the_filters():
    tree = tree_of((0, 0))
    logits = np.log(np.array([[0.3, 0.7], [0.01, 0.99], [0.5, 0.5]], np.float32))

    def process(params):
        return lambda row, path: sampling.process_logits(row, params)

    rule = ACCEPT_RULES["relaxed"].make(process(WARM))
    assert rule.walk(tree, logits, lambda row, path: 1) == Walk((0,), 1, overruled=1)
    assert rule.walk(tree, logits, lambda row, path: 0) == Walk((0, 1), 0)
    # What a filter or a bias removes is never typical.
    only_best = ACCEPT_RULES["relaxed"].make(process(SamplingParams(temperature=1.0, top_k=1)))
    assert only_best.walk(tree, logits, lambda row, path: 1) == Walk((), 1)
    assert (
        Relaxed(process(WARM)).total_variation(TokenTree.EMPTY, -1, process(WARM)(logits[0], ()))
        == 0
    )
