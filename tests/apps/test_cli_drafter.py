"""`--drafter` and `--accept` of generate, chat and batches: same text, told figures."""

import json

import pytest

from forerun.apps.cli import options
from forerun.runtime.drafting.accept import ACCEPT_RULES
from forerun.runtime.drafting.choice import DEFAULT_DRAFTER
from forerun.runtime.drafting.registry import DRAFTERS

WORKING = ("ngram", "recycle", "ngram+recycle", "auto")
PLAIN = ("--raw", "--max-tokens", "60")


def answer(forerun, *arguments):
    done = forerun("generate", "xyz", "--model", forerun.model, *PLAIN, *arguments, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), done.stderr


@pytest.mark.parametrize("drafter", WORKING)
@pytest.mark.parametrize("how", [(), ("--temperature", "0.8", "--seed", "3")])
def test_the_text_is_that_of_plain_decoding(forerun, drafter, how):
    plain, _ = answer(forerun, *how)
    drafted, _ = answer(forerun, "--drafter", drafter, *how)
    assert drafted["tokens"] == plain["tokens"]
    stats = drafted["stats"]
    assert plain["stats"]["drafter"] == "none" and plain["stats"]["schedule"] == "plain"
    assert stats["drafter"] != "none" and stats["schedule"] == "serial"
    assert stats["accept"] == "match" and stats["overruled"] == 0
    assert stats["devices"] == {"target": "cpu", "draft": "cpu"}
    assert stats["new_tokens"] == 60
    assert stats["tokens_per_round"] == pytest.approx(59 / stats["rounds"])
    counts = [count for depths in stats["acceptance"].values() for count in depths.values()]
    assert sum(proposed for proposed, _ in counts) == stats["proposed"]
    assert sum(accepted for _, accepted in counts) == stats["accepted"]


def test_the_figures_name_the_drafter(forerun):
    arguments = ("generate", "xyz", "--model", forerun.model, *PLAIN, "--stats")
    plain, drafted = forerun(*arguments), forerun(*arguments, "--drafter", "ngram")
    assert "drafter" not in plain.stderr
    assert "tokens a step with drafter ngram (serial)" in drafted.stderr
    assert "drafted tokens accepted" in drafted.stderr
    assert "times plain decoding" in drafted.stderr
    assert "lossy" not in drafted.stderr
    assert drafted.stdout == plain.stdout


def test_relaxed_acceptance_says_that_it_is_lossy(forerun):
    relaxed = ("--drafter", "ngram", "--accept", "relaxed")
    found, told = answer(forerun, *relaxed, "--stats")
    assert found["stats"]["accept"] == "relaxed"
    assert "--accept relaxed is lossy" in told and "lossy: 0 of them" in told
    assert not ACCEPT_RULES["relaxed"].exact and ACCEPT_RULES["match"].exact


@pytest.mark.parametrize(
    "arguments, text",
    [
        (("--drafter", "psychic"), "'psychic' is not known; it can be none, ngram"),
        (("--drafter", "head"), "no head drafter"),
        (("--drafter", "model"), "no model drafter"),
        (("--drafter", "model+ngram"), "no model drafter"),
        (("--drafter", "ngram", "--accept", "anything"), "match or relaxed"),
        (("--accept", "relaxed"), "needs a drafter"),
    ],
)
def test_what_cannot_be_is_refused(forerun, arguments, text):
    for command in (("generate", "hi"), ("chat",)):
        done = forerun(*command, "--model", forerun.model, *arguments)
        assert done.returncode == 2 and text in done.stderr
        assert done.stdout == ""
        assert len([line for line in done.stderr.splitlines() if "lossy" not in line]) == 1


def test_a_chat_with_a_drafter_says_the_same(forerun):
    talk = ["chat", "--model", forerun.model, "--max-tokens", "40", "--temperature", "0"]
    lines = {"input": "abc\nabc again\n"}
    plain = forerun(*talk, **lines)
    drafted = forerun(*talk, "--drafter", "ngram", "--stats", **lines)
    assert plain.returncode == drafted.returncode == 0, drafted.stderr
    assert drafted.stdout == plain.stdout
    assert drafted.stderr.count("with drafter ngram") == 2


def test_a_batch_goes_on_with_another_drafter_but_not_with_a_lossy_rule(forerun, tmp_path):
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    prompts.write_text('{"prompt": "abc"}\n{"prompt": "xyz"}\n')
    run = ["generate", "--model", forerun.model, *PLAIN, "--file", prompts, "--out", out]
    assert forerun(*run, "--drafter", "ngram").returncode == 0
    results = [json.loads(line) for line in out.read_text().splitlines()]
    assert [r["stats"]["drafter"] for r in results] == ["ngram", "ngram"]
    again = forerun(*run)
    assert again.returncode == 0 and "2 of 2 prompts are finished" in again.stderr
    lossy = forerun(*run, "--drafter", "ngram", "--accept", "relaxed")
    assert lossy.returncode == 2 and "another prompt, model or option" in lossy.stderr


def test_the_help_names_all_drafters_and_the_default_is_one_place(forerun):
    shown = " ".join(forerun("generate", "--help").stdout.split())
    for name in DRAFTERS:
        assert name in shown, name
    assert options.DEFAULT_DRAFTER == DEFAULT_DRAFTER
