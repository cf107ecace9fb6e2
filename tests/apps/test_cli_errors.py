"""Whatever goes wrong: one line on stderr, nothing on stdout, and the right exit code."""

import resource
import subprocess
import sys

import pytest

from forerun.apps.cli import generate, main, report
from forerun.errors import DownloadError, ExportMismatch

WRONG = {
    "unknown option": (["generate", "hi", "--colour", "red"], "--colour"),
    "unknown device": (["generate", "hi", "--device", "gpu"], "webgpu, qnn"),
    "unknown command": (["generte"], "generte"),
    "unknown bench": (["bench", "poetry"], "poetry"),
    "no number": (["generate", "hi", "--max-tokens", "many"], "many"),
    "zero tokens": (["generate", "hi", "--max-tokens", "0"], "0"),
    "negative tokens": (["generate", "hi", "--max-tokens=-5"], "-5"),
    "negative temperature": (["generate", "hi", "--temperature=-1"], "-1"),
    "temperature nan": (["generate", "hi", "--temperature", "nan"], "nan"),
    "temperature infinite": (["generate", "hi", "--temperature", "inf"], "inf"),
    "top-p above 1": (["generate", "hi", "--top-p", "1.5"], "1.5"),
    "min-p above 1": (["generate", "hi", "--min-p", "2"], "2"),
    "repetition penalty 0": (["generate", "hi", "--repetition-penalty", "0"], "above 0"),
    "value missing": (["generate", "hi", "--max-tokens"], "--max-tokens"),
    "two prompts": (["generate", "a", "b"], "b"),
    "no prompt": (["generate"], "prompt"),
    "empty prompt": (["generate", ""], "empty"),
    "prompt of bytes": (["generate", "\udcff"], "UTF-8"),
    "empty stop": (["generate", "hi", "--stop", ""], "--stop"),
    "bias without value": (["generate", "hi", "--logit-bias", "42"], "42"),
    "bias of no token": (["generate", "hi", "--logit-bias", "x=1"], "x=1"),
    "context policy": (["generate", "hi", "--context", "wrap"], "wrap"),
    "system with raw": (["generate", "hi", "--raw", "--system", "x"], "--raw"),
    "logprobs without json": (["generate", "hi", "--logprobs"], "--json"),
    "file without out": (["generate", "--file", "a.jsonl"], "--out"),
    "file and prompt": (["generate", "hi", "--file", "a", "--out", "b"], "PROMPT"),
    "missing file": (["generate", "--file", "/nowhere/a.jsonl", "--out", "b"], "/nowhere/a.jsonl"),
    "unknown model": (["generate", "hi", "--model", "gpt-17"], "gpt-17"),
    "model path": (["generate", "hi", "--model", "/nowhere/model"], "/nowhere/model"),
    "unknown variant": (["generate", "hi", "--model", "smollm2-135m:int3"], "int3"),
    "window too small": (["generate", "hi", "--window", "35"], "36"),
    "threads": (["generate", "hi", "--threads", "1025"], "1024"),
    "kv budget": (["generate", "hi", "--kv-budget", "64"], "64MiB"),
    "stats of a file": (["generate", "--file", "a", "--out", "b", "--stats"], "--stats"),
    "too little text": (["bench", "quality", "--tokens", "2047"], "2048"),
    "too short a chat": (["bench", "memory", "--tokens", "255"], "256"),
    "export without out": (["export", "a.gguf"], "OUT"),
    "export of nothing": (["export", "/nowhere/a.gguf", "out"], "/nowhere/a.gguf"),
    "export via": (["export", ".", "out", "--via", "magic"], "magic"),
    "export via optimum": (["export", "m", "out", "--via", "optimum", "--name", "x"], "--name"),
    "export to a name": (["export", ".", "smollm2-135m:fp32"], "smollm2-135m:fp32"),
    "quantize to a name": (["quantize", "x", "smollm2-135m:int4"], "./smollm2-135m-int4"),
    "quantize share": (["quantize", "x", "out", "--min-agreement", "1.5"], "1.5"),
    "quantize weights": (["quantize", "x", "out", "--weights", "int1"], "int1"),
    "pull nothing": (["pull"], "--list"),
    "pull unknown": (["pull", "gpt-17"], "gpt-17"),
    "pull two variants": (["pull", "smollm2-135m:int8", "--variant", "fp32"], "contradict"),
    "evaluate unknown": (["evaluate", "gpt-17"], "gpt-17"),
    "depths": (["bench", "text", "--depths", "0,deep"], "0,deep"),
    "bench file": (["bench", "text", "--json", "/nowhere/x.json"], "/nowhere"),
}


