"""Every native layout of the KV cache: its scales, its graphs, and the laws of a cache."""

import dataclasses
import shutil

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny_bundle

from forerun.errors import OptionError, UnsupportedError
from forerun.quant.kv import LEVELS, calibrate, least_error
from forerun.quant.kv_graphs import DENSE, with_layouts, without_layouts
from forerun.quant.quantize import quantize
from forerun.runtime.budget import with_capacity
from forerun.runtime.layouts import check_layouts, choose_layout
from forerun.runtime.prefix import PrefixCache
from forerun.runtime.runner import Runner

CAPACITY = 96
# How far rounding moves the logits of a tiny model with logits of about 10.
NEAR = {"fp32": 1e-6, "fp16": 0.05, "int8": 0.6, "int4": 6.0}
IDS = st.lists(st.integers(0, 257), min_size=1, max_size=12)


def text(seed, count):
    return np.random.default_rng(seed).integers(0, 200, count)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return tiny_bundle("llama", tmp_path_factory.mktemp("plain"), capacity=CAPACITY)


@pytest.fixture(scope="module")
def scales(plain):
    manifest, folder = plain
    model = onnx.load(str(folder / "model.onnx"), load_external_data=False)
    return calibrate(model, manifest, folder, [text(seed, 90) for seed in range(4)])


@pytest.fixture(scope="module")
def bundle(plain, scales, tmp_path_factory):
    folder = tmp_path_factory.mktemp("layouts") / "bundle"
    shutil.copytree(plain[1], folder)
    return with_layouts(folder, plain[0], scales, names=DENSE), folder


@pytest.fixture(scope="module")
def runners(bundle):
    manifest, folder = bundle
    return {
        name: Runner(choose_layout(manifest, name), folder, threads=1)
        for name in ("fp32", *manifest.kv_layouts)
    }


def fresh(runner, ids):
    runner.arena.rewind(0)
    return runner.step(ids, want="all").copy()


def test_the_weights_are_shared_and_every_layout_is_listed(bundle, plain):
    manifest, folder = bundle
    assert list(manifest.kv_layouts) == ["fp16", "int8", "int4"]
    check_layouts(manifest)
    assert manifest.kv == plain[0].kv
    assert (folder / "weights.bin").read_bytes() == (plain[1] / "weights.bin").read_bytes()
    assert without_layouts(manifest) == plain[0]
    for name in manifest.kv_layouts:
        for suffix in ("", "-tree"):
            graph = folder / manifest.lowerings[f"cpu+{name}{suffix}"].graph
            assert graph.name == f"model-{name}{suffix}.onnx"
            model = onnx.load(str(graph), load_external_data=False)
            inline = sum(len(t.raw_data) for t in model.graph.initializer)
            assert inline < 30_000, "only scales and small constants are in the graph"


@pytest.mark.parametrize("name", DENSE)
def test_bytes_of_a_token(name, runners, plain):
    arena, bits = runners[name].arena, {"fp32": 32, "fp16": 16, "int8": 8, "int4": 4}[name]
    assert arena.nbytes == sum(a.nbytes for a in arena.arrays.values())
    assert arena.layout.nbytes_per_token * 32 == plain[0].kv.nbytes_per_token * bits


@pytest.mark.parametrize("name", DENSE)
def test_logits_stay_near_those_of_float32(name, runners):
    ids = text(9, 60)
    error = np.abs(fresh(runners[name], ids) - fresh(runners["fp32"], ids))
    assert error.max() < NEAR[name]
    assert name == "fp32" or error.max() > NEAR[name] / 1e4, "another layout rounds otherwise"


@pytest.mark.parametrize("name", DENSE)
@given(data=st.data())
@settings(max_examples=25, deadline=None)
def test_any_history_of_steps_equals_a_fresh_prefill(name, runners, data):
    """Steps, trees and rewinds in any order leave what reading the committed ids leaves."""
    runner, committed = runners[name], [1]
    fresh(runner, committed)
    for _ in range(data.draw(st.integers(1, 6))):
        act = data.draw(st.sampled_from(["step", "tree", "rewind"]))
        if act == "step":
            ids = data.draw(IDS)
            runner.step(ids)
            committed += ids
        elif act == "tree":
            ids = data.draw(st.lists(st.integers(0, 257), min_size=4, max_size=4))
            runner.step(ids, parents=[-1, 0, 0, 1], want="all")
            rows = data.draw(st.sampled_from([[], [0], [0, 2], [0, 1, 3]]))
            runner.arena.commit(rows)
            committed += [ids[row] for row in rows]
        else:
            keep = data.draw(st.integers(1, len(committed)))
            runner.arena.rewind(keep)
            del committed[keep:]
    after = runner.step([5]).copy()
    expected = fresh(runner, [*committed, 5])[-1:]
    tolerance = {"fp32": 2e-4, "fp16": 0.05}.get(name, NEAR[name])
    np.testing.assert_allclose(after, expected, atol=tolerance)


