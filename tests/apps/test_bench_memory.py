"""Where the memory of a chat goes: parts that were measured, and that add up to the peak."""

import json
import sys

import numpy as np
import pytest

from forerun.apps.bench import memory
from forerun.apps.bench.memory import parts_of, run_memory
from forerun.apps.bench.memory_worker import read_memory
from forerun.apps.cli import bench_memory
from forerun.errors import OptionError, UnsupportedError
from forerun.runtime.arena import lazy_zeros

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /proc")


def measured(forerun, tmp_path, *arguments):
    """The JSON file of a run, and what the command printed."""
    path = tmp_path / "memory.json"
    done = forerun("bench", "memory", "--threads", 1, "--json", path, *arguments)
    assert done.returncode == 0, done.stderr
    return json.loads(path.read_text()), done


@linux
def test_parts_add_up_to_the_peak_and_are_shown(forerun, layouts, tmp_path):
    fields, done = measured(forerun, tmp_path, "--model", layouts, "--tokens", 500)
    assert set(fields["parts"]) == set(memory.PARTS)
    assert sum(fields["parts"].values()) == pytest.approx(fields["peak_rss_mb"], abs=0.03)
    assert fields["parts"]["libraries"] > 20, "numpy and ONNX Runtime alone are more"
    assert 400 < fields["tokens"] <= 500 and fields["turns"] >= 1
    for words in (*memory.PARTS.values(), "peak", "KV fp32"):
        assert words in done.stdout
    assert "forerun: chat: 500 of 500 tokens (100 %)" in done.stderr


@linux
def test_the_cache_is_what_its_layout_takes(forerun, layouts, tmp_path):
    page = 4096
    for layout in ("fp32", "int8"):
        how = ("--model", layouts, "--tokens", 500, "--kv", layout)
        fields, _ = measured(forerun, tmp_path, *how)
        assert fields["kv"] == layout
        wanted = fields["tokens"] * fields["kv_bytes_per_token"]
        # Whole pages of each array, one for keys and one for values.
        assert wanted <= fields["parts"]["kv"] * (1 << 20) * 1.05
        assert fields["parts"]["kv"] * (1 << 20) <= wanted + 8 * page


@linux
def test_a_longer_chat_takes_more_cache(forerun, layouts, tmp_path):
    short, _ = measured(forerun, tmp_path, "--model", layouts, "--tokens", 256)
    long, _ = measured(forerun, tmp_path, "--model", layouts, "--tokens", 512)
    assert long["tokens"] > short["tokens"] + 150
    assert long["parts"]["kv"] > short["parts"]["kv"]


@linux
def test_memory_of_the_cache_is_told_from_any_other():
    before = read_memory()
    # Too large for memory that was freed before to be taken again.
    cache, other = lazy_zeros((1, 4 << 20), "float32"), np.ones(16 << 20, np.float32)
    cache[:] = 1
    after = read_memory()
    assert after["kv"] - before["kv"] == pytest.approx(16, abs=0.5)
    assert after["rss"] - before["rss"] == pytest.approx(80, abs=8) and len(other)


def test_parts_leave_the_cache_out_of_the_session():
    seen = {
        "libraries": {"rss": 50.0, "kv": 0.0},
        "tokenizer": {"rss": 80.0, "kv": 0.0},
        "session": {"rss": 180.0, "kv": 1.0},
    }
    parts = parts_of(seen, {"peak": 250.0, "rss": 240.0, "kv": 40.0})
    assert parts == {"libraries": 50, "tokenizer": 30, "session": 99, "kv": 40, "rest": 31}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--tokens", 600), "the KV cache of 512; give fewer --tokens"),
        (("--tokens", 9), "256"),
        (("--kv", "int8"), "this bundle has fp32"),
        (("--json", "/nowhere/x.json"), "/nowhere"),
        (("--threads", 0), "1"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_one_line(forerun, arguments, words):
    done = forerun("bench", "memory", "--model", forerun.model, *arguments)
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1
    assert words in done.stderr


def test_elsewhere_than_on_linux_it_says_so(forerun, monkeypatch):
    monkeypatch.setattr(memory.sys, "platform", "darwin")
    with pytest.raises(UnsupportedError, match="Linux"):
        run_memory(forerun.model)


@linux
def test_numbers_out_of_range(forerun):
    assert bench_memory.LEAST_CHAT == memory.LEAST_TOKENS
    with pytest.raises(OptionError, match="at least 256"):
        run_memory(forerun.model, tokens=255)
    with pytest.raises(OptionError, match="at least 1"):
        run_memory(forerun.model, tokens=300, threads=0)