def one_line(captured):
    assert captured.out == ""
    assert captured.err.startswith("forerun: ")
    assert captured.err.count("\n") == 1
    return captured.err


@pytest.mark.parametrize("arguments, named", WRONG.values(), ids=WRONG)
def test_user_errors_are_one_line_with_exit_code_2(arguments, named, capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("FORERUN_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    assert main.main(arguments) == 2
    assert named in one_line(capsys.readouterr())
    assert not any(tmp_path.iterdir()), "a refused command wrote something"


def test_usage_errors_say_where_help_is(capsys):
    main.main(["generate", "hi", "--unknown"])
    assert capsys.readouterr().err.endswith("; see forerun generate --help\n")
    main.main(["bench", "text", "--runs"])
    assert capsys.readouterr().err.endswith("; see forerun bench text --help\n")


@pytest.mark.parametrize("data, named", [(b"", "empty"), (b"\n", "empty"), (b"a\xffb", "0xff")])
def test_bad_standard_input_is_refused_before_a_model_loads(data, named, tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "forerun.apps.cli.main", "generate", "-", "--model", "/nowhere"],
        input=data,
        capture_output=True,
        cwd=tmp_path,
    )
    assert done.returncode == 2 and done.stdout == b""
    assert named in done.stderr.decode() and done.stderr.count(b"\n") == 1


RAISED = {
    "bug": (ZeroDivisionError("division by zero"), 1, "ZeroDivisionError"),
    "download": (DownloadError("no source\nanswered"), 1, "no source answered"),
    "mismatch": (ExportMismatch("logits", 1.0, 0.1), 1, "logits"),
    "disk full": (OSError(28, "No space left on device", "/x/y"), 2, "/x/y: no space left"),
    "file missing": (FileNotFoundError(2, "No such file or directory", "/x"), 2, "/x: No such"),
    "input/output": (OSError(5, "Input/output error", "/x"), 1, "/x: Input/output error"),
    "memory": (MemoryError(), 2, "memory"),
    "ctrl-c": (KeyboardInterrupt(), 130, "interrupted"),
}


@pytest.mark.parametrize("error, code, named", RAISED.values(), ids=RAISED)
def test_whatever_is_raised_becomes_one_line(error, code, named, capsys, monkeypatch):
    def fail(*_):
        raise error

    monkeypatch.setattr(generate, "_answer_one", fail)
    assert main.main(["generate", "hi"]) == code
    assert named in one_line(capsys.readouterr())


def test_traceback_shows_where_an_error_came_from(capsys, monkeypatch):
    monkeypatch.setattr(generate, "_answer_one", lambda *_: 1 / 0)
    assert main.main(["--traceback", "generate", "hi"]) == 1
    assert "test_cli_errors.py" in capsys.readouterr().err


@pytest.mark.parametrize("name", [*main.COMMANDS, *(f"bench {name}" for name in main.BENCHES)])
def test_help_of_every_command_has_an_example(name, capsys):
    assert main.main([*name.split(), "--help"]) == 0
    captured = capsys.readouterr()
    assert captured.out.count(f"forerun {name}") >= 2
    assert captured.err == ""


def test_no_command_prints_help(capsys):
    assert main.main([]) == 0
    help_text = capsys.readouterr().out
    assert all(name in help_text for name in main.COMMANDS)
    assert "..." not in help_text.split("Commands:")[1], "a summary was cut off"


def test_version(capsys):
    assert main.main(["--version"]) == 0
    assert capsys.readouterr().out.split()[0] == "forerun"


def test_help_is_fast_and_loads_nothing_heavy():
    heavy = ("numpy", "onnxruntime", "tokenizers", "onnx", "rich", "jinja2", "gguf")
    script = (
        "import sys; from forerun.apps.cli.main import main; main(['--help']);"
        f"sys.exit(','.join(m for m in {heavy} if m in sys.modules) or None)"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, f"loaded by --help: {done.stderr}"
    # Processor time, because the machine may be busy with something else.
    spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert spent < 0.5


def test_error_text_of_several_lines_is_joined():
    assert report.one_line("a\n  b\tc ") == "a b c"
