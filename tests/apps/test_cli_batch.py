"""`forerun generate --file`: a job that survives kills, damage, and its user's mistakes."""

import json
import os
import signal
import subprocess
import time

import pytest

from forerun.apps.cli import batch, generate
from forerun.errors import SpaceError
from forerun.runtime.types import SamplingParams


@pytest.fixture
def job(forerun, tmp_path):
    """A job on `tmp_path`: write prompts, run it, read its results."""
    return Job(forerun, tmp_path)


class Job:
    def __init__(self, forerun, folder):
        self.forerun = forerun
        self.prompts, self.results = folder / "prompts.jsonl", folder / "results.jsonl"

    def write(self, *lines):
        self.prompts.write_text("".join(json.dumps(line) + "\n" for line in lines))

    def arguments(self, *options):
        files = ["--file", self.prompts, "--out", self.results]
        return ["generate", *files, "--model", self.forerun.model, "--max-tokens", 8, *options]

    def run(self, *options):
        return self.forerun(*self.arguments(*options))

    def read(self):
        return [json.loads(line) for line in self.results.read_text().splitlines()]

    def popen(self, *options):
        environment = {**os.environ, "FORERUN_HOME": str(self.forerun.home)}
        return subprocess.Popen(
            [*self.forerun.command, *map(str, self.arguments(*options))],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def wait_for_results(self, count, process):
        while not self.results.exists() or self.results.read_bytes().count(b"\n") < count:
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.002)


def test_every_prompt_gets_a_line_with_its_id(job):
    job.write({"prompt": "a"}, {"id": "x7", "prompt": "b", "max_tokens": 2}, {"prompt": "c"})
    done = job.run("--json")
    assert done.returncode == 0, done.stderr
    first, second, third = job.read()
    assert [first["id"], second["id"], third["id"]] == [1, "x7", 3]
    assert first["text"] == "abcdefgh" and second["text"] == "ab"
    assert first["tokens"] == [ord(c) for c in "abcdefgh"]
    assert first["finish_reason"] == "length" and first["stats"]["new_tokens"] == 8
    assert first["model"] == job.forerun.model
    summary = json.loads(done.stdout)
    assert summary["prompts"] == summary["answered"] == 3
    assert summary["failed"] == summary["skipped"] == 0 and summary["new_tokens"] == 18


def test_without_json_nothing_is_on_stdout_and_progress_is_plain_lines(job):
    job.write({"prompt": "a"}, {"prompt": "b"})
    done = job.run()
    assert done.stdout == ""
    assert "2 of 2" in done.stderr
    assert all(line.startswith("forerun: ") for line in done.stderr.splitlines())


def test_finished_prompts_are_skipped(job):
    job.write({"prompt": "a"}, {"prompt": "b"})
    job.run()
    before = job.results.read_bytes()
    job.write({"prompt": "a"}, {"prompt": "b"}, {"prompt": "c"})
    done = job.run("--json")
    assert json.loads(done.stdout)["skipped"] == 2
    assert job.results.read_bytes().startswith(before) and len(job.read()) == 3


