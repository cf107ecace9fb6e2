"""When single rows may skip feed-forward blocks, which, and what is told of it."""

import dataclasses
import itertools
import shutil

import numpy as np
import pytest
from fakes import make_manifest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny_bundle

from forerun.errors import OptionError
from forerun.quant.skip_graph import skipping_lowering, with_skipping
from forerun.runtime.manifest import SkipLevel, Skipping
from forerun.runtime.runner import Runner
from forerun.runtime.skipping import (
    FfnGate,
    Fixed,
    Schedule,
    Skip,
    level_within,
    parse_skipping,
    read_skipping,
)

LAYERS = 10
FOUND = Skipping(
    first=2,
    stop=8,
    cosine=(0.5,) * LAYERS,
    order=(5, 4, 6, 3, 7, 2),
    levels=(SkipLevel(0.1, 0.98, 1), SkipLevel(0.2, 0.95, 1), SkipLevel(0.4, 0.9, 2)),
    warmup=3,
    default=0.2,
)


def manifest(found=FOUND, layers=LAYERS):
    made = make_manifest()
    sizes = dataclasses.replace(made.model, layers=layers)
    return dataclasses.replace(made, model=sizes, skipping=found)


@pytest.mark.parametrize("text", ["off", "0", "static:0", "decode:0", " OFF ", "0.0", "decode:0:9"])
def test_nothing_is_skipped_when_nothing_is_asked_for(text):
    assert parse_skipping(text, manifest()) is None


def test_a_share_is_the_adaptive_rule():
    for text in ("0.2", "adaptive:0.2", "default"):
        rule = parse_skipping(text, manifest())
        assert rule.name == "adaptive:0.2"
        assert [rule.choose(step) for step in range(3)] == [None] * 3
        skip = rule.choose(3)
        assert (skip.tau, skip.run, skip.flags.all()) == (0.95, 1, True)
    assert parse_skipping("0.39", manifest()).name == "adaptive:0.2", "never more than was asked"
    assert [level_within(FOUND, share).ratio for share in (0.1, 0.12, 0.4, 1.0)] == [
        0.1,
        0.1,
        0.4,
        0.4,
    ]
    none = dataclasses.replace(FOUND, default=0.0)
    assert parse_skipping("default", manifest(none)) is None


def test_static_takes_the_least_harmful():
    skip = parse_skipping("static:0.3", manifest()).choose(99)
    assert np.flatnonzero(~skip.flags).tolist() == [4, 5, 6]
    assert skip.tau == np.inf


def test_decode_drops_lower_layers_first_and_never_takes_one_back():
    rule = parse_skipping("decode:0.5:20", manifest())
    assert rule.name == "decode:0.5:20"
    sets = []
    for step in range(40):
        skip = rule.choose(step)
        sets.append(() if skip is None else tuple(np.flatnonzero(~skip.flags)))
    assert sets[:4] == [()] * 4 and sets[23] == sets[39] == (2, 3, 4, 5, 6)
    assert sets[13] == (2, 3)
    for before, after in itertools.pairwise(sets):
        assert set(before) <= set(after)


@given(st.integers(1, 30), st.integers(1, 300), st.integers(0, 5))
def test_the_budget_falls_linearly(most, span, warmup):
    rule = Schedule("decode", 32, range(1, 31), most, span, warmup)
    for step in range(0, span + warmup + 3, 7):
        skip = rule.choose(step)
        skipped = 0 if skip is None else int((~skip.flags).sum())
        wish = most * min(max(step - warmup, 0), span) / span
        assert wish - 1 < skipped <= wish


@pytest.mark.parametrize(
    "text, words",
    [
        ("0.5", "at most 0.40"),
        ("static:0.7", "at most 0.60"),
        ("decode:0.61", "at most 0.60"),
        ("1.5", "in 0..1"),
        ("-0.1", "in 0..1"),
        ("nan", "in 0..1"),
        ("much", "adaptive:0.25"),
        ("static", "static:0.25"),
        ("static:0.2:9", "static:0.25"),
        ("0.05", "skips 0.1 of its feed-forward blocks or more .*got 0.05"),
        ("static:0.09", "less than one; give at least 0.1,"),
        ("decode:0.09", "less than one"),
        ("decode:0.2:0", "whole number"),
        ("decode:0.2:inf", "whole number"),
        ("decode:0.2:nan", "whole number"),
        ("decode:0.2:1e9", "whole number"),
        ("static:inf", "in 0..1"),
        ("decode:0.2:2.5", "whole number"),
        ("decode:0.2:x", "decode:0.25:256"),
        ("", "static:0.25"),
    ],
)
def test_bad_wishes_say_what_is_possible(text, words):
    with pytest.raises(OptionError, match=words):
        parse_skipping(text, manifest())


def test_a_bundle_that_cannot_skip_says_how_to_get_one():
    with pytest.raises(OptionError, match="quantize its float32 bundle with --skipping"):
        parse_skipping("0.2", manifest(None))
    assert parse_skipping("off", manifest(None)) is None
    with pytest.raises(OptionError, match="is not known"):
        parse_skipping("much", manifest(None))