@pytest.fixture(scope="module")
def exact_runners(plain, scales, tmp_path_factory):
    """Products in blocks of 32 do not mix rows either, so that whole steps are row by row."""
    folder = tmp_path_factory.mktemp("exact") / "bundle"
    manifest = dataclasses.replace(quantize(plain[1], folder, weights="int8"), row_exact=True)
    manifest = with_layouts(folder, manifest, scales, names=["int8", "int4"])
    views = {name: choose_layout(manifest, name) for name in ("int8", "int4")}
    assert all(view.row_exact for view in views.values())
    return {name: Runner(view, folder, threads=1) for name, view in views.items()}


@pytest.mark.parametrize("name", ["int8", "int4"])
@given(data=st.data())
@settings(max_examples=25, deadline=None)
def test_chains_on_codes_are_bit_equal_however_they_were_cut(name, exact_runners, data):
    """Also when guessed rows were read behind them and taken back."""
    runner = exact_runners[name]
    ids = data.draw(st.lists(st.integers(0, 199), min_size=2, max_size=24))
    runner.arena.rewind(0)
    single = np.concatenate([runner.step([token]).copy() for token in ids])
    runner.arena.rewind(0)
    rows, start = [], 0
    while start < len(ids):
        count = data.draw(st.integers(1, 9))
        guessed = data.draw(st.lists(st.integers(0, 199), max_size=3))
        part = ids[start : start + count]
        rows.append(runner.step([*part, *guessed], want="all")[: len(part)].copy())
        start += len(part)
        runner.arena.rewind(start)
    np.testing.assert_array_equal(np.concatenate(rows), single)


@pytest.mark.parametrize("name", DENSE)
def test_a_chat_reuses_its_prefix(name, bundle):
    manifest, folder = bundle
    cache = PrefixCache(Runner(choose_layout(manifest, name), folder, threads=1))
    ids = text(3, 40).tolist()
    cache.feed(ids)
    assert cache.keep_common([*ids[:30], 7, 8]) == 30
    again = cache.feed([7, 8]).copy()
    expected = fresh(cache.runner, [*ids[:30], 7, 8])[-1:]
    np.testing.assert_allclose(again, expected, atol=max(NEAR[name], 2e-4))


def test_a_layout_with_another_capacity(bundle):
    manifest, folder = bundle
    short = with_capacity(choose_layout(manifest, "int4"), 64)
    runner = Runner(short, folder, threads=1)
    assert runner.arena.arrays["key.0"].shape == (1, 2, 64, 8)
    runner.step(text(1, 64))


def test_another_default(plain, scales, tmp_path):
    folder = tmp_path / "bundle"
    shutil.copytree(plain[1], folder)
    manifest = with_layouts(folder, plain[0], scales, default="int8", names=["fp32", "int8"])
    assert manifest.kv.dtype == "int8" and list(manifest.kv_layouts) == ["fp32"]
    check_layouts(manifest)
    assert manifest.lowerings["cpu"].graph == "model.onnx"
    ids = text(5, 30)
    runner = Runner(manifest, folder, threads=1)
    assert runner.arena.arrays["key.0"].dtype == np.int8
    runner.step(ids)
    back = Runner(choose_layout(manifest, "fp32"), folder, threads=1)
    np.testing.assert_array_equal(back.step(ids), Runner(*plain, threads=1).step(ids))
    with pytest.raises(UnsupportedError, match="int8 already"):
        with_layouts(folder, manifest, scales, names=["int4"])


def test_wrong_names(plain, scales):
    for options in ({"default": "int2"}, {"names": ["gear-kcvt"]}):
        with pytest.raises(OptionError, match="fp32, fp16, int8, int4"):
            with_layouts(plain[1], plain[0], scales, **options)


@given(st.integers(0, 2**32 - 1), st.sampled_from(["key.0", "value.0"]))
@settings(max_examples=20, deadline=None)
def test_the_4_bit_scale_beats_the_one_that_clips_nothing(seed, role):
    rows = np.random.default_rng(seed).standard_normal((2, 300, 8)).astype(np.float32)
    top = np.abs(rows).max(axis=1, keepdims=True)
    if role == "key.0":
        top = np.tile(np.maximum(top[..., :4], top[..., 4:]), 2)

    def error(scale):
        return np.square(rows - np.clip(np.rint(rows / scale), -8, 7) * scale).mean()

    found = least_error(role, rows, top)
    assert error(found) < 0.8 * error(top / 7)
    if role == "key.0":
        np.testing.assert_array_equal(found[..., :4], found[..., 4:])


def test_pairs_that_rotate_share_a_scale_that_holds_them(scales, plain):
    assert list(scales) == list(LEVELS)
    for layer in range(plain[0].kv.layers):
        for by_role in scales.values():
            key = by_role[f"key.{layer}"]
            assert key.shape == (1, 2, 1, 16)
            np.testing.assert_array_equal(key[..., :8], key[..., 8:])


def test_calibration_reads_the_text_once(plain):
    manifest, folder = plain
    model = onnx.load(str(folder / "model.onnx"), load_external_data=False)
    pieces, seen = [text(0, 40), text(1, 40)], []
    found = calibrate(
        model, manifest, folder, pieces, ["int8"], lambda *report: seen.append(report[1:])
    )
    assert list(found) == ["int8"] and seen == [(1, 2), (2, 2)]
    unknown = dataclasses.replace(manifest, rotary=None)
    assert set(calibrate(model, unknown, folder, pieces)) == {"int8", "int4"}