def test_kill_in_the_middle_loses_nothing_and_repeats_nothing(job):
    count = 80
    job.write(*({"prompt": f"{i}", "seed": i} for i in range(count)))
    options = ("--max-tokens", 24, "--temperature", 15)
    process = job.popen(*options)
    job.wait_for_results(5, process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    kept = job.results.read_bytes()
    kept_lines = kept[: kept.rfind(b"\n") + 1]
    assert 5 <= kept_lines.count(b"\n") < count
    done = job.run(*options)
    assert done.returncode == 0, done.stderr
    assert job.results.read_bytes().startswith(kept_lines)
    assert [line["id"] for line in job.read()] == list(range(1, count + 1))
    resumed = {line["id"]: line["tokens"] for line in job.read()}
    job.results.unlink()
    job.run(*options)
    assert {line["id"]: line["tokens"] for line in job.read()} == resumed


def test_ctrl_c_stops_the_job_and_tells_how_to_go_on(job):
    job.write(*({"prompt": f"{i}"} for i in range(2000)))
    process = job.popen("--max-tokens", 100)
    job.wait_for_results(3, process)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "goes on" in errors and "Traceback" not in errors
    lines = job.read()
    assert 3 <= len(lines) < 2000
    assert all(line["finish_reason"] == "length" for line in lines), "a partial answer was kept"


DAMAGE = {
    "cut in the middle": lambda data: data[:-40],
    "only the line end is missing": lambda data: data[:-1],
    "a few bytes of the next line": lambda data: data + b'{"id"',
    "zeros after a power failure": lambda data: data + b"\0" * 50,
    "zeros inside the last line": lambda data: data[:-60] + b"\0" * 59 + b"\n",
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_damaged_last_line_is_cut_and_made_again(job, damage):
    job.write({"prompt": "a"}, {"prompt": "b"}, {"prompt": "c"})
    job.run()
    whole = job.results.read_bytes()
    job.results.write_bytes(damage(whole))
    done = job.run()
    assert done.returncode == 0, done.stderr
    assert "cut off" in done.stderr
    assert [line["id"] for line in job.read()] == [1, 2, 3]
    assert job.results.read_bytes().startswith(whole[: whole[:-1].rfind(b"\n") + 1])


NOT_RESULTS = {
    "other lines": b'{"prompt": "precious"}\n',
    "text": b"my notes\n",
    "text without a line end": b"my notes",
    "damage in the middle": b'{"id": 1, "key": "0"\n{"id": 2, "key": "0"}\n',
    "binary": bytes(range(256)),
}


@pytest.mark.parametrize("content", NOT_RESULTS.values(), ids=NOT_RESULTS)
def test_a_file_of_something_else_is_never_touched(job, content):
    job.write({"prompt": "a"})
    job.results.write_bytes(content)
    done = job.run()
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert job.results.read_bytes() == content


def test_results_of_other_settings_are_not_mixed_in(job):
    job.write({"prompt": "a"}, {"prompt": "b"})
    job.run()
    before = job.results.read_bytes()
    for change in (["--max-tokens", 9], ["--temperature", 2], ["--stop", "x"]):
        done = job.run(*change)
        assert done.returncode == 2 and "--out" in done.stderr
    job.write({"prompt": "a"}, {"prompt": "another"})
    assert job.run().returncode == 2
    assert job.results.read_bytes() == before


def test_out_may_not_be_the_prompts(job):
    job.write({"prompt": "a"})
    before = job.prompts.read_bytes()
    job.results = job.prompts
    assert job.run().returncode == 2
    assert job.prompts.read_bytes() == before


def test_a_prompt_that_cannot_be_answered_gets_an_error_line_and_the_rest_goes_on(job):
    job.write({"prompt": "a"}, {"prompt": "x" * 600}, {"prompt": "c"})
    for _ in range(2):
        done = job.run()
        assert done.returncode == 2
        assert "1 of 3" in done.stderr.splitlines()[-1]
    first, second, third = job.read()
    assert first["text"] == third["text"] == "abcdefgh"
    assert "512" in second["error"] and "text" not in second


BAD_LINES = {
    "not json": ("{prompt", "line 2"),
    "not an object": ("[]", "line 2"),
    "no prompt": ('{"id": 2}', "line 2"),
    "unknown key": ('{"prompt": "b", "max_token": 3}', "max_token"),
    "wrong type": ('{"prompt": "b", "max_tokens": "3"}', "max_tokens"),
    "bool as number": ('{"prompt": "b", "seed": true}', "seed"),
    "zero tokens": ('{"prompt": "b", "max_tokens": 0}', "at least 1"),
    "empty prompt": ('{"prompt": ""}', "empty"),
    "lone surrogate": ('{"prompt": "\\ud800"}', "UTF-8"),
    "same id": ('{"prompt": "b", "id": 1}', "id 1"),
    "deep": ("[" * 100000, "line 2"),
}


@pytest.mark.parametrize("line, named", BAD_LINES.values(), ids=BAD_LINES)
def test_bad_lines_are_found_before_anything_is_computed(job, line, named):
    job.prompts.write_text('{"prompt": "a"}\n' + line + "\n")
    done = job.run()
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert named in done.stderr and "line 2" in done.stderr
    assert not job.results.exists()


def test_prompts_that_are_not_utf8(job):
    job.prompts.write_bytes(b'{"prompt": "a"}\n{"prompt": "\xff"}\n')
    assert "line 2" in job.run().stderr
    job.prompts.write_bytes(b"\n\n")
    assert "no prompts" in job.run().stderr


def test_second_job_on_the_same_file_is_refused(job):
    job.write(*({"prompt": f"{i}"} for i in range(2000)))
    process = job.popen("--max-tokens", 200)
    try:
        job.wait_for_results(1, process)
        done = job.run("--max-tokens", 200)
        assert done.returncode == 2 and "another forerun" in done.stderr
    finally:
        process.kill()
        process.communicate()


def test_full_disk_leaves_whole_lines(tmp_path, monkeypatch):
    results = batch.Results(tmp_path / "results.jsonl")
    results.append({"id": 1, "key": "k", "text": "a" * 1000})
    write = os.write
    monkeypatch.setattr(batch.os, "write", lambda fd, data: write(fd, data[:100]))
    with pytest.raises(SpaceError, match="run the same command again"):
        results.append({"id": 2, "key": "k", "text": "b" * 1000})
    monkeypatch.undo()
    results.append({"id": 2, "key": "k", "text": "b"})
    results.close()
    lines = (tmp_path / "results.jsonl").read_text().splitlines()
    assert [json.loads(line)["id"] for line in lines] == [1, 2]


def test_seed_of_a_sampled_batch_is_fixed_so_that_it_can_go_on(job):
    job.write({"prompt": "a"}, {"prompt": "b"})
    job.run("--temperature", 20)
    done = job.run("--temperature", 20)
    assert done.returncode == 0, done.stderr
    assert all(line["seed"] == 0 for line in job.read())


def test_options_of_a_line_stand_above_those_of_the_command(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "a", "seed": 9, "max_tokens": 3, "system": "s"}\n')
    request = generate.Request(SamplingParams(temperature=1.0), max_tokens=50)
    (item,) = batch.read_prompts(path, request)
    assert (item.request.sampling.seed, item.request.max_tokens) == (9, 3)
    assert item.request.system == "s" and item.request.sampling.temperature == 1.0
