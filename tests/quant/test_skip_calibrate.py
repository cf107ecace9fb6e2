"""What calibration finds on a tiny model, and that its parts mean what they say."""

import dataclasses
import shutil

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import tiny_bundle

from forerun.errors import OptionError
from forerun.quant.skip_calibrate import RATIOS, Judge, Probe, add_skipping, find_band, simulate
from forerun.quant.skip_graph import skipping_lowering, with_skipping
from forerun.runtime.manifest import load_manifest, seal
from forerun.runtime.runner import Runner
from forerun.runtime.skipping import parse_skipping

LAYERS = 8
CHANGES = {"layers": LAYERS, "layer_window": (False,) * LAYERS}
PIECES = [np.random.default_rng(seed).integers(0, 256, 64) for seed in range(3)]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return tiny_bundle("llama", tmp_path_factory.mktemp("plain"), **CHANGES)


@pytest.fixture(scope="module")
def calibrated(bundle, tmp_path_factory):
    manifest, source = bundle
    folder = tmp_path_factory.mktemp("calibrated") / "bundle"
    shutil.copytree(source, folder)
    stages = []
    new = add_skipping(folder, manifest, PIECES, report=lambda *stage: stages.append(stage))
    seal(folder, new)
    return load_manifest(folder), folder, stages


def test_the_manifest_tells_all_that_the_rules_need(calibrated):
    manifest, folder, stages = calibrated
    found = manifest.skipping
    assert 1 <= found.first < found.stop <= LAYERS - 1
    assert sorted(found.order) == list(range(found.first, found.stop))
    assert len(found.cosine) == LAYERS and all(-1 <= c <= 1 for c in found.cosine)
    assert [level.ratio for level in found.levels] == sorted({lev.ratio for lev in found.levels})
    assert {level.ratio for level in found.levels} <= set(RATIOS)
    assert found.default in {0.0, *(level.ratio for level in found.levels)}
    assert all(0 <= done <= total for _, done, total in stages)
    assert not list(folder.glob("skip-*"))
    runner = Runner(manifest, folder, threads=1, skipping=parse_skipping("static:0.25", manifest))
    runner.step([1, 2, 3])
    for _ in range(9):
        runner.step([4])
    assert runner.ffn_counts == (9 * LAYERS - 5 * 2, 9 * LAYERS)


def test_a_level_skips_about_its_ratio(calibrated):
    manifest, folder, _ = calibrated
    for level in manifest.skipping.levels[:3]:
        rule = parse_skipping(str(level.ratio), manifest)
        runner = Runner(manifest, folder, threads=1, skipping=rule)
        for piece in PIECES:
            runner.arena.rewind(0)
            runner.step(piece[:48])
            for token in piece[48:]:
                runner.step([token])
        # The warm-up takes a quarter of so short a text.
        assert 0.4 * level.ratio <= 1 - runner.ffn_share <= 1.3 * level.ratio


def test_the_default_is_the_largest_within_the_limit(bundle, tmp_path):
    manifest, source = bundle
    for limit, expected in ((0.0, 0.0), (1e9, None)):
        folder = tmp_path / str(limit)
        shutil.copytree(source, folder)
        found = add_skipping(folder, manifest, PIECES, kl_limit=limit).skipping
        assert found.default == (found.levels[-1].ratio if expected is None else expected)


def test_a_set_costs_in_one_step_what_it_costs_row_by_row(bundle, tmp_path):
    manifest, source = bundle
    shutil.copytree(source, tmp_path / "bundle")
    with_skipping(tmp_path / "bundle", "model.onnx")
    form = skipping_lowering(manifest.lowerings["cpu"], LAYERS)
    judge = Judge(tmp_path / "bundle", manifest, form, [Probe(PIECES[0][:40], PIECES[0][40:])])
    assert judge.cost_of_set([]) == pytest.approx(0, abs=1e-6)
    together = judge.cost_of_set(range(1, LAYERS - 1))
    # A threshold that everything reaches, and a run longer than the model: one block runs.
    skipped, alone = judge.adaptive(-2.0, LAYERS)
    assert skipped == pytest.approx((LAYERS - 3) / LAYERS)
    assert judge.cost_of_set(range(2, LAYERS - 1)) == pytest.approx(alone, rel=1e-3)
    assert together > 0.01


@given(st.dictionaries(st.integers(1, 30), st.floats(0, 10), min_size=1), st.data())
def test_the_band_is_contiguous_and_holds_the_least_harmful(harm, data):
    first, stop = find_band(harm)
    band = range(first, stop)
    assert set(band) <= set(harm)
    assert min(harm, key=lambda layer: harm[layer]) in band
    limit = 4 * np.median(list(harm.values()))
    best = min(harm.values())
    assert all(harm[layer] <= max(limit, best) for layer in band)


@given(st.integers(0, 5), st.integers(1, 4), st.floats(-1, 1))
def test_the_simulated_rule_skips_less_with_a_higher_threshold(seed, run, tau):
    cosine = np.random.default_rng(seed).uniform(-1, 1, (20, 12)).astype(np.float32)
    share = simulate(cosine, (1, 11), -2.0, run)
    assert share == pytest.approx(sum(layer % (run + 1) != 0 for layer in range(10)) / 12)
    assert simulate(cosine, (1, 11), 2.0, run) == 0
    assert 0 <= simulate(cosine, (1, 11), tau, run) <= share


def test_too_little_text_or_model_is_refused(bundle, tmp_path):
    manifest, source = bundle
    before = (source / "model.onnx").read_bytes()
    with pytest.raises(OptionError, match="too short"):
        add_skipping(source, manifest, [np.array([1, 2, 3])])
    small = dataclasses.replace(manifest, model=dataclasses.replace(manifest.model, layers=2))
    with pytest.raises(OptionError, match="2 layers"):
        add_skipping(source, small, PIECES)
    assert (source / "model.onnx").read_bytes() == before
