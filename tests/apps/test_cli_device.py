"""`--device` and `--allow-fallback` of generate, chat and batches."""

import dataclasses
import json
import shutil

import pytest

from forerun.devices.plugins import missing
from forerun.devices.providers import PROVIDERS
from forerun.runtime import open as opening
from forerun.runtime.drafting import survey
from forerun.runtime.drafting.placement import Placement

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
        (("--device", "draft=webgpu"), "there is none; add --drafter model"),
        (("--device", "draft=webgpu", "--drafter", "none"), "there is none; add --drafter model"),
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


CHOICE = Placement("cpu", "ngram", "cpu", "serial", 1, 0, 4, 0.01, 1.5, "one line\nthe other")
NOTHING = dataclasses.replace(CHOICE, drafter="none", draft=None, schedule="plain")


@pytest.fixture
def placed(monkeypatch):
    """What was asked of `place`, which gives what is put in `answer`."""

    def place(manifest, folder, request, drafter, threads, **how):
        place.asked = {"request": request, "drafter": drafter, "threads": threads, **how}
        return place.answer

    place.answer, place.asked = CHOICE, None
    monkeypatch.setattr(survey, "place", place)
    return place


def with_auto(forerun, *options, device="auto"):
    arguments = ("generate", "xyz", "--model", forerun.model, *PLAIN, "--json")
    done = forerun(*arguments, "--device", device, *options)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)["stats"], done.stderr.splitlines()


def test_what_auto_chose_is_used_and_told_in_two_lines(forerun, placed):
    stats, told = with_auto(forerun)
    assert told == ["forerun: one line", "forerun: the other"]
    assert stats["drafter"] == "ngram" and stats["schedule"] == "serial"
    assert stats["devices"] == {"target": "cpu", "draft": "cpu"}
    placed.answer = NOTHING
    stats, _ = with_auto(forerun, "--threads", 2, device="target=auto,draft=cpu")
    assert stats["drafter"] == "none" and stats["schedule"] == "plain"
    assert placed.asked["threads"] == 2 and placed.asked["request"].draft == "cpu"


def test_a_drafter_that_is_named_wins(forerun, placed):
    placed.answer = NOTHING
    stats, told = with_auto(forerun, "--drafter", "recycle")
    assert stats["drafter"] == "recycle" and len(told) == 2
    assert placed.asked["drafter"] == "recycle" and placed.asked["is_chosen"]
    placed.answer = CHOICE
    stats, _ = with_auto(forerun, "--drafter", "none")
    assert stats["drafter"] == "none"


def test_without_a_wish_drafters_are_up_for_choice_on_row_exact_bundles_only(
    forerun, placed, tmp_path
):
    with_auto(forerun)
    assert placed.asked["drafter"] == "none" and not placed.asked["is_chosen"]
    exact = tmp_path / "exact"
    shutil.copytree(forerun.model, exact)
    fields = json.loads((exact / "manifest.json").read_text())
    (exact / "manifest.json").write_text(json.dumps({**fields, "row_exact": True}))
    forerun.model = str(exact)
    with_auto(forerun)
    assert placed.asked["drafter"] == "auto" and not placed.asked["is_chosen"]


def test_the_chosen_schedule_and_threads_are_used_unless_one_is_given(forerun, placed, monkeypatch):
    from forerun.runtime.drafting import choice
    from forerun.runtime.load import load

    # The drafter of the stand-in cannot run ahead, which is not what this is about.
    monkeypatch.setattr(choice, "check_ahead", lambda drafter: drafter)
    told = []
    placed.answer = dataclasses.replace(CHOICE, schedule="pearl")
    with load(forerun.model, device="auto", on_placement=told.append) as text:
        plan = text._drafters.plan()
        assert plan.schedule == "pearl" and plan.device == "cpu"
        assert text._runner.threads == CHOICE.threads
    assert told == [CHOICE.reason] and placed.asked["schedule"] is None
    with load(forerun.model, device="auto", schedule="duo") as text:
        assert text._drafters.plan().schedule == "duo"
    assert placed.asked["schedule"] == "duo"


def test_a_draft_device_that_is_open_is_chosen_too(forerun, placed):
    stats, told = with_auto(forerun, device="target=cpu,draft=auto")
    assert len(told) == 2 and stats["drafter"] == "ngram"
    assert (placed.asked["request"].target, placed.asked["request"].draft) == ("cpu", None)


def test_a_drafter_nobody_named_drafts_only_where_the_text_cannot_change(forerun, placed):
    with_auto(forerun)
    assert placed.asked["drafted_on"] == "cpu"
    with_auto(forerun, "--drafter", "recycle")
    assert placed.asked["drafted_on"] is None


def test_nothing_is_measured_for_a_device_that_is_named(forerun, placed):
    _, told = with_auto(forerun, device="cpu")
    assert told == [] and placed.asked is None


@pytest.mark.gpu
def test_the_figures_name_the_device(forerun, webgpu):
    arguments = ("generate", "xyz", "--model", forerun.model, "--raw", "--max-tokens", "4")
    plain = forerun(*arguments)
    done = forerun(*arguments, "--device", webgpu, "--stats")
    assert done.returncode == 0, done.stderr
    assert done.stdout == plain.stdout and "target on webgpu" in done.stderr
