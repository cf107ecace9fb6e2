"""`forerun generate` on a real, very small model: text, JSON, pipes and Ctrl-C."""

import json
import os
import signal
import time
from pathlib import Path

import pytest

ALPHABET = "abcdefghijklmnopqrstuvwxyz"
STATS = {
    "prompt_tokens",
    "new_tokens",
    "ttft_ms",
    "tpot_ms",
    "prefill_tok_s",
    "decode_tok_s",
    "rounds",
    "proposed",
    "accepted",
    "session_share",
    "peak_rss_mb",
    "drafter",
    "devices",
}


def ok(done):
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_text_is_printed_with_a_line_end(forerun):
    done = forerun("generate", "hi", "--model", forerun.model, "--max-tokens", 26)
    assert ok(done) == ALPHABET + "\n"
    assert done.stderr == "", "a short answer needs no progress"


def test_installed_model_is_found_by_name(forerun):
    text = ok(forerun("generate", "hi", "--model", "alphabet:fp32", "--max-tokens", 3))
    assert text == "abc\n"


def test_json_has_the_documented_fields(forerun):
    options = ("--raw", "--max-tokens", 4, "--json", "--logprobs", "--model", forerun.model)
    fields = json.loads(ok(forerun("generate", "wx", *options)))
    assert fields["text"] == "yzab"
    assert fields["tokens"] == [ord(c) for c in "yzab"]
    assert fields["finish_reason"] == "length"
    assert fields["seed"] == 0
    assert len(fields["logprobs"]) == 4 and all(-0.1 < p <= 0 for p in fields["logprobs"])
    assert set(fields["stats"]) >= STATS
    assert fields["stats"]["prompt_tokens"] == 2 and fields["stats"]["new_tokens"] == 4
    assert fields["stats"]["devices"] == {"target": "cpu", "draft": None}


def test_standard_input_is_the_prompt_without_its_last_line_end(forerun):
    done = forerun(
        *("generate", "-", "--raw", "--max-tokens", 3, "--model", forerun.model), input="10\n78\n"
    )
    assert ok(done) == "901\n"


def test_stop_text_ends_the_answer_before_it(forerun):
    options = ("--stop", "hij", "--stop", "zzz", "--json", "--model", forerun.model)
    fields = json.loads(ok(forerun("generate", "hi", *options)))
    assert fields["text"] == "abcdefg" and fields["finish_reason"] == "stop"


def test_logit_bias_moves_the_choice(forerun):
    # 120 is x: with the bias, x follows everything.
    options = ("--max-tokens", 3, "--logit-bias", "120=1000", "--model", forerun.model)
    assert ok(forerun("generate", "hi", *options)) == "xxx\n"


def test_same_seed_same_text_and_a_drawn_seed_is_told(forerun):
    options = ("--temperature", 20, "--max-tokens", 40, "--json", "--model", forerun.model)
    first = json.loads(ok(forerun("generate", "hi", *options)))
    again = json.loads(ok(forerun("generate", "hi", *options, "--seed", first["seed"])))
    other = json.loads(ok(forerun("generate", "hi", *options, "--seed", first["seed"] + 1)))
    assert again["tokens"] == first["tokens"]
    assert other["tokens"] != first["tokens"]


def test_system_prompt_reaches_the_model(forerun):
    options = ("--max-tokens", 1, "--json", "--model", forerun.model)
    plain = json.loads(ok(forerun("generate", "hi", *options)))
    longer = json.loads(ok(forerun("generate", "hi", *options, "--system", "Be brief.")))
    template = len("system\nBe brief.") + 3
    assert longer["stats"]["prompt_tokens"] == plain["stats"]["prompt_tokens"] + template


def test_stats_line_goes_to_stderr(forerun):
    done = forerun("generate", "hi", "--max-tokens", 5, "--stats", "--model", forerun.model)
    assert ok(done) == "abcde\n"
    assert "5 new tokens" in done.stderr and done.stderr.count("\n") == 1


def test_full_context_ends_the_answer_and_says_what_helps(forerun):
    options = ("--raw", "--max-tokens", 10**30, "--model", forerun.model)
    done = forerun("generate", "a", *options)
    assert ok(done).startswith("bcdef")
    assert "--context slide" in done.stderr
    slid = forerun(
        "generate", "a", "--raw", "--max-tokens", 900, "--context", "slide", *options[3:]
    )
    assert len(ok(slid)) == 901


def test_too_long_prompt_is_refused(forerun):
    done = forerun("generate", "-", "--model", forerun.model, input="word " * 500)
    assert done.returncode == 2 and done.stdout == ""
    assert "512" in done.stderr and done.stderr.count("\n") == 1


def test_damaged_bundle_is_refused(forerun, bundle, tmp_path):
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in bundle.iterdir():
        if not file.name.startswith("."):
            (copy / file.name).write_bytes(file.read_bytes())
    weights = copy / "weights.bin"
    data = bytearray(weights.read_bytes())
    data[len(data) // 2] ^= 1
    weights.write_bytes(data)
    done = forerun("generate", "hi", "--model", copy)
    assert done.returncode == 2 and done.stdout == ""
    assert "weights.bin" in done.stderr and done.stderr.count("\n") == 1


def test_reader_that_closes_the_pipe_is_no_error(endless):
    with endless() as process:
        assert process.stdout.read(10) == b"bcdefghijk"
        process.stdout.close()
        assert process.wait(30) == 141
        assert process.stderr.read() == b""


def test_ctrl_c_keeps_what_was_printed(endless):
    with endless("--stats") as process:
        begin = process.stdout.read(10)
        process.send_signal(signal.SIGINT)
        rest = process.stdout.read()
        assert process.wait(30) == 130
        errors = process.stderr.read().decode()
    text = (begin + rest).decode()
    assert text == ("bcdefghijklmnopqrstuvwxyza" * (len(text) // 26 + 1))[: len(text) - 1] + "\n"
    assert "interrupted after" in errors and "new tokens" in errors
    assert "Traceback" not in errors and errors.count("\n") == 2


def test_ctrl_c_still_gives_the_json_object(endless):
    with endless("--json", "--stop", "never") as process:
        wait_until_it_computes(process)
        process.send_signal(signal.SIGINT)
        fields = json.loads(process.stdout.read())
        assert process.wait(30) == 130
    assert fields["finish_reason"] == "cancelled"
    assert len(fields["tokens"]) == fields["stats"]["new_tokens"] > 0


def wait_until_it_computes(process):
    """Return when the process has used more time than its start takes."""
    status = Path(f"/proc/{process.pid}/stat")
    if not status.exists():
        pytest.skip("needs /proc to see when the process is past its start")
    while int(status.read_text().rsplit(")")[-1].split()[11]) < 2 * os.sysconf("SC_CLK_TCK"):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
