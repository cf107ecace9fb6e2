"""What `evaluate` measures, on a tiny bundle where every figure can be checked another way."""

import dataclasses
import json
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from tiny import edit_manifest, tiny_bundle

import forerun
from forerun.errors import BundleError, OptionError
from forerun.quant.corpus import CORPUS, Piece, corpus_text, load_tokenizer
from forerun.quant.evaluate import Judged, Plan, contexts_within, evaluate, evaluate_all
from forerun.quant.measure_agreement import agreement
from forerun.quant.measure_divergence import Stream, compare, log_softmax
from forerun.quant.measure_open import label, open_judged, weight_bytes
from forerun.quant.measure_speed import MeasureError, _request, depths_of, measure_speed
from forerun.quant.quantize import Wish, quantize
from forerun.quant.skip_graph import skipping_lowering, with_skipping
from forerun.runtime.manifest import SkipLevel, Skipping, load_manifest, seal
from forerun.runtime.runner import Runner

SHORT = Plan(contexts=(64,), tokens=384, prompts=3, pairs=2, rounds=0)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return tiny_bundle("llama", tmp_path_factory.mktemp("fp32"), capacity=256)[1]


@pytest.fixture(scope="module")
def small(bundle, tmp_path_factory):
    out = tmp_path_factory.mktemp("small") / "int8"
    quantize(bundle, out, weights="int8")
    return out


@pytest.fixture
def runner(bundle):
    opened = Runner(load_manifest(bundle), bundle, threads=1)
    yield opened
    opened.close()


def naive(bundle, ids):
    """Log-probabilities of a text read in one step."""
    runner = Runner(load_manifest(bundle), bundle, threads=1)
    rows = runner.step(ids, want="all").copy()
    runner.close()
    return log_softmax(rows.astype(np.float64))


def test_figures_are_those_of_the_definitions(bundle, small):
    rng = np.random.default_rng(3)
    pieces = [Piece("a", rng.integers(0, 256, 150), 50), Piece("b", rng.integers(0, 256, 90), 0)]
    streams = [open_judged(Judged(folder, threads=1)) for folder in (small, bundle)]
    tally = compare([Stream(streams[0])], Stream(streams[1]), pieces)[0]
    kl, nll, same = [], [], []
    for piece in pieces:
        p, q = (naive(folder, piece.ids)[piece.first :] for folder in (small, bundle))
        kl.append((np.exp(q) * (q - p)).sum(-1))
        same.append(p.argmax(-1) == q.argmax(-1))
        nll.append(-p[np.arange(len(p) - 1), piece.ids[piece.first + 1 :]])
    found = tally.result()
    assert found.tokens == 190
    assert found.kl_mean == pytest.approx(np.concatenate(kl).mean(), rel=5e-2)
    assert found.kl_p99 == pytest.approx(np.quantile(np.concatenate(kl), 0.99), rel=5e-2)
    assert found.top1_agreement == pytest.approx(np.concatenate(same).mean(), abs=0.011)
    assert found.perplexity == pytest.approx(math.exp(np.concatenate(nll).mean()), rel=1e-3)
    only_b = tally.result(kind="b")
    assert only_b == tally.result(context=90) and only_b.tokens == 90
    assert only_b.kl_mean == pytest.approx(kl[1].mean(), rel=5e-2)


def test_single_rows_give_the_same_figures_and_are_single(bundle, monkeypatch):
    """Skipped blocks show in steps of one row only, so those must be asked for."""
    widths = []
    step = Runner.step
    monkeypatch.setattr(
        Runner, "step", lambda self, ids, **k: (widths.append(len(ids)), step(self, ids, **k))[1]
    )
    piece = Piece("a", np.random.default_rng(0).integers(0, 256, 100), 60)
    found = []
    for rows in (None, 1):
        runner = open_judged(Judged(bundle, threads=1))
        found.append(compare([Stream(runner, rows)], None, [piece])[0].result())
        runner.close()
    assert widths == [60, 40, 60, *[1] * 40]
    assert found[0].perplexity == pytest.approx(found[1].perplexity, rel=1e-4)
    assert Judged(bundle, ffn_skip="0.2").rows_per_step == 1
    assert Judged(bundle).rows_per_step is None


