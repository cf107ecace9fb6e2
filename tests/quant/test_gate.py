"""The gate: every limit is kept or refuses, and a refusal tells all figures."""

import dataclasses
import math

import pytest
from tiny import tiny_bundle

from forerun.errors import ExportMismatch, OptionError
from forerun.export.card import write_card
from forerun.quant.gate import (
    Limits,
    QualityMismatch,
    gate_rows,
    keep_limits,
    keep_skipping,
    measure_gate,
)
from forerun.quant.measure_divergence import Divergence
from forerun.quant.measure_open import Judged
from forerun.quant.quantize import quantize
from forerun.runtime.manifest import load_manifest

MEASURED = Divergence(12.0, 10.0, kl_mean=0.2, kl_p99=1.5, top1_agreement=0.8, tokens=512)


@pytest.mark.parametrize(
    ("limits", "words"),
    [
        (Limits(0.1), "mean KL to float32 is 0.2, allowed is at most 0.1"),
        (Limits(None, kl_p99=1.0), "99th percentile of KL is 1.5"),
        (Limits(None, top1=0.9), "same best token is 0.8, allowed is at least 0.9"),
        (Limits(None, perplexity_ratio=1.1), "perplexity by that of float32 is 1.2"),
    ],
)
def test_each_limit_refuses_on_its_own(limits, words):
    with pytest.raises(QualityMismatch, match=words) as caught:
        keep_limits(MEASURED, limits)
    assert isinstance(caught.value, ExportMismatch) and caught.value.exit_code == 1
    assert "the bundle was not written" in str(caught.value)
    assert caught.value.measured is MEASURED


def test_kept_limits_are_recorded_with_their_figures():
    checks = keep_limits(MEASURED, Limits(0.25, kl_p99=2, top1=0.7, perplexity_ratio=1.3))
    assert [(c.metric, c.value, c.bound) for c in checks] == [
        ("kl_mean", 0.2, 0.25),
        ("kl_p99", 1.5, 2),
        ("top1_agreement", 0.8, 0.7),
        ("perplexity_ratio", 1.2, 1.3),
    ]
    assert all(row[3] == "kept" for row in gate_rows(checks))


def test_a_refusal_has_the_whole_table():
    with pytest.raises(QualityMismatch) as caught:
        keep_limits(MEASURED, Limits(0.1, top1=0.7))
    assert caught.value.rows == [
        ("mean KL to float32", 0.2, "<= 0.1", "NOT KEPT"),
        ("same best token", 0.8, ">= 0.7", "kept"),
    ]


def test_what_is_not_a_number_is_refused():
    broken = Divergence(math.nan, 10.0, math.nan, math.nan, 0.0, 512)
    for limits in (Limits(9.0), Limits(None, kl_p99=9.0), Limits(None, perplexity_ratio=9.0)):
        with pytest.raises(QualityMismatch):
            keep_limits(broken, limits)


@pytest.mark.parametrize(
    "wrong",
    [
        {"kl_mean": 0},
        {"kl_mean": -1},
        {"kl_mean": 1, "top1": 1.5},
        {"kl_mean": math.nan},
        {"kl_mean": None, "top1": math.nan},
    ],
)
def test_limits_that_make_no_sense(wrong):
    with pytest.raises(OptionError, match=r"the limit .* must be .*, got .*; leave it out"):
        Limits(**wrong)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gate")
    source = tiny_bundle("llama", folder / "fp32", capacity=256)[1]
    quantize(source, folder / "int8", weights="int8")
    return folder / "int8", source


def test_the_measure_is_the_same_every_time(pair):
    small, source = pair
    given = Judged(small), load_manifest(small), Judged(source), load_manifest(source)
    first, again = measure_gate(*given), measure_gate(*given)
    assert first == again
    (check,) = keep_limits(first, Limits(0.5))
    assert 0 < check.value == load_manifest(small).checks[-1].value
    with pytest.raises(QualityMismatch):
        keep_limits(first, Limits(0.5, kl_p99=1e-9))


def test_checks_name_the_cache_that_ran(pair):
    small = load_manifest(pair[0])
    assert small.checks[-1].against == "float32 bundle (this one with KV fp32)"
    (check,) = keep_limits(MEASURED, Limits(1.0), small)
    assert check.against == small.checks[-1].against


def test_without_levels_nothing_is_skipped_by_default(pair):
    manifest = load_manifest(pair[0])
    source = Judged(pair[1]), load_manifest(pair[1])
    assert keep_skipping(pair[0], manifest, *source, Limits(1.0)) == (0.0, ())


def test_the_card_says_which_side_of_a_limit_is_good(tmp_path, pair):
    checks = keep_limits(MEASURED, Limits(0.25, top1=0.7))
    write_card(tmp_path, dataclasses.replace(load_manifest(pair[0]), checks=checks))
    card = (tmp_path / "README.md").read_text()
    assert "| kl_mean | 0.2 | <= 0.25 |" in card and "| top1_agreement | 0.8 | >= 0.7 |" in card


def test_a_bundle_is_as_good_as_itself(pair):
    source = Judged(pair[1], threads=1)
    measured = measure_gate(source, load_manifest(pair[1]), source)
    assert measured.kl_mean == pytest.approx(0, abs=1e-6) and measured.top1_agreement == 1
