import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from forerun.runtime.gear.compress import Form, compress, decompress, factors, outlier_count

LAYERS, HEADS, TOKENS, CHANNELS = 2, 3, 64, 16
KEYS = Form(2, TOKENS, rank=2, outliers=2)
VALUES = Form(3, CHANNELS, rank=2, outliers=4)
SHARED = Form(3, HEADS * CHANNELS, rank=2, outliers=4)
FORMS = [KEYS, VALUES, SHARED]


def changed(form, **fields):
    return Form(**{**form.__dict__, **fields})


def sample(seed=0, spikes=True):
    """Channels of different sizes, a part that all tokens share, and a few spikes."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((LAYERS, HEADS, TOKENS, CHANNELS)) * rng.uniform(0.1, 3, CHANNELS)
    x += rng.standard_normal((LAYERS, HEADS, TOKENS, 1)) * rng.standard_normal(CHANNELS)
    if spikes:
        x[rng.random(x.shape) < 0.01] *= 20
    return x.astype(np.float32)


def error(x, form):
    return float(((x - decompress(compress(x, form), form, HEADS)) ** 2).sum())


@pytest.mark.parametrize("form", FORMS)
def test_outliers_and_factors_each_make_the_error_smaller(form):
    x = sample()
    backbone = error(x, changed(form, rank=0, outliers=0))
    sparse = error(x, changed(form, rank=0))
    whole = error(x, form)
    assert whole < 0.9 * sparse < 0.5 * backbone
    assert error(x, changed(form, rank=4)) < whole


@pytest.mark.parametrize("levels", [3, 7, 15])
@pytest.mark.parametrize("form", FORMS)
def test_all_levels_are_used_and_rounding_is_at_most_half_a_step(form, levels):
    form = changed(form, rank=0, outliers=0, levels=levels)
    x = sample(spikes=False)
    chunk = compress(x, form)
    assert (chunk.codes.min(), chunk.codes.max()) == (0, levels)
    rows = chunk.codes.reshape(*chunk.scale.shape, -1)
    scale, low = (v.astype(np.float32)[..., None] for v in (chunk.scale, chunk.low))
    stood_for = decompress(chunk, form, HEADS)
    axes = (0, 1, 3, 2) if form.along == 2 else (0, 2, 1, 3)
    apart = (x - stood_for).transpose(axes).reshape(rows.shape)
    # float16 holds scales and lows to one part in 2048.
    assert np.all(np.abs(apart) <= scale * (0.5 + levels / 2048) + np.abs(low) / 2048)


@pytest.mark.parametrize("form", FORMS)
def test_the_largest_and_smallest_values_are_kept_exactly(form):
    form, x = changed(form, rank=0), sample()
    stood_for = decompress(compress(x, form), form, HEADS)
    axes = (0, 1, 3, 2) if form.along == 2 else (0, 2, 1, 3)
    vectors = x.transpose(axes).reshape(LAYERS, -1, TOKENS if form.along == 2 else HEADS * CHANNELS)
    found = stood_for.transpose(axes).reshape(vectors.shape)
    order = np.argsort(vectors, -1)
    half = form.outliers // 2
    for places in (order[..., :half], order[..., -half:]):
        wanted = np.take_along_axis(vectors, places, -1)
        got = np.take_along_axis(found, places, -1)
        assert np.all(np.abs(got - wanted) <= 2e-3 * np.abs(vectors).max(-1, keepdims=True))


def test_outlier_counts_are_even_and_never_less_than_the_share():
    assert [outlier_count(0.02, n) for n in (64, 192, 576, 1024)] == [2, 4, 12, 22]
    assert [outlier_count(0.04, n) for n in (64, 192)] == [4, 8]
    assert outlier_count(0.0, 64) == 0


def test_the_factors_are_those_of_the_nearest_matrix_of_their_rank():
    rng = np.random.default_rng(0)
    left, right = rng.standard_normal((5, 64, 3)), rng.standard_normal((5, 16, 3))
    exact = (left @ right.swapaxes(1, 2)).astype(np.float32)
    q, p = factors(exact, 3, 3)
    np.testing.assert_allclose(q @ p.swapaxes(1, 2), exact, atol=1e-3)
    np.testing.assert_allclose(q.swapaxes(1, 2) @ q, np.tile(np.eye(3), (5, 1, 1)), atol=1e-4)

    noise = rng.standard_normal((64, 16)).astype(np.float32)
    q, p = factors(noise, 4, 8)
    best = np.linalg.svd(noise, compute_uv=False)
    assert np.linalg.norm(noise - q @ p.T) <= 1.05 * np.linalg.norm(best[4:])


def test_attention_with_factors_equals_attention_with_the_rebuilt_matrix():
    x, rng = sample(), np.random.default_rng(1)
    chunk = compress(x, KEYS)
    query = rng.standard_normal((LAYERS, HEADS, 5, CHANNELS)).astype(np.float32)
    q, p = chunk.left.astype(np.float32), chunk.right.astype(np.float32)
    backbone = decompress(chunk, changed(KEYS, rank=0), HEADS)
    rebuilt = query @ decompress(chunk, KEYS, HEADS).swapaxes(2, 3)
    apart = query @ backbone.swapaxes(2, 3) + (query @ p) @ q.swapaxes(2, 3)
    np.testing.assert_allclose(apart, rebuilt, rtol=1e-4, atol=1e-3)


@given(
    st.sampled_from(FORMS),
    st.integers(0, 99),
    st.sampled_from([0.0, 1e-30, 1e-9, 1e-3, 1.0, 1e3, 1e30]),
    st.sampled_from([0.0, 1.0, -300.0, 2e4]),
)
def test_any_finite_values_give_finite_ones_nearby(form, seed, size, shift):
    x = (sample(seed) * np.float32(size) + np.float32(shift)).astype(np.float32)
    again = compress(x, form)
    stood_for = decompress(again, form, HEADS)
    assert np.all(np.isfinite(stood_for))
    kept = np.clip(x, -3e4, 3e4)
    spread = float(kept.max() - kept.min())
    assert np.abs(stood_for - kept).max() <= 0.2 * spread + 2e-3 * np.abs(kept).max() + 1e-5
    for name, value in compress(x, form).__dict__.items():
        assert np.array_equal(value, getattr(again, name)), name


@pytest.mark.parametrize("form", FORMS)
def test_layers_do_not_mix(form):
    x = sample()
    alone = compress(x[1:], form)
    np.testing.assert_array_equal(
        decompress(compress(x, form), form, HEADS)[1:], decompress(alone, form, HEADS)
    )