def test_evaluate_has_every_field_and_is_the_same_every_time(bundle, small):
    row = evaluate(small, bundle, plan=SHORT)
    assert json.loads(json.dumps(row)) == row
    assert row["tokens"] == 6 * 32
    assert 0 < row["kl_mean"] < 0.1 and row["top1_agreement"] > 0.8
    assert list(row["by_text"]) == ["prose", "reference", "code"] and list(row["by_context"]) == [
        "64"
    ]
    assert sum(part["tokens"] for part in row["by_text"].values()) == row["tokens"]
    assert row["by_context"]["64"]["kl_mean"] == row["kl_mean"]
    assert row["label"] == "int8" and row["kv_bytes_per_token"] == 2 * 3 * 2 * 16 * 4
    assert row["recall_queries"] == len(row["recall_by_depth"]) * 2 and 0 <= row["recall"] <= 100
    assert evaluate(small, bundle, plan=SHORT) == row


def test_the_reference_against_itself(bundle):
    row = evaluate(bundle, bundle, plan=SHORT)
    assert row["kl_mean"] == pytest.approx(0, abs=1e-6) and row["top1_agreement"] == 1
    assert row["perplexity"] == row["perplexity_against"]
    assert row["agreement_tokens"]["mean"] == row["agreement_tokens"]["cap"] == 128
    assert row["agreement_tokens"]["whole"] == 3
    assert row["recall"] == row["recall_against"]


def test_alone_it_has_no_distance(bundle):
    row = evaluate(bundle, plan=SHORT)
    assert row["kl_mean"] is None and row["against"] is None and row["perplexity"] > 1
    assert "agreement_tokens" not in row


def test_several_rows_are_what_each_is_alone(bundle, small):
    both = evaluate_all([Judged(small), Judged(bundle)], bundle, plan=SHORT)
    assert both == [evaluate(small, bundle, plan=SHORT), evaluate(bundle, bundle, plan=SHORT)]


def test_more_rows_than_are_open_at_once(bundle, monkeypatch):
    from forerun.quant import evaluate as module

    monkeypatch.setattr(module, "_AT_ONCE", 1)
    plan = dataclasses.replace(SHORT, prompts=0)
    rows = evaluate_all([Judged(bundle), Judged(bundle)], bundle, plan=plan)
    assert rows[0] == rows[1] and rows[1]["recall_against"] == rows[1]["recall"]


def test_agreement_is_what_decoding_both_would_find(bundle, small):
    def greedy(folder, prompt, count):
        runner = Runner(load_manifest(folder), folder, threads=1)
        tokens = [int(runner.step(prompt).argmax())]
        while len(tokens) < count:
            tokens.append(int(runner.step([tokens[-1]]).argmax()))
        runner.close()
        return np.array(tokens)

    prompts = [np.random.default_rng(seed).integers(0, 256, 24) for seed in range(4)]
    expected = []
    for prompt in prompts:
        differ = np.flatnonzero(greedy(small, prompt, 128) != greedy(bundle, prompt, 128))
        expected.append(int(differ[0]) if differ.size else 128)
    assert len(set(expected)) > 1, "the prompts must tell something"
    streams = [Stream(open_judged(Judged(folder, threads=1))) for folder in (small, bundle)]
    found = agreement(*streams, prompts, 256)
    assert found["mean"] == pytest.approx(np.mean(expected))
    assert found["median"] == np.median(expected) and found["prompts"] == 4


def test_a_quantized_reference_agrees_with_itself(small):
    # Its rows differ a little from those of a step of many, enough to turn a near-tie.
    row = evaluate(small, small, plan=dataclasses.replace(SHORT, prompts=6, pairs=0))
    found = row["agreement_tokens"]
    assert found["whole"] == found["prompts"] == 6 and found["mean"] == found["cap"]


