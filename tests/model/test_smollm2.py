"""SmolLM2-135M with its real weights, from the tokenizer to the command line."""

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

import forerun
from forerun import SamplingParams, Stats
from forerun.apps.cli.main import main
from forerun.errors import BundleError, ContextLimitError, PromptError

pytestmark = pytest.mark.model

GOLDEN = Path(__file__).parent.parent / "golden"
QUESTION = "What is the capital of France? Answer in one sentence."
# "The capital of France is Paris." and the end of the answer, as transformers says it too.
ANSWER = [504, 3575, 282, 4649, 314, 7042, 30]
SENTENCE = (
    " In the beginning the ship sailed north, past seven islands and a lighthouse, and the captain"
    " wrote 4921 in the log."
)
FIELDS = {"text", "tokens", "finish_reason", "seed", "stats", "logprobs", "model"}
PEAK_RSS_MB = 350
KL_BOUND = 0.6
# A process starts with the memory peak of the one that started it, so a small one stands between.
MEASURED = """
import json, resource, subprocess, sys
done = subprocess.run([sys.executable, "-m", "forerun.apps.cli.main", *sys.argv[1:]])
print(json.dumps(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss), file=sys.stderr)
sys.exit(done.returncode)
"""


def tokens_of(events):
    return [event.token for event in events if event.token is not None]


def test_tokenizer_gives_the_golden_ids_and_comes_back(text):
    golden = json.loads((GOLDEN / "smollm2.json").read_text("utf-8"))["ids"]
    texts = json.loads((GOLDEN / "texts.json").read_text("utf-8"))
    assert golden.keys() == texts.keys() and len(golden) > 40
    special = [text.tokenizer.token_text(token) for token in text.tokenizer.special_ids]
    shown = re.compile("|".join(map(re.escape, special)))
    for name, given in texts.items():
        ids = text.tokenizer.encode(given)
        assert ids == golden[name], name
        assert text.tokenizer.decode(ids) == shown.sub("", given), name
        stream = text.tokenizer.stream()
        pieces = [stream.push(token) for token in ids] + [stream.finish()]
        assert "".join(pieces) == text.tokenizer.decode(ids), name


@pytest.mark.parametrize("variant", ["text", "fp32"])
def test_chat_knows_the_capital_of_france(variant, request):
    chat = request.getfixturevalue(variant).chat()
    assert "Paris" in "".join(event.text for event in chat.say(QUESTION, max_tokens=24))


def test_float32_answers_with_exactly_these_tokens(fp32):
    *events, end = fp32.stream(QUESTION, max_tokens=24)
    assert tokens_of(events) == ANSWER
    assert end.finish_reason == "stop"
    assert fp32.manifest.quantization.method == "none"


def test_what_is_cached_does_not_change_a_float32_answer(fp32):
    fresh = tokens_of(fp32.stream("List five rivers.", max_tokens=20))
    *again, end = fp32.stream("List five rivers.", max_tokens=20)
    assert end.stats.cached_tokens == end.stats.prompt_tokens - 1
    assert tokens_of(again) == fresh and len(fresh) == 20


def test_the_bundle_tells_what_quantization_cost(text):
    checks = {check.metric: check for check in text.manifest.checks}
    assert checks["max_abs_error"].against == "numpy reference"
    assert 0 < checks["max_abs_error"].value <= checks["max_abs_error"].bound
    assert checks["kl_mean"].against.startswith("float32 bundle")
    assert 0 < checks["kl_mean"].value <= min(checks["kl_mean"].bound, KL_BOUND)
    assert text.manifest.quantization.bits == 4
    text.manifest.check_files(Path(text._runner._folder), full=True)


def test_streaming_is_the_one_shot_answer(text):
    prompt = "Write three words in Greek, then a smiling emoji 😀."
    *events, end = text.stream(prompt, max_tokens=40, logprobs=True)
    streamed = "".join(event.text for event in events) + end.text
    text.session().reset()
    assert text.generate(prompt, max_tokens=40) == streamed
    assert text.tokenizer.decode(tokens_of(events)) == streamed
    assert all(event.logprob <= 0 for event in events)
    assert "\ufffd" not in "".join(event.text for event in events)


