"""What a person sees of long work when stderr is no terminal."""

import ast
from pathlib import Path

import pytest

import forerun
from forerun.apps.cli.progress import STAGES, Lines, amount
from forerun.export.fetch import WAITING

ROOT = Path(forerun.__file__).parent
ROOMS = ("quant", "export", "runtime", "devices", "apps")
# What callers name the function that is told of progress.
TELLERS = {"progress", "report", "_report", "show", "silent"}


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


@pytest.mark.parametrize(
    "given, words",
    [
        (("download", 12_000_000, 92_500_000), "12.0 of 92.5 MB (12 %)"),
        (("download", 12_000_000, None), "12.0 MB"),
        (("export", 3, 30), "3 of 30 (10 %)"),
        (("prefill", 512, 1900), "512 of 1900 tokens (26 %)"),
        (("something new", 0, 0), "0 of 0"),
    ],
)
def test_amounts_have_units(given, words):
    assert amount(*given) == words


def test_a_line_at_the_start_every_few_seconds_and_at_the_end(capsys):
    clock = Clock()
    lines = Lines(clock=clock)
    for done in range(0, 101):
        lines("download", done * 1_000_000, 100_000_000)
        clock.now += 0.2
    lines("download", 100_000_000, 100_000_000)
    shown = capsys.readouterr().err.splitlines()
    assert shown[0] == "forerun: download: 0.0 of 100.0 MB (0 %)"
    assert shown[1] == "forerun: download: 25.0 of 100.0 MB (25 %), about 15 s left"
    assert shown[-1] == "forerun: download: 100.0 of 100.0 MB (100 %), 20.0 s"
    assert len(shown) == 5


def test_a_stage_that_begins_again_is_shown_again(capsys):
    lines = Lines(clock=Clock())
    for _part in range(2):
        lines("download", 0, 10)
        lines("download", 10, 10)
    assert capsys.readouterr().err.count("(100 %)") == 2


def test_short_stages_stay_quiet_and_long_ones_speak(capsys):
    clock = Clock()
    lines = Lines(quiet_for=1.0, clock=clock)
    lines("prefill", 0, 1000)
    clock.now += 0.5
    lines("prefill", 1000, 1000)
    assert capsys.readouterr().err == ""
    clock.now += 10
    lines("prefill", 0, 1000)
    clock.now += 2
    lines("prefill", 500, 1000)
    assert "500 of 1000 tokens" in capsys.readouterr().err


def reported(room):
    """Names of the stages that the code of a folder reports, with where."""
    for path in sorted((ROOT / room).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call) or len(node.args) != 3:
                continue
            name = getattr(node.func, "id", getattr(node.func, "attr", ""))
            stage = getattr(node.args[0], "value", None)
            if name in TELLERS and isinstance(stage, str):
                yield stage, f"{path.relative_to(ROOT)}:{node.lineno}"


@pytest.mark.parametrize("room", ROOMS)
def test_every_stage_has_a_row(room):
    found = dict(reported(room))
    missing = {stage: where for stage, where in found.items() if stage not in STAGES}
    assert not missing, "stages without a row in STAGES"
    # If calls got another look, this test would see nothing.
    assert found or room == "devices"


def test_every_row_is_reported_by_something():
    found = {stage for room in ROOMS for stage, _ in reported(room)} | {WAITING}
    assert set(STAGES) == found