def test_a_text_of_the_users(bundle, tmp_path):
    path = tmp_path / "mine.txt"
    path.write_text("All work and no play makes Jack a dull boy.\n" * 40, encoding="utf-8")
    row = evaluate(bundle, plan=dataclasses.replace(SHORT, text=path, pairs=0))
    assert list(row["by_text"]) == ["text"] and row["recall"] is None


@pytest.mark.parametrize(
    ("contexts", "tokens"), [((8,), 100), ((1000,), 4000), ((64,), 10), ((), 100), ((64, 257), 900)]
)
def test_ranges(bundle, contexts, tokens):
    with pytest.raises(OptionError, match=r"context|tokens"):
        evaluate(bundle, plan=Plan(contexts=contexts, tokens=tokens))


def test_contexts_that_do_not_fit_are_left_out(bundle):
    assert contexts_within([Judged(bundle)], (64, 128, 512)) == (64, 128)
    assert contexts_within([Judged(bundle)], (512, 2048)) == (256,)


def test_the_same_tokenizer_is_needed(bundle, tmp_path):
    _, other = tiny_bundle("llama", tmp_path)
    edit_manifest(other, lambda m: m["tokenizer"].update(sha256="0" * 64))
    with pytest.raises(OptionError, match="tokenizers"):
        evaluate(other, bundle)


def test_what_a_bundle_lacks_is_refused_before_any_compute(bundle, monkeypatch):
    monkeypatch.setattr(Runner, "__init__", lambda *a, **k: pytest.fail("a model was opened"))
    skips = ({"ffn_skip": "0.2"}, {"ffn_skip": "lots"})
    for wrong in ({"kv": "int4"}, {"kv": "int3"}, {"window": 3}, *skips):
        with pytest.raises((OptionError, BundleError)):
            evaluate_all([Judged(bundle), Judged(bundle, **wrong)], plan=SHORT)


def test_labels_tell_all_that_differs(bundle, small):
    assert label(Judged(bundle), load_manifest(bundle)) == "fp32"
    one = Judged(small, kv="int4", ffn_skip="0.1", window=64)
    assert label(one, load_manifest(small)) == "int8, KV int4, window 64, skip 0.1"


def test_weight_bytes_are_those_of_what_runs(bundle):
    manifest = load_manifest(bundle)
    sizes = [(bundle / name).stat().st_size for name in ("model.onnx", "weights.bin")]
    assert weight_bytes(manifest) == sum(sizes)


def test_speed_and_memory_are_measured_in_a_process_of_its_own(bundle):
    done = []
    found = measure_speed([Judged(bundle, threads=1)] * 2, 1, lambda *a: done.append(a))
    assert done == [("speed", 1, 2), ("speed", 2, 2)]
    for one in found:
        speed = one["decode_tok_s"]
        assert 0 < speed["min"] <= speed["median"] <= speed["max"]
        assert one["decode_by_depth"][max(one["decode_by_depth"], key=int)] == speed
        assert 20 < one["peak_rss_mb"] < 400, "a tiny bundle, and no reference beside it"


def test_every_field_is_documented(bundle, small):
    row = evaluate(small, bundle, plan=dataclasses.replace(SHORT, rounds=1))
    page = (Path(forerun.__file__).parent / "docs" / "json.md").read_text("utf-8")
    known = set(re.findall(r"`([a-z0-9_]+)`", page))
    known |= {f"{name}_against" for name in known}
    assert set(row) <= known, set(row) - known


def test_a_process_that_fails_is_told(bundle, tmp_path):
    folder = shutil.copytree(bundle, tmp_path / "bundle")
    (folder / "model.onnx").write_bytes(b"no graph")
    with pytest.raises(MeasureError, match=r"failed: .*model\.onnx"):
        measure_speed([Judged(folder)], 1)


