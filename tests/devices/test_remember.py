from forerun.devices import remember
from forerun.devices.bandwidth import contention, read_bandwidth
from forerun.devices.remember import Remembered


def test_entries_belong_to_one_machine(tmp_path, monkeypatch):
    store = Remembered("things", tmp_path)
    store.write("a", {"x": [1, 2.5]})
    assert store.read("a") == {"x": [1, 2.5]}
    assert store.read("b") is None
    monkeypatch.setattr(remember, "usable_cores", lambda: 4711)
    assert store.read("a") is None


def test_they_lie_in_the_cache_of_home(tmp_path, monkeypatch):
    monkeypatch.setenv("FORERUN_HOME", str(tmp_path))
    Remembered("things").write("a", 1)
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["things.json"]


def test_bandwidth_is_a_rate_and_contention_what_is_lost_together():
    assert read_bandwidth(1, megabytes=1) > 0 and read_bandwidth(3, megabytes=1) > 0
    assert contention(10.0, 20.0, 2) == 0
    assert contention(10.0, 10.0, 2) == 1
    assert contention(10.0, 25.0, 2) == 0
    assert contention(10.0, 5.0, 1) == 0
