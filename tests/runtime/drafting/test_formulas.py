"""The formulas against the published table and against simulated acceptance."""

import random

import pytest

from forerun.runtime.drafting import formulas

# Best over gamma at r = 1, by (c, alpha): serial with s = 0, the others with s = 0.03.
TABLE = {
    (0.05, 0.5): (1.63, 1.29, 1.59),
    (0.05, 0.7): (2.35, 1.90, 2.35),
    (0.10, 0.5): (1.46, 1.29, 1.42),
    (0.10, 0.85): (2.85, 3.14, 3.13),
    (0.20, 0.7): (1.58, 1.76, 1.66),
    (0.30, 0.85): (1.69, 2.02, 2.02),
}


def best(formula, alpha, c, s):
    return max(formula(alpha, gamma, c, 1.0, s) for gamma in range(1, 40))


@pytest.mark.parametrize("c, alpha", TABLE)
def test_the_best_of_each_schedule_is_the_published_one(c, alpha):
    serial, pearl, optimistic = TABLE[c, alpha]
    assert best(formulas.serial_chain, alpha, c, 0.0) == pytest.approx(serial, abs=0.02)
    assert best(formulas.pearl, alpha, c, 0.03) == pytest.approx(pearl, abs=0.02)
    assert best(formulas.optimistic, alpha, c, 0.03) == pytest.approx(optimistic, rel=0.06)


def accepted(rng, alpha, gamma):
    count = 0
    while count < gamma and rng.random() < alpha:
        count += 1
    return count


@pytest.mark.parametrize("alpha, gamma", [(0.5, 4), (0.7, 8), (0.85, 8)])
def test_tokens_per_period_are_those_of_simulated_rounds(alpha, gamma):
    rng, rounds = random.Random(5), 40_000
    said = sum(accepted(rng, alpha, gamma) + 1 for _ in range(rounds)) / rounds
    assert formulas.chain_tokens(alpha, gamma) == pytest.approx(said, rel=0.02)
    # A period of PEARL: before a hit only the first draft is checked, then whole blocks are.
    total, post = 0, False
    for _ in range(rounds):
        if not post:
            # One token comes in any case: the first draft if it is right, else the correction.
            post = rng.random() < alpha
            total += 1
            continue
        # The rest of the block, whose first token was checked before, and the next block's first.
        hits = accepted(rng, alpha, gamma - 1)
        if hits < gamma - 1:
            total, post = total + hits + 1, False
        else:
            total, post = total + gamma, rng.random() < alpha
    assert formulas.pearl(alpha, gamma, 0.0) == pytest.approx(total / rounds, rel=0.02)


def test_the_checked_values_of_parallel_drafting():
    for alpha, gamma, tokens in ((0.5, 4, 1.306), (0.7, 8, 1.918), (0.85, 8, 3.063)):
        assert formulas.pearl(alpha, gamma, 0.0) == pytest.approx(tokens, rel=0.005)


def test_special_cases_agree():
    chain = [0.7**n for n in range(1, 5)]
    serial = formulas.serial_chain(0.7, 4, 0.1, 1.3, 0.05)
    assert formulas.serial_tree(chain, 4, 0.1, 1.3, 0.05) == pytest.approx(serial)
    assert formulas.one_call(0.7, 4, 0.4, 1.3, 0.05) == pytest.approx(serial)
    assert formulas.with_misses(1.0, 0.7, 4, 1.3, 0.1, 0.05) == pytest.approx(serial)
    assert formulas.with_misses(0.0, 0.7, 4, 1.3) == 1.0
    assert formulas.early_exit(0.7, 4, 0.1, 1.2, 0.05) == pytest.approx(serial)
    assert formulas.shared_memory(1.3, 0.5) == pytest.approx(1.95)
    one, several = (formulas.duo(0.6, first, 4, 0.5) for first in (0.6, 0.8))
    assert several > one == pytest.approx(formulas.pearl(0.6, 4, 0.125))