def test_speed_is_measured_at_the_depths_that_were_asked_for(bundle):
    (found,) = measure_speed([Judged(bundle, threads=1)], 1, depths=(8, 72))
    assert set(found["decode_by_depth"]) == {"8", "72"}
    assert found["decode_depth"] == 72 and found["ffn_skipped"] == 0
    assert found["decode_tok_s"] == found["decode_by_depth"]["72"]


def test_depths_of_speed_that_do_not_fit_are_refused_before_any_compute(bundle, monkeypatch):
    monkeypatch.setattr(Runner, "__init__", lambda *a, **k: pytest.fail("a model was opened"))
    for depths in ((64, 205), (0,)):
        plan = dataclasses.replace(SHORT, rounds=1, speed_depths=depths)
        with pytest.raises(OptionError, match=r"must be in 1\.\.204 for fp32, .*; got"):
            evaluate(bundle, plan=plan)


@pytest.mark.parametrize("depths", [(8, 40), (64, 64), (203, 204), (8, 59)])
def test_depths_of_speed_that_the_tokens_before_reach_are_refused(bundle, depths):
    # The first depth decodes on from there, so the second one would be timed further on.
    with pytest.raises(OptionError, match=f"52 or more apart, .*got {depths[0]} and {depths[1]}"):
        depths_of(Judged(bundle), load_manifest(bundle), depths)
    assert depths_of(Judged(bundle), load_manifest(bundle), (8, 60)) == (8, 60)


def test_depths_of_speed_that_nobody_asked_for_are_left_out(bundle):
    manifest = load_manifest(bundle)
    assert depths_of(Judged(bundle), manifest, None) == (64,)
    assert depths_of(Judged(bundle), manifest, (204, 8)) == (8, 204)
    assert depths_of(Judged(bundle, window=64), manifest, None) == (64,)
    short = dataclasses.replace(manifest, kv=dataclasses.replace(manifest.kv, capacity=60))
    assert depths_of(Judged(bundle), short, None) == (8,)
    none = dataclasses.replace(manifest, kv=dataclasses.replace(manifest.kv, capacity=52))
    with pytest.raises(OptionError, match="holds 52 tokens, and speed is timed over 52"):
        depths_of(Judged(bundle), none, None)


def test_speed_with_skipping_is_that_of_real_text_and_tells_the_share(tmp_path):
    changes = {"layers": 4, "layer_window": (False,) * 4}
    manifest, folder = tiny_bundle("llama", tmp_path, capacity=256, **changes)
    with_skipping(folder, "model.onnx")
    form = skipping_lowering(manifest.lowerings["cpu"], 4)
    how = Skipping(1, 3, (0.0,) * 4, (1, 2), (SkipLevel(0.25, -1.0, 1),), 4, 0.25)
    kept = {"cpu": form}
    seal(folder, dataclasses.replace(manifest, skipping=how, lowerings=kept))
    judged = [Judged(folder, ffn_skip=skip, threads=1) for skip in ("0.25", "static:0.5", None)]
    found = measure_speed(judged, 1, depths=(20,))
    assert [one["ffn_skipped"] for one in found] == [0.25, 0.5, 0]
    ids = _request(judged[0], load_manifest(folder), (20,))["ids"]
    prose = load_tokenizer(manifest, folder).encode(corpus_text(CORPUS[0])[:400]).ids
    assert ids == prose[:20]


def test_rows_name_the_layout_that_ran(bundle, tmp_path):
    quantize(bundle, tmp_path / "q", weights=Wish("fp32", "int8"))
    plan = dataclasses.replace(SHORT, prompts=0, pairs=0)
    rows = evaluate_all([Judged(tmp_path / "q"), Judged(tmp_path / "q", kv="int4")], plan=plan)
    assert [(row["kv"], row["kv_layout"]) for row in rows] == [(None, "int8"), ("int4", "int4")]
