import numpy as np
import pytest
from gear_tools import contents, dense_runner, fill, gear_bundle, gear_runner
from hypothesis import given, settings
from hypothesis import strategies as st

from forerun.errors import BundleError, ContextLimitError, OptionError
from forerun.quant.gear import GEAR
from forerun.runtime.drafting.costs import measure_costs
from forerun.runtime.gear.layout import CHUNK
from forerun.runtime.gear.store import MAX_PENDING
from forerun.runtime.prefix import PrefixCache

IDS = np.random.default_rng(0).integers(0, 256, 700)
# Of logits around 3; the same sums in another order.
ORDER = 5e-4


@pytest.fixture(scope="module")
def pairs(gear_tiny):
    """Kind to (runner on GEAR, dense runner)."""
    dense, views, bundle = gear_tiny
    opened = {
        kind: (gear_runner(bundle, m), dense_runner(bundle, dense)) for kind, m in views.items()
    }
    yield opened
    for pair in opened.values():
        for runner in pair:
            runner.close()


@pytest.fixture(params=GEAR)
def pair(request, pairs):
    gear, dense = pairs[request.param]
    gear.arena.rewind(0)
    dense.arena.rewind(0)
    return gear, dense


def test_up_to_a_chunk_nothing_is_lost(pair):
    gear, dense = pair
    got, want = gear.step(IDS[:64], want="all"), dense.step(IDS[:64], want="all")
    np.testing.assert_allclose(got, want, atol=ORDER)


def test_behind_a_chunk_a_little_is_lost(pair):
    gear, dense = pair
    got, want = gear.step(IDS[:300], want="all"), dense.step(IDS[:300], want="all")
    apart = np.abs(got - want)[CHUNK:]
    assert 1e-3 < apart.max() < 1
    assert gear.arena.compressed == 4


