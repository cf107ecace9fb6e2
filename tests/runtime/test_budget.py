"""Budgets: sizes as people write them, and the longest KV cache that fits."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import tiny_bundle

from forerun.errors import BundleError, ContextLimitError, OptionError
from forerun.runtime.budget import LEAST_TOKENS, parse_size, plan_capacity, with_capacity
from forerun.runtime.layouts import LAYOUTS
from forerun.runtime.manifest import KVLayout
from forerun.runtime.runner import Runner

WIDE = KVLayout(30, 3, 64, 8192)
FORMS = [
    dataclasses.replace(WIDE, dtype=row.dtype, bits=row.bits)
    for row in LAYOUTS.values()
    if row.kind == "dense"
] + [dataclasses.replace(WIDE, kind="gear-kcvt", bits=4, overhead=700, buffer=64)]


@pytest.mark.parametrize(
    ("text", "size"),
    [("64MB", 64 * 10**6), ("64MiB", 64 << 20), ("1.5GB", 1500 * 10**6), (" 3 kib ", 3072)],
)
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "64", "MB", "-1MB", "1e3MB", "64 XB", "0MB", "0.1B", "1,5GB"])
def test_no_sizes(text):
    with pytest.raises(OptionError, match="64MiB"):
        parse_size(text)


@given(st.sampled_from(FORMS), st.integers(0, 10**9))
def test_the_longest_cache_within_the_budget(layout, budget):
    try:
        plan = plan_capacity(layout, budget)
    except OptionError as error:
        # The smallest budget that works is told, and works.
        least = parse_size(str(error).partition("at least ")[2].partition(",")[0])
        assert plan_capacity(layout, least).capacity >= LEAST_TOKENS
        assert least > budget
        return
    assert LEAST_TOKENS <= plan.capacity <= 8192
    assert plan.nbytes <= budget
    assert plan.is_capped or plan.nbytes + layout.nbytes_per_token > budget
    assert f"{plan.capacity:,} tokens" in plan.text
    assert ("no further" in plan.text) == plan.is_capped


def test_the_plan_is_told():
    plan = plan_capacity(dataclasses.replace(WIDE, dtype="uint8", bits=4), parse_size("8.3MB"))
    assert plan.text == "KV cache: 4-bit, 1,440 tokens in 8.3 MB (5,760 bytes a token)"


def test_a_shorter_cache_computes_the_same(tmp_path):
    manifest, folder = tiny_bundle("llama", tmp_path, capacity=128)
    short = with_capacity(manifest, 70)
    runner, plain = Runner(short, folder, threads=1), Runner(manifest, folder, threads=1)
    ids = list(range(69))
    np.testing.assert_array_equal(runner.step(ids), plain.step(ids))
    assert runner.arena.nbytes == 70 * manifest.kv.nbytes_per_token
    # In place: what the graph wrote is in our arrays.
    assert np.abs(runner.arena.arrays["key.0"][0, :, 68]).min() > 0
    tree = runner.step([3], parents=[-1], want="all")
    np.testing.assert_array_equal(tree, plain.step([3], parents=[-1], want="all"))
    with pytest.raises(ContextLimitError, match="capacity of 70"):
        runner.step([1, 2])
    for wrong in (0, 129):
        with pytest.raises(OptionError, match="1 to 128"):
            with_capacity(manifest, wrong)


def test_forms_of_a_fixed_length(tmp_path):
    manifest, _ = tiny_bundle("llama", tmp_path, capacity=128)
    with pytest.raises(OptionError, match="on webgpu has 128 tokens and no other size"):
        with_capacity(manifest, 70, "webgpu")
    assert with_capacity(manifest, 128, "webgpu") == manifest
    old = dataclasses.replace(manifest, lowerings={"cpu": manifest.lowerings["webgpu"]})
    with pytest.raises(BundleError, match="export it again"):
        with_capacity(old, 70)