def test_a_second_turn_reuses_the_first(text):
    chat = text.chat(system="You are a helpful teacher.")
    *_, first = chat.say("My name is Ada.", max_tokens=16)
    *_, second = chat.say("What is my name?", max_tokens=16)
    assert first.stats.cached_tokens == 0
    # All of the first turn but, at most, the last token, which had not been run yet.
    assert second.stats.cached_tokens >= first.stats.prompt_tokens + first.stats.new_tokens - 1
    assert second.stats.prompt_tokens > second.stats.cached_tokens
    assert [m["role"] for m in chat.messages] == ["system"] + 2 * ["user", "assistant"]


def test_cancel_from_another_thread_ends_within_one_step(text):
    fresh = tokens_of(text.stream("Tell a long story.", max_tokens=12))
    events = text.stream("Tell a long story.", max_tokens=4000)
    heard = [next(events) for _ in range(6)]
    other = threading.Thread(target=text.cancel)
    other.start()
    other.join()
    *more, end = events
    assert end.finish_reason == "cancelled"
    assert len(more) == 0, "tokens came after the cancel"
    assert tokens_of(heard) == fresh[:6]
    text.session().reset()
    assert tokens_of(text.stream("Tell a long story.", max_tokens=12)) == fresh


def deep_prompt(text, length):
    """A text that repeats, so that its continuation is known at any depth."""
    once = text.tokenizer.encode(SENTENCE)
    return (once * (length // len(once) + 1))[:length], once


def test_a_prompt_of_4200_tokens_is_read_in_steps_and_goes_on(text):
    prompt, once = deep_prompt(text, 4200)
    progress = []
    events = text.stream(prompt, max_tokens=40, on_prefill=lambda *done: progress.append(done))
    *events, end = events
    expected = (once * 1000)[len(prompt) : len(prompt) + 40]
    assert tokens_of(events) == expected
    assert end.stats.prompt_tokens == 4200 and end.finish_reason == "length"
    done, totals = zip(*progress, strict=True)
    assert done[0] == 0 and done[-1] == 4200 and set(totals) == {4200}
    assert len(done) > 5 and list(done) == sorted(done)


def test_cancel_while_a_long_prompt_is_read(text):
    prompt, _ = deep_prompt(text, 2000)
    progress = []

    def on_prefill(done, total):
        progress.append(done)
        if done:
            other = threading.Thread(target=text.cancel)
            other.start()
            other.join()

    *events, end = text.stream(prompt, max_tokens=4, on_prefill=on_prefill)
    assert end.finish_reason == "cancelled" and not events
    assert progress[-1] < 2000
    assert "Paris" in text.generate(QUESTION, max_tokens=8)


def test_what_cannot_work_is_refused_before_any_compute(text):
    spent = text._runner.session_time
    too_long, _ = deep_prompt(text, text.capacity + 1)
    with pytest.raises(ContextLimitError, match=f"{text.capacity + 1} tokens.*{text.capacity}"):
        text.stream(too_long)
    with pytest.raises(ContextLimitError):
        text.stream("colour " * (text.capacity + 1))
    for prompt in ("", [], [text.tokenizer.vocab], b"\xff\xfe"):
        with pytest.raises(PromptError):
            text.stream(prompt)
    assert text._runner.session_time == spent
    assert "Paris" in text.generate(QUESTION, max_tokens=8)


def test_seeds_reproduce(text):
    def draw(seed):
        text.session().reset()
        sampling = SamplingParams(temperature=0.8, top_p=0.95, seed=seed)
        return tokens_of(text.stream("Tell a story.", sampling=sampling, max_tokens=32))

    first = draw(7)
    assert len(first) == 32
    assert draw(7) == first
    assert draw(8) != first


def test_stop_texts_end_the_answer_and_are_left_out(text):
    *events, end = text.stream(QUESTION, max_tokens=24, stop=" France")
    assert "".join(event.text for event in (*events, end)) == "The capital of"
    assert end.finish_reason == "stop"


def test_statistics_are_sane(text):
    *_, end = text.stream("Count to twenty.", max_tokens=32)
    stats = end.stats
    assert stats.new_tokens == 32 and stats.rounds == 31
    assert stats.cached_tokens == 0 and stats.prompt_tokens > 10
    assert 0 < stats.tpot_ms < stats.ttft_ms < 5000
    assert stats.decode_tok_s == pytest.approx(1e3 / stats.tpot_ms)
    assert stats.prefill_tok_s >= 0.9 * stats.prompt_tokens / (stats.ttft_ms / 1e3)
    assert 0.8 < stats.session_share <= 1
    assert 50 < stats.peak_rss_mb < 4000
    assert (stats.proposed, stats.accepted, stats.drafter) == (0, 0, "none")
    assert stats.devices == {"target": "cpu", "draft": None}


def test_generate_json_and_its_memory(text, folder):
    """128 tokens behind a prompt of 512 in a process of its own."""
    prompt = text.tokenizer.decode(deep_prompt(text, 512)[0])
    options = ["--raw", "--json", "--logprobs", "--max-tokens", "128", "--logit-bias", "2=-1000"]
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, "generate", prompt, "--model", str(folder), *options],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    fields = json.loads(done.stdout)
    assert set(fields) == FIELDS
    assert fields["stats"].keys() == {field.name for field in dataclasses.fields(Stats)}
    assert fields["stats"]["prompt_tokens"] == 512 and fields["stats"]["new_tokens"] == 128
    assert len(fields["tokens"]) == len(fields["logprobs"]) == 128
    assert fields["text"] == text.tokenizer.decode(fields["tokens"])
    assert (fields["finish_reason"], fields["seed"]) == ("length", 0)
    unit = 1024 * (1024 if sys.platform == "darwin" else 1)
    peak = int(done.stderr.splitlines()[-1]) / unit
    assert 100 < peak <= PEAK_RSS_MB
    assert fields["stats"]["peak_rss_mb"] == pytest.approx(peak, rel=0.05)


def copy_with(folder, out, name, change):
    """A copy of a bundle of which one file is another; the others are links."""
    out.mkdir()
    for path in folder.iterdir():
        if path.name.startswith("."):
            continue
        if path.name == name:
            data = bytearray(path.read_bytes())
            change(data)
            (out / name).write_bytes(data)
            continue
        try:
            os.link(path, out / path.name)
        except OSError:
            shutil.copyfile(path, out / path.name)
    return out


def flip(data):
    data[len(data) // 2] ^= 1


def cut(data):
    del data[len(data) // 2 :]


def whole(data):
    pass


DAMAGE = [flip, cut]
FILES = ["weights.bin", "tokenizer.json", "model.onnx", "chat_template.jinja"]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("change", DAMAGE, ids=lambda change: change.__name__)
def test_a_damaged_copy_is_refused_in_one_line(name, change, folder, tmp_path, capsys):
    damaged = copy_with(folder, tmp_path / "copy", name, change)
    assert main(["generate", QUESTION, "--model", str(damaged)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert re.fullmatch(r"forerun: [^\n]*\n", captured.err)
    assert name in captured.err and "pull" in captured.err


def test_an_undamaged_copy_is_not(folder, tmp_path, capsys):
    copy = copy_with(folder, tmp_path / "copy", "tokenizer.json", whole)
    assert main(["generate", QUESTION, "--model", str(copy), "--max-tokens", "6"]) == 0
    assert capsys.readouterr().out == "The capital of France is Paris\n"


@pytest.mark.parametrize("name", ["tokenizer.json", "model.onnx"])
def test_damage_that_no_hash_tells_is_refused_too(name, folder, tmp_path, capsys):
    """Size and time of a file are trusted once it was hashed; then loading must find it."""
    copy = copy_with(folder, tmp_path / "copy", name, whole)
    assert main(["generate", "hi", "--model", str(copy), "--max-tokens", "1"]) == 0
    capsys.readouterr()
    stat = (copy / name).stat()
    (copy / name).write_bytes(bytes(stat.st_size))
    os.utime(copy / name, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert main(["generate", "hi", "--model", str(copy)]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    assert captured.err.startswith("forerun: ")


def test_a_foreign_tokenizer_is_refused(folder, tmp_path):
    def rename(data):
        data[:] = data.replace(b"tokenizer.json", b"weights.bin", 1)

    with pytest.raises(BundleError):
        forerun.load(copy_with(folder, tmp_path / "copy", "manifest.json", rename))
