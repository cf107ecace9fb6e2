"""--kv, --kv-budget, --window and --skipping of all commands that generate: each does something."""

import json
import subprocess
import sys

import pytest

from forerun.apps.cli import cache_options, options
from forerun.runtime.load import MAX_THREADS
from forerun.runtime.window import LEAST_WINDOW, SINKS

# Of the tiny model: 64 tokens in 32-bit float.
SMALL = "32KiB"


@pytest.fixture
def ask(forerun, tmp_path):
    """Answer one prompt with a command; returns the finished process, and fields of the answer."""

    def generate(model, *arguments):
        done = forerun("generate", "hi", "--json", "--model", model, *arguments)
        return done, json.loads(done.stdout) if done.stdout else {}

    def chat(model, *arguments):
        done = forerun("chat", "--stats", "--model", model, *arguments, input="hi\n")
        if done.returncode:
            return done, {}
        is_full = "the context is full" in done.stderr
        skipped = "of the feed-forward blocks skipped" in done.stderr
        reason = "context" if is_full else "length"
        return done, {"finish_reason": reason, "stats": {"ffn_share": 0.5 if skipped else 1.0}}

    def batch(model, *arguments):
        prompts, out = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
        out.unlink(missing_ok=True)
        prompts.write_text('{"prompt": "hi"}\n')
        done = forerun(*("generate", "--file", prompts, "--out", out, "--model", model), *arguments)
        return done, json.loads(out.read_text()) if done.returncode == 0 else {}

    return {"generate": generate, "chat": chat, "batch": batch}


@pytest.fixture(params=["generate", "chat", "batch"])
def answer(ask, request):
    return ask[request.param]


def told(done):
    """The line about the size of the KV cache."""
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stderr.splitlines() if "KV cache:" in line]
    assert len(lines) == 1, done.stderr
    return lines[0]


def test_a_budget_sets_the_context_and_is_told(answer, layouts):
    without, plain = answer(layouts, "--max-tokens", 100)
    assert "KV cache" not in without.stderr and plain["finish_reason"] == "length"
    done, fields = answer(layouts, "--max-tokens", 100, "--kv-budget", SMALL)
    assert "32-bit float, 64 tokens" in told(done)
    assert fields["finish_reason"] == "context"


@pytest.mark.parametrize(
    ("layout", "words"), [("fp16", "16-bit float, 128"), ("int8", "8-bit, 256"),
                          ("int4", "4-bit, 512"), ("gear-kivi", "GEAR on KIVI, ")]
)  # fmt: skip
def test_a_layout_is_what_a_budget_is_filled_with(ask, layouts, layout, words):
    size = "128KB" if layout.startswith("gear") else SMALL
    done, _ = ask["generate"](layouts, "--kv", layout, "--kv-budget", size, "--max-tokens", 9)
    assert words in told(done)


def test_a_layout_reaches_every_command(answer, layouts, bundle):
    done, _ = answer(layouts, "--kv", "int8", "--kv-budget", SMALL, "--max-tokens", 9)
    assert "8-bit, 256 tokens" in told(done)
    done, _ = answer(bundle, "--kv", "int8")
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1
    assert "this bundle has fp32, not int8" in done.stderr


def test_a_window_has_no_end(answer, layouts):
    done, fields = answer(layouts, "--max-tokens", 600)
    assert done.returncode == 0 and fields["finish_reason"] == "context", "512 tokens are all"
    done, fields = answer(layouts, "--max-tokens", 600, "--window", 64)
    assert done.returncode == 0 and fields["finish_reason"] == "length"


def test_skipping_leaves_blocks_out(answer, skipping):
    _, fields = answer(skipping, "--max-tokens", 40)
    assert fields["stats"]["ffn_share"] == 1
    for rule in ("0.25", "static:0.25", "default"):
        done, fields = answer(skipping, "--max-tokens", 40, "--skipping", rule)
        assert done.returncode == 0, done.stderr
        assert fields["stats"]["ffn_share"] < 0.9, rule


def test_the_rules_of_skipping_differ(ask, skipping):
    rules = ("off", "0.05", "0.5", "static:0.25", "decode:0.5:64")
    shares = [
        ask["generate"](skipping, "--max-tokens", 40, "--skipping", rule)[1]["stats"]["ffn_share"]
        for rule in rules
    ]
    assert shares[0] == 1 and len(set(shares)) == len(rules), shares


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--kv", "int3"), "there is no KV layout 'int3', there are fp32, fp16"),
        (("--kv-budget", "many"), "a size with a unit"),
        (("--kv-budget", "1KB"), "give at least 32.8KB"),
        (("--kv-budget", SMALL, "--window", "64"), "give one"),
        (("--window", "20"), "36"),
        (("--window", "9999"), "36 to 512 rows, got 9999"),
        (("--window", "64", "--kv", "int8"), "a window needs a KV cache in fp32 or fp16"),
        (("--window", "64", "--drafter", "ngram"), "--drafter none, or no window"),
        (("--skipping", "0.1"), "float32 bundle with --skipping"),
    ],
)
def test_what_does_not_go_is_refused_in_one_line(forerun, layouts, arguments, words):
    done = forerun("generate", "hi", "--model", layouts, *arguments)
    assert done.returncode == 2 and done.stdout == ""
    assert words in done.stderr and done.stderr.count("\n") == 1, done.stderr


@pytest.mark.parametrize("wrong", ["some", "2", "decode:0.5:0", "static", "adaptive:0.9"])
def test_rules_of_skipping_that_are_none(forerun, skipping, wrong):
    done = forerun("generate", "hi", "--model", skipping, "--skipping", wrong)
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1
    assert "skip" in done.stderr or "must be a whole number" in done.stderr


def test_results_of_another_cache_are_not_mixed(forerun, layouts, tmp_path):
    (tmp_path / "in.jsonl").write_text('{"prompt": "hi"}\n')
    files = ("generate", "--file", tmp_path / "in.jsonl", "--out", tmp_path / "out.jsonl")
    how = ("--model", layouts, "--max-tokens", 3)
    assert forerun(*files, *how).returncode == 0
    others = (("--kv", "int8"), ("--window", "64"), ("--kv-budget", SMALL), ("--skipping", "0.1"))
    for other in others:
        done = forerun(*files, *how, *other)
        assert done.returncode == 2 and "of another prompt, model or option" in done.stderr


def test_bounds_of_the_help_are_those_of_the_runtime():
    assert cache_options.LEAST_ROWS == SINKS + LEAST_WINDOW
    assert options.MAX_THREADS == MAX_THREADS


def test_the_help_names_what_there_is():
    done = subprocess.run(
        [sys.executable, "-m", "forerun.apps.cli.main", "generate", "--help"],
        capture_output=True,
        text=True,
    )
    words = " ".join(done.stdout.split())
    for name in ("fp32, fp16, int8, int4, gear-kcvt", "x>=36", "default takes", "off runs"):
        assert name in words, name
