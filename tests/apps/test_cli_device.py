"""`--device` and `--allow-fallback` of generate, chat and batches."""

import json

import pytest

from forerun.devices.plugins import missing
from forerun.devices.providers import PROVIDERS
from forerun.runtime import open as opening

PLAIN = ("--raw", "--max-tokens", "20")
# One that is not here, whatever machine runs the tests.
ABSENT = next(row.name for row in PROVIDERS.values() if not row.module and missing(row))


def test_a_device_that_is_not_here_is_told(forerun):
    for command in (("generate", "hi"), ("chat",)):
        done = forerun(*command, "--model", forerun.model, "--device", ABSENT)
        assert done.returncode == 2 and f"{ABSENT} is not in this ONNX Runtime" in done.stderr
        assert "pip install" in done.stderr or "needs" in done.stderr
        assert done.stdout == "" and len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (("--device", "gpu"), "'gpu' is unknown; there are cpu, webgpu"),
        (("--device", "target=cpu,draft"), "names no device"),
        (("--device", "main=cpu"), "not understood"),
        (("--device", "draft=webgpu", "--drafter", "ngram"), "runs on the cpu, not on webgpu"),
    ],
)
def test_what_cannot_be_is_refused(forerun, options, text):
    done = forerun("generate", "hi", "--model", forerun.model, *options)
    assert done.returncode == 2 and text in done.stderr


def test_falling_back_is_said_and_gives_the_answer_of_the_cpu(forerun, tmp_path):
    arguments = ("generate", "xyz", "--model", forerun.model, *PLAIN, "--json")
    plain = json.loads(forerun(*arguments).stdout)
    done = forerun(*arguments, "--device", ABSENT, "--allow-fallback")
    assert "going on on the cpu, as was allowed" in done.stderr
    found = json.loads(done.stdout)
    assert found["tokens"] == plain["tokens"] and found["stats"]["devices"]["target"] == "cpu"
    prompts, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    prompts.write_text('{"prompt": "xyz"}\n')
    batch = ("generate", "--file", prompts, "--out", out, "--model", forerun.model, *PLAIN)
    done = forerun(*batch, "--device", ABSENT)
    assert done.returncode == 2 and not out.read_text()
    done = forerun(*batch, "--device", ABSENT, "--allow-fallback")
    assert done.returncode == 0 and "going on on the cpu" in done.stderr
    assert json.loads(out.read_text())["text"] == found["text"]


def test_auto_takes_the_cpu_where_nothing_else_is(forerun, monkeypatch):
    monkeypatch.setattr(opening, "missing", lambda row: "" if row.name == "cpu" else "not here")
    arguments = ("generate", "xyz", "--model", forerun.model, *PLAIN, "--json")
    done = forerun(*arguments, "--device", "auto", "--allow-fallback")
    assert json.loads(done.stdout)["stats"]["devices"]["target"] == "cpu"
    refused = forerun(*arguments, "--device", "cpu", "--allow-fallback")
    assert refused.returncode == 2 and "another device than the cpu" in refused.stderr


@pytest.mark.gpu
def test_the_figures_name_the_device(forerun, webgpu):
    arguments = ("generate", "xyz", "--model", forerun.model, "--raw", "--max-tokens", "4")
    plain = forerun(*arguments)
    done = forerun(*arguments, "--device", webgpu, "--stats")
    assert done.returncode == 0, done.stderr
    assert done.stdout == plain.stdout and "target on webgpu" in done.stderr
