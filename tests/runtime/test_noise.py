import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from forerun.runtime.noise import MAX_SEED, bits_to_gumbel, gumbel, hash_bits

IDS = np.arange(50_000)
SEEDS = st.integers(0, MAX_SEED)


def test_bits_are_the_same_on_every_platform():
    # Golden values: a change of the hash changes every text that was drawn with a seed.
    bits = hash_bits(7, 11, np.array([0, 1, 49_151]))
    assert bits.tolist() == [2334673973879972, 4725343267775369, 7351439895468862]


def test_noise_is_standard_gumbel():
    noise = gumbel(0, 0, IDS)
    assert abs(noise.mean() - 0.5772) < 0.02
    assert abs(noise.var() - np.pi**2 / 6) < 0.05
    # Distribution function at a few points.
    for x in (-1.0, 0.0, 1.0, 3.0):
        assert abs((noise <= x).mean() - np.exp(-np.exp(-x))) < 0.01


def test_noise_of_positions_seeds_and_ids_is_unrelated():
    rows = [gumbel(s, i, IDS) for s in (0, 1, 2**63) for i in (0, 1, 2)]
    rows.append(np.roll(rows[0], 1))
    correlation = np.corrcoef(rows)
    np.fill_diagonal(correlation, 0)
    assert np.abs(correlation).max() < 0.03


@given(SEEDS, st.integers(0, 2**40), st.lists(st.integers(0, 10**6), min_size=1, max_size=20))
def test_noise_of_an_id_does_not_depend_on_the_others(seed, position, ids):
    alone = [gumbel(seed, position, np.array([i]))[0] for i in ids]
    assert gumbel(seed, position, np.array(ids)).tolist() == alone


def test_extreme_bits_give_finite_noise():
    noise = bits_to_gumbel(np.array([0, 2**53 - 1], np.uint64))
    assert np.isfinite(noise).all()
    assert noise[0] < -3 and noise[1] > 36
