"""What `load` makes of a wish for the KV cache or for skipping, on devices that differ in it."""

import dataclasses

import numpy as np
import pytest
from tiny import tiny_bundle

from forerun.errors import OptionError, UnsupportedError
from forerun.quant.kv_graphs import with_layouts
from forerun.quant.skip_graph import skipping_lowering, with_skipping
from forerun.runtime import open as opening
from forerun.runtime.drafting import survey
from forerun.runtime.drafting.costs import StepCosts
from forerun.runtime.load import load
from forerun.runtime.manifest import SkipLevel, Skipping, seal
from forerun.runtime.session import PREFILL_CHUNK, SMALL_CHUNK

CAPACITY = 128
SCALES = {f"{part}.{layer}": np.full(32, 0.05) for layer in range(3) for part in ("key", "value")}
FOUND = Skipping(1, 2, (0.9,) * 3, (1,), (SkipLevel(0.2, 0.5, 1),), default=0.0)


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("FORERUN_HOME", str(tmp_path / "home"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Runs 8 bits by itself on the cpu, has float32 too, and can skip a block."""
    manifest, folder = tiny_bundle("llama", tmp_path_factory.mktemp("tiny"), capacity=CAPACITY)
    form = skipping_lowering(manifest.lowerings["cpu"], with_skipping(folder, "model.onnx"))
    able = dataclasses.replace(
        manifest, lowerings=manifest.lowerings | {"cpu": form}, skipping=FOUND
    )
    del able.lowerings["cpu-tree"]
    scales = {"int8": SCALES, "int4": SCALES}
    full = with_layouts(folder, able, scales, default="int8", names=("fp32", "int8"))
    seal(folder, full)
    return folder


@pytest.fixture
def fast_gpu(monkeypatch):
    """A device that is here and wins every comparison; tells which targets were measured."""
    tried = []

    def measured(manifest, folder, device, threads, progress, limit):
        tried.append(device)
        step = 0.010 if device == "cpu" else 0.001
        return StepCosts((1, 16), (64,), ((step, step * 1.1),))

    monkeypatch.setattr(survey, "measured_target", measured)
    monkeypatch.setattr(
        opening, "missing", lambda row: "" if row.name in ("cpu", "webgpu") else "x"
    )
    return tried


@pytest.mark.parametrize(
    "wish",
    [
        {"kv_budget": "20KB"},
        {"kv": "int8"},
        {"window": 40, "kv": "fp32"},
        {"skipping": "0.2"},
    ],
)
def test_what_only_the_cpu_can_do_keeps_the_target_there(folder, fast_gpu, wish):
    how = {"threads": 1, "drafter": "none", **wish}
    with load(folder, device="auto", allow_fallback=True, **how) as text:
        assert text._runner.device == "cpu" and fast_gpu == ["cpu"]
        said = text.generate(list(range(20)), max_tokens=3)
    with load(folder, device="cpu", **how) as text:
        assert text.generate(list(range(20)), max_tokens=3) == said


def test_a_budget_is_told_for_the_device_that_was_chosen(folder, fast_gpu):
    told = []
    options = {"threads": 1, "drafter": "none", "device": "auto", "on_placement": told.append}
    with load(folder, kv_budget="20KB", **options) as text:
        assert text.capacity == 20_000 // text.manifest.kv.nbytes_per_token
    assert "target on cpu" in told[0] and "8-bit" in told[1]


@pytest.mark.parametrize("skipping", ["OFF", "0", "default", "static:0"])
def test_skipping_that_is_off_is_off(folder, skipping):
    with load(folder, threads=1, drafter="ngram", policy="fixed:2", skipping=skipping) as text:
        stats = list(text.stream(list(range(20)), max_tokens=3))[-1].stats
        assert stats.drafter == "ngram" and text._runner.skipping is None


def test_drafting_is_refused_in_the_same_words(folder):
    for wish, what in (({"window": 40, "kv": "fp32"}, "window"), ({"skipping": "0.2"}, "skipping")):
        words = f"drafting does not go with {what}, since .*; use --drafter none, or no {what}"
        with pytest.raises(OptionError, match=words):
            load(folder, drafter="ngram", **wish)
        with load(folder, threads=1, **wish) as text, pytest.raises(OptionError, match=words):
            text.generate("hi", drafter="ngram")


def test_a_window_has_no_end_that_context_could_say_anything_of(folder):
    with load(folder, threads=1, kv="fp32", window=40) as text:
        assert text.is_endless
        for wrong in ({"context": "slide"}, {"n_keep": 9}):
            with pytest.raises(OptionError, match="without a window"):
                text.generate("hi", **wrong)
        assert len(list(text.stream("hi", max_tokens=60))) > 0
    with pytest.raises(OptionError, match="this one is 8-bit: take --kv fp32"):
        load(folder, window=40)
    with load(folder, threads=1) as text:
        assert not text.is_endless and text.capacity == CAPACITY


def test_the_parts_of_a_prompt_are_as_long_as_its_cache_can_read(folder):
    for kv, chunk in (("int8", SMALL_CHUNK), ("fp32", PREFILL_CHUNK)):
        with load(folder, threads=1, kv=kv) as text:
            assert text._session._chunk == chunk


def test_errors_come_before_the_bundle_is_read(tmp_path):
    for wrong in ({"skipping": "much"}, {"kv_budget": 64e3}, {"window": "64"}):
        with pytest.raises(OptionError, match=r"much|float|str"):
            load(tmp_path / "nowhere", **wrong)


def test_the_words_for_a_device_name_it(folder):
    with pytest.raises(OptionError, match="webgpu runs the KV layout fp32 alone, not int8"):
        load(folder, device="webgpu", kv="int8")
    with pytest.raises(OptionError, match="skipping works on the cpu only, not on webgpu"):
        load(folder, device="webgpu", skipping="0.2")
    with pytest.raises(OptionError, match="runs on the cpu, not on webgpu"):
        load(folder, device="webgpu", kv="fp32", window=40)


def test_a_model_drafts_for_itself_where_its_graph_can_skip(folder, monkeypatch):
    with load(folder, threads=1, drafter="skip", policy="fixed:2") as text:
        assert list(text.stream("hi", max_tokens=3))[-1].stats.drafter == "skip"
    monkeypatch.setattr("forerun.runtime.runner.Runner.can_skip", False)
    with pytest.raises(UnsupportedError, match="for cpu cannot; run it on the cpu"):
        load(folder, threads=1, drafter="skip", policy="fixed:2")


@pytest.mark.gpu
def test_on_a_gpu_the_cache_is_what_is_told_of_it(folder, webgpu):
    told = []
    options = {"threads": 1, "drafter": "none", "on_placement": told.append}
    with load(folder, device=webgpu, kv_budget="1MB", **options) as text:
        assert "32-bit float, 128 tokens" in told[0]
        assert text.manifest.kv.dtype == "float32" and text._session._chunk == PREFILL_CHUNK
        assert text._runner.arena.nbytes == text.manifest.kv.nbytes
        answer = text.generate(list(range(20)), max_tokens=8)
    with load(folder, kv="fp32", **options) as text:
        assert text.generate(list(range(20)), max_tokens=8) == answer
    with pytest.raises(UnsupportedError, match="for webgpu cannot; run it on the cpu"):
        load(folder, threads=1, device=webgpu, drafter="skip")
