import stat
import sys

import numpy as np
import pytest
from tiny import tiny_bundle, tiny_source

from forerun.apps.bench import prepare
from forerun.apps.bench.hf_write import write_hf_folder
from forerun.apps.bench.worker import Worker, WorkerError
from forerun.errors import UnsupportedError
from forerun.export.sources import open_source


@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3"])
def test_a_written_folder_reads_back_the_same(arch, tmp_path):
    source = tiny_source(arch, tmp_path / "source")
    back = open_source(write_hf_folder(source, tmp_path / "hf"))
    assert back.names() == source.names()
    for name in source.names():
        np.testing.assert_array_equal(back.tensor(name), source.tensor(name))
    for key in ("architecture", "heads", "kv_heads", "head_dim", "rope_theta", "norm_eps", "tied"):
        assert getattr(back.config, key) == getattr(source.config, key)
    assert back.config.eos == source.config.eos


def test_an_architecture_with_local_layers_is_refused(tmp_path):
    with pytest.raises(UnsupportedError, match="gemma3"):
        write_hf_folder(tiny_source("gemma3", tmp_path / "source"), tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


@pytest.fixture
def origin(tmp_path):
    gguf = tmp_path / "model.gguf"
    gguf.write_bytes(b"GGUF of a kind")
    (tmp_path / "cache").mkdir()
    return prepare.Origin(gguf, tmp_path / "cache", sys.executable, lambda text: None)


def fake_tool(tmp_path, monkeypatch, script):
    tool = tmp_path / "llama-quantize"
    tool.write_text(f"#!/bin/sh\necho call >> {tmp_path}/calls\n{script}\n")
    tool.chmod(tool.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setattr(prepare, "llama_binary", lambda python, name: tool)


def test_requantized_once_then_kept(origin, tmp_path, monkeypatch):
    fake_tool(tmp_path, monkeypatch, 'test "$1" = --allow-requantize && cp "$2" "$3"')
    for _ in range(2):
        made = prepare.q4_0(origin)
        assert made.weights == "Q4_0"
        assert made.path.read_bytes() == origin.gguf.read_bytes()
    assert (tmp_path / "calls").read_text() == "call\n"


def test_a_failing_tool_leaves_nothing_and_says_why(origin, tmp_path, monkeypatch):
    fake_tool(tmp_path, monkeypatch, 'echo half > "$3"; echo "no space on device"; exit 1')
    with pytest.raises(prepare.NotPrepared, match="no space on device"):
        prepare.q4_0(origin)
    assert list(origin.cache.iterdir()) == []


def test_a_missing_package_is_said(origin):
    with pytest.raises(prepare.NotPrepared, match="no llama-imaginary"):
        prepare.llama_binary(sys.executable, "llama-imaginary")


def test_a_model_outside_the_catalog_has_no_known_source():
    with pytest.raises(prepare.NotPrepared, match="not in the catalog"):
        prepare.origin_of("made-by-hand", sys.executable)


@pytest.fixture
def our_worker(tmp_path):
    _, folder = tiny_bundle("llama", tmp_path)
    command = [sys.executable, "-m", "forerun.apps.bench.peer_forerun"]
    worker = Worker("forerun", command, tmp_path / "log")
    worker.call("load", model=str(folder), threads=1, context=64)
    yield worker
    worker.close()


def test_our_worker_writes_on_after_end_tokens_and_reads_the_whole_prompt(our_worker):
    prompt = [5, 6, 7, 8] * 8
    first = our_worker.call("measure", prompt=prompt, tokens=20)
    again = our_worker.call("measure", prompt=prompt, tokens=20)
    assert len(first["tokens"]) == 20
    assert first["steps"] == 19
    assert again["tokens"] == first["tokens"]
    assert 0 < first["session_share"] <= 1
    assert first["prefill_s"] > 0
    assert first["decode_s"] > 0
    assert our_worker.call("memory")["peak_rss_mb"] > 10


def test_our_worker_refuses_what_does_not_fit(our_worker):
    with pytest.raises(WorkerError, match="ContextLimitError"):
        our_worker.call("measure", prompt=[5] * 1000, tokens=4)
    assert our_worker.call("measure", prompt=[5, 6], tokens=3)["steps"] == 2