@pytest.mark.parametrize("value", [0.25, None, b"off"])
def test_what_is_no_text_is_refused_by_its_type(value):
    with pytest.raises(OptionError, match=f"of the type {type(value).__name__}"):
        read_skipping(value)


def test_a_gate_is_set_in_place_and_opened_again():
    gate = FfnGate(3)
    flags, tau = gate.flags, gate.tau
    gate.set(Skip(np.array([True, False, True]), 0.5, 2))
    assert flags.tolist() == [True, False, True] and tau == np.float32(0.5) and gate.run == 2
    gate.set(None)
    assert flags.all() and tau == np.inf and gate.run == 0


SMALL = 5


@pytest.fixture(scope="module")
def runners(tmp_path_factory):
    folder = tmp_path_factory.mktemp("skipping")
    changes = {"layers": SMALL, "layer_window": (False,) * SMALL}
    plain, source = tiny_bundle("llama", folder, **changes)
    changed = folder / "changed"
    shutil.copytree(source, changed)
    form = skipping_lowering(plain.lowerings["cpu"], with_skipping(changed, "model.onnx"))
    gated = dataclasses.replace(plain, lowerings=plain.lowerings | {"cpu": form})
    return Runner(plain, source, threads=1), Runner(gated, changed, threads=1)


def static(warmup):
    flags = np.ones(SMALL, bool)
    flags[1:4] = False
    return Fixed("test", Skip(flags), warmup)


def ran_in(runner, ids, **options):
    """Blocks that ran in a step of one row; None for other steps."""
    before = runner.ffn_counts
    runner.step(ids, **options)
    ran, possible = np.subtract(runner.ffn_counts, before)
    return int(ran) if possible else None


def test_the_first_rows_and_all_steps_of_several_rows_run_in_full(runners):
    _plain, runner = runners
    runner.arena.rewind(0)
    runner.skipping = static(2)
    assert ran_in(runner, [1, 2, 3]) is None
    assert [ran_in(runner, [4]) for _ in range(4)] == [5, 5, 2, 2]
    assert ran_in(runner, [4, 5]) is None
    assert [ran_in(runner, [4]) for _ in range(3)] == [5, 5, 2]
    runner.arena.rewind(6)
    assert [ran_in(runner, [4]) for _ in range(3)] == [5, 5, 2]
    runner.skipping = None
    assert ran_in(runner, [4]) == 5


def test_no_step_of_several_rows_ever_skips(runners):
    plain, runner = runners
    for each in runners:
        each.arena.rewind(0)
    runner.skipping = static(0)
    np.testing.assert_array_equal(runner.step([5, 6, 7]), plain.step([5, 6, 7]))
    runner.step([9])
    for role, array in plain.arena.arrays.items():
        array[...] = runner.arena.arrays[role]
    plain.arena.length = 4
    np.testing.assert_array_equal(runner.step([5, 6], want="all"), plain.step([5, 6], want="all"))
    assert not np.allclose(runner.step([5]), plain.step([5]), atol=1e-3)


def test_a_tree_ends_a_run_of_single_rows(tmp_path_factory):
    """Its rows may be committed, so that the cache is longer or just as long as before."""
    from forerun.export.tree import tree_lowering, write_tree_graph

    folder = tmp_path_factory.mktemp("tree")
    changes = {"layers": SMALL, "layer_window": (False,) * SMALL}
    made, bundle = tiny_bundle("llama", folder, **changes)
    form = skipping_lowering(made.lowerings["cpu"], with_skipping(bundle, "model.onnx"))
    write_tree_graph(bundle, "model.onnx")
    forms = made.lowerings | {"cpu": form, "cpu-tree": tree_lowering(form)}
    runner = Runner(dataclasses.replace(made, lowerings=forms), bundle, threads=1)
    runner.skipping = static(1)
    runner.step([1, 2])
    assert [ran_in(runner, [3]) for _ in range(2)] == [5, 2]
    runner.step([4, 5], parents=[-1, -1])
    runner.arena.commit([])
    assert [ran_in(runner, [3]) for _ in range(2)] == [5, 2]


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(1, 3), min_size=1, max_size=12), st.integers(0, 3))
def test_rows_skip_only_behind_enough_single_ones(runners, steps, warmup):
    _, runner = runners
    runner.arena.rewind(0)
    runner.skipping = static(warmup)
    singles = 0
    for rows in steps:
        ran = ran_in(runner, [7] * rows)
        assert ran == (None if rows > 1 else 2 if singles >= warmup else 5)
        singles = singles + 1 if rows == 1 else 0
    assert 0.4 <= runner.ffn_share <= 1


def test_a_graph_without_gates_counts_all_and_refuses_rules(runners):
    plain, _ = runners
    plain.arena.rewind(0)
    assert ran_in(plain, [3]) == 5
    with pytest.raises(OptionError, match="--skipping"):
        plain.skipping = static(0)
    with pytest.raises(OptionError, match="--skipping"):
        Runner(plain.manifest, plain._folder, skipping=static(0))