@given(
    st.sampled_from(GEAR),
    st.lists(st.tuples(st.sampled_from("ssstr"), st.integers(1, 99)), min_size=1, max_size=12),
)
@settings(max_examples=25)
def test_a_step_attends_to_exactly_what_the_cache_stands_for(pairs, kind, moves):
    """After any steps, commits and rewinds; the dense runner reads the rebuilt cache."""
    gear, dense = pairs[kind]
    gear.arena.rewind(0)
    for move, count in moves:
        length = gear.arena.length
        if move == "r":
            gear.arena.rewind(max(0, length - count))
        elif move == "t":
            parents = [-1, -1, *(row // 2 for row in range(2, min(count, 9)))]
            gear.step(IDS[: len(parents)], parents=parents)
            gear.arena.commit([1, 3] if len(parents) > 3 else [1])
        elif length + count < 500:
            gear.step(IDS[length : length + count])
    gear.arena.settle(gear.arena.length)
    fill(dense, gear.arena)
    room = CHUNK - gear.arena.length % CHUNK
    ids = IDS[: min(5, room)]
    np.testing.assert_allclose(
        gear.step(ids, want="all"), dense.step(ids, want="all"), atol=ORDER, rtol=1e-3
    )


@given(st.sampled_from(GEAR), st.lists(st.integers(1, 130), min_size=3, max_size=12))
@settings(max_examples=15)
def test_cutting_a_text_into_steps_changes_nothing(pairs, kind, cuts):
    gear, _ = pairs[kind]
    gear.arena.rewind(0)
    count = min(sum(cuts), 400)
    whole = gear.step(IDS[:count], want="all").copy()
    gear.arena.rewind(0)
    parts = [
        gear.step(part, want="all").copy()
        for part in np.split(IDS[:count], np.cumsum(cuts))
        if len(part)
    ]
    np.testing.assert_allclose(np.concatenate(parts), whole, atol=ORDER)


@pytest.mark.parametrize("back", [1, 40, 64])
def test_dropping_drafts_over_the_end_of_a_chunk_leaves_no_trace(pair, back):
    gear, _ = pair
    whole = gear.step(IDS[:260], want="all").copy()
    gear.arena.rewind(0)
    gear.step(IDS[: 192 + 3])
    gear.step(IDS[300 : 300 + back])
    gear.arena.rewind(195 if back < CHUNK else 192)
    rest = gear.step(IDS[gear.arena.length : 260], want="all")
    np.testing.assert_allclose(rest, whole[-len(rest) :], atol=ORDER)


def test_the_path_of_a_tree_gives_the_logits_of_the_chain(pair):
    gear, _ = pair
    chain = gear.step(IDS[:150], want="all").copy()
    gear.arena.rewind(140)
    ids = [9, IDS[140], 8, IDS[141], IDS[142]]
    tree = gear.step(ids, want="all", parents=[-1, -1, 0, 1, 3]).copy()
    np.testing.assert_allclose(tree[[1, 3, 4]], chain[140:143], atol=ORDER)
    assert gear.arena.pending == 5
    gear.arena.commit([1, 3, 4])
    np.testing.assert_allclose(gear.step(IDS[143:150], want="all"), chain[143:], atol=ORDER)


def test_a_tree_may_come_first(pair):
    gear, dense = pair
    tree = gear.step([IDS[0], 7, IDS[1]], want="all", parents=[-1, -1, 0])
    want = dense.step(IDS[:2], want="all")
    np.testing.assert_allclose(tree[[0, 2]], want, atol=ORDER)
    gear.arena.rewind(0)


def test_wanted_rows_come_in_the_order_that_was_asked_for(pair):
    gear, _ = pair
    whole = gear.step(IDS[:200], want="all").copy()
    for rows in ([199, 0, 70], [70, 70], [3], [64, 63]):
        gear.arena.rewind(0)
        np.testing.assert_allclose(gear.step(IDS[:200], want=rows), whole[rows], atol=ORDER)
    gear.arena.rewind(0)
    assert gear.step(IDS[:200], want="none").shape == (0, 258)


def test_hidden_states_and_time(tmp_path):
    dense, views, bundle = gear_bundle(tmp_path, hidden_states=True)
    gear, plain = gear_runner(bundle, views["gear-kivi"]), dense_runner(bundle, dense)
    for runner in (gear, plain):
        runner.step(IDS[:60], want=[59, 2])
    np.testing.assert_allclose(gear.hidden(), plain.hidden(), atol=ORDER)
    gear.step(IDS[60:200], want=[3, 130])
    assert gear.hidden().shape == (2, 64)
    assert gear.session_time > 0
    gear.close()


def test_bad_steps_are_refused_before_anything_runs(pair):
    gear, _ = pair
    gear.step(IDS[:10])
    with pytest.raises(ContextLimitError):
        gear.step(np.zeros(503, np.int64))
    with pytest.raises(OptionError, match="parent"):
        gear.step([1, 2], parents=[-1, 1])
    assert gear.arena.length == 10


def test_a_tree_that_is_too_large_is_refused(tmp_path):
    _, views, bundle = gear_bundle(tmp_path, capacity=1024)
    gear = gear_runner(bundle, views["gear-kcvt"])
    gear.step([1])
    assert gear.step(np.ones(MAX_PENDING, np.int64), parents=[-1] * MAX_PENDING).shape == (1, 258)
    with pytest.raises(OptionError, match=f"{MAX_PENDING} rows, got {MAX_PENDING + 1}"):
        gear.step(np.ones(MAX_PENDING + 1, np.int64), parents=[-1] * (MAX_PENDING + 1))
    gear.close()


def test_no_rows_in_a_chunk_that_nobody_compressed(pair):
    gear, _ = pair
    gear.step(IDS[:100])
    assert {part: rows.shape[2] for part, rows in contents(gear.arena).items()} == {
        "key": 100,
        "value": 100,
    }


def test_a_lowering_that_is_not_there_and_another_device_are_refused(gear_tiny):
    from forerun.runtime.gear.runner import GearRunner

    _, views, bundle = gear_tiny
    with pytest.raises(BundleError, match="no lowering 'npu'"):
        GearRunner(views["gear-kivi"], bundle, lowering="npu")


def test_a_reused_prefix_is_read_again_from_the_last_chunk_that_is_whole(pair):
    """Else an answer would depend on what was read before it."""
    gear, _ = pair
    cache = PrefixCache(gear)
    want = cache.feed([*IDS[:100].tolist(), 7]).copy()
    assert cache.keep_common(IDS[:90].tolist()) == 89, "the rows of the newest chunk are there"
    cache.feed(IDS[89:300].tolist())
    assert cache.keep_common([*IDS[:100].tolist(), 7]) == CHUNK
    assert gear.arena.length == CHUNK == len(cache.ids)
    np.testing.assert_array_equal(cache.feed([*IDS[CHUNK:100].tolist(), 7]), want)


def test_steps_behind_any_number_of_tokens_can_be_timed(tmp_path):
    _, views, bundle = gear_bundle(tmp_path, capacity=1024)
    gear = gear_runner(bundle, views["gear-kcvt"])
    costs = measure_costs(gear, (64, 900), (1, 2))
    assert costs.depths == (64, 900) and gear.arena.length == 0
    gear.close()
