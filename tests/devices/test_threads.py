import time

import pytest

from forerun.devices import threads as module
from forerun.devices.threads import default_threads, probe_threads, remembered_threads


@pytest.fixture(autouse=True)
def four_cores(monkeypatch):
    monkeypatch.setattr(module, "usable_cores", lambda: 4)


def test_the_fastest_is_remembered(tmp_path):
    def open_step(threads):
        return lambda: time.sleep({1: 0.003, 2: 0.001, 4: 0.006}[threads])

    assert remembered_threads("m", tmp_path / "c") is None
    times = probe_threads("m", tmp_path / "c", open_step)
    assert set(times) == {1, 2, 4}
    assert remembered_threads("m", tmp_path / "c") == 2
    assert remembered_threads("other", tmp_path / "c") is None


@pytest.mark.parametrize("text", ["", "[]", "{", '{"x": 1}', "null"])
def test_damaged_cache_is_no_cache(text, tmp_path):
    (tmp_path / "threads.json").write_text(text)
    assert remembered_threads("m", tmp_path) is None
    probe_threads("m", tmp_path, lambda n: lambda: None)
    assert remembered_threads("m", tmp_path) in (1, 2, 4)


def test_default_is_bounded(monkeypatch):
    assert default_threads() == 4
    monkeypatch.setattr(module, "usable_cores", lambda: 96)
    assert default_threads() == 8
