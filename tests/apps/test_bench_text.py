import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from forerun.apps.bench import peers, plan, text, turns
from forerun.apps.bench.peers import Runtime
from forerun.apps.bench.prepare import Prepared
from forerun.apps.bench.worker import WorkerError
from forerun.errors import ContextLimitError, OptionError

FAKE = """
import json, sys, time
from forerun.apps.bench.worker import serve

def load(request):
    global settings
    settings = json.loads(open(request["model"]).read())
    if settings.get("fail") == "load":
        raise RuntimeError("cannot read this model")
    return {"version": "1.2"}

def measure(request):
    with open(settings["log"], "a") as log:
        log.write(json.dumps([settings["name"], request["prompt"], request["tokens"]]) + "\\n")
    length, tokens = len(request["prompt"]), request["tokens"]
    if settings.get("fail") == length:
        raise RuntimeError("out of memory")
    prefill = length / settings["prefill"]
    return {
        "prefill_s": prefill, "first_token_s": prefill, "steps": tokens - 1,
        "decode_s": (tokens - 1) / settings["decode"], "tokens": [],
        "session_share": settings.get("share"),
    }

serve({"load": load, "measure": measure, "memory": lambda request: {"peak_rss_mb": 12.5}})
"""


@pytest.fixture
def fakes(tmp_path, monkeypatch):
    """Makes (runtime, prepared, python) of workers that measure what they are told to."""
    (tmp_path / "fake_runtime.py").write_text(FAKE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("FORERUN_HOME", str(tmp_path / "home"))

    def make(key, decode, prefill=1000.0, **more):
        settings = {"name": key, "decode": decode, "prefill": prefill, **more}
        path = tmp_path / f"{key}.json"
        path.write_text(json.dumps({**settings, "log": str(tmp_path / "log")}))
        runtime = Runtime(key, key, "?", "fake_runtime", None, "gguf")
        return runtime, Prepared(path, "Q4"), sys.executable

    return make


@pytest.fixture
def log(tmp_path):
    def read():
        return [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]

    return read


def open_bench(tmp_path, chosen):
    bench = turns.Bench(lambda text: None, tmp_path / "logs", threads=1, context=1024)
    bench.open(chosen)
    return bench


def test_runtimes_take_turns_on_the_same_token_ids(fakes, log, tmp_path):
    bench = open_bench(tmp_path, [fakes("forerun", 200), fakes("peer", 100)])
    measures = plan.make_plan(range(5000), [0, 64], 2)
    try:
        bench.measure(measures, 2)
    finally:
        bench.close()
    long = [(name, tuple(prompt)) for name, prompt, _ in log() if len(prompt) == 64]
    assert [name for name, _ in long] == ["forerun", "peer"] * 3
    assert all(mine == theirs for (_, mine), (_, theirs) in zip(long[::2], long[1::2], strict=True))
    assert len({prompt for _, prompt in long}) == 3


def test_only_the_worker_whose_turn_it_is_runs(fakes, tmp_path, monkeypatch):
    bench = open_bench(tmp_path, [fakes("forerun", 200), fakes("peer", 100)])
    workers = {item.runtime.key: item.worker for item in bench._workers}
    running = set()
    for name, worker in workers.items():
        resume, pause = worker.resume, worker.pause
        monkeypatch.setattr(worker, "resume", lambda n=name, r=resume: (running.add(n), r()))
        monkeypatch.setattr(worker, "pause", lambda n=name, p=pause: (p(), running.discard(n)))
        call = worker.call

        def checked(*args, n=name, c=call, **fields):
            assert running == {n}
            return c(*args, **fields)

        monkeypatch.setattr(worker, "call", checked)
    try:
        bench.measure(plan.make_plan(range(5000), [32], 2), 2)
    finally:
        monkeypatch.undo()
        bench.close()
    assert running == set()


def test_rows_and_ratios(fakes, tmp_path):
    chosen = [fakes("forerun", 300.0, 2000.0, share=0.99), fakes("peer", 200.0, 1000.0)]
    bench = open_bench(tmp_path, chosen)
    try:
        samples = bench.measure(plan.make_plan(range(5000), [0, 512], 3), 3)
        rows = turns.rows(bench.opened, samples, [0, 512], bench.peak_rss_mb)
        ratios = turns.ratios(bench.opened, samples, [0, 512])
    finally:
        bench.close()
    ours = rows[0]
    assert (ours["runtime"], ours["weights"], ours["depth"]) == ("forerun", "Q4", 0)
    assert ours["decode_tok_s"]["median"] == pytest.approx(300)
    assert ours["prefill_tok_s"]["median"] == pytest.approx(2000)
    assert ours["prefill_tokens"] == 512
    assert ours["ttft_ms"]["median"] == pytest.approx(10)
    assert ours["session_share"]["median"] == 0.99
    assert ours["peak_rss_mb"] == 12.5
    assert rows[1]["session_share"] is None
    assert {(r["what"], r["depth"]): r["ratio"] for r in ratios} == {
        ("decode_tok_s", 0): 1.5,
        ("decode_tok_s", 512): 1.5,
        ("prefill_tok_s", 512): 2.0,
    }


@pytest.mark.parametrize("when", ["load", 512])
def test_a_peer_that_fails_is_listed_and_the_others_go_on(fakes, tmp_path, when):
    bench = open_bench(tmp_path, [fakes("forerun", 300.0), fakes("peer", 200.0, fail=when)])
    try:
        samples = bench.measure(plan.make_plan(range(5000), [0, 512], 2), 2)
    finally:
        bench.close()
    assert len(samples["forerun", 512]) == 2
    assert "peer Q4" in bench.failed
    assert [runtime.key for runtime in bench.opened] == ["forerun"]


def test_our_own_failure_is_an_error(fakes, tmp_path):
    bench = turns.Bench(lambda text: None, tmp_path / "logs", threads=1, context=1024)
    with pytest.raises(WorkerError, match="cannot read this model"):
        bench.open([fakes("forerun", 300.0, fail="load")])
    bench.close()


@pytest.fixture
def ready(fakes, tmp_path, monkeypatch):
    """`text.run` with fakes in place of the bundle and the runtimes."""
    kv = SimpleNamespace(capacity=4096)
    manifest = SimpleNamespace(kv=kv, name="fake-model")
    monkeypatch.setattr(text, "find_bundle", lambda model: tmp_path)
    monkeypatch.setattr(text, "load_manifest", lambda folder: manifest)
    monkeypatch.setattr(text, "_token_ids", lambda manifest, folder: list(range(9000)))
    chosen = [fakes("forerun", 300.0, 900.0), fakes("peer", 200.0)]
    left_out = {"other": "not installed (pip install 'forerun[peers]')"}
    monkeypatch.setattr(text, "_choose", lambda peers, manifest, folder: (chosen, left_out))


def test_json_output(ready, tmp_path, capsys):
    out = tmp_path / "bench.json"
    result = text.run(peers=True, json_path=out, runs=2, depths=[0, 512], threads=1)
    assert json.loads(out.read_text()) == json.loads(json.dumps(result))
    assert {"cpu", "cores", "onnxruntime"} <= set(result["machine"])
    assert (result["threads"], result["model"]) == (1, "fake-model")
    fields = {"runtime", "weights", "depth", "prefill_tok_s", "decode_tok_s", "ttft_ms"}
    assert fields | {"peak_rss_mb", "session_share"} <= set(result["rows"][0])
    assert {"median", "min", "max"} <= set(result["rows"][0]["decode_tok_s"])
    assert len(result["rows"]) == 4
    assert result["left_out"] == {"other": "not installed (pip install 'forerun[peers]')"}
    shown = capsys.readouterr()
    assert "1.50x" in shown.out
    assert "left out: other: not installed" in shown.out
    assert "depth 512 run 2/2 peer Q4" in shown.err


def test_shaky_runs_are_said(ready, monkeypatch, capsys):
    taken = iter([300.0, 300.0, 150.0, 300.0, 100.0, 300.0] * 20)
    real = turns._merge

    def shaky(sample, part, answer):
        answer["decode_s"] = answer["steps"] / next(taken)
        return real(sample, part, answer)

    monkeypatch.setattr(turns, "_merge", shaky)
    result = text.run(peers=True, runs=3, depths=[600], threads=1)
    assert not all(row["steady"] for row in result["ratios"])
    out = capsys.readouterr().out
    assert "scatter by more than 20%" in out
    assert "~" in out


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"runs": 0}, OptionError),
        ({"threads": 0}, OptionError),
        ({"depths": []}, OptionError),
        ({"depths": [-1]}, OptionError),
        ({"depths": [4090]}, ContextLimitError),
    ],
)
def test_bad_options_are_refused_before_anything_runs(ready, options, error, monkeypatch):
    monkeypatch.setattr(text.turns, "Bench", None)
    with pytest.raises(error):
        text.run(**options)


def test_peers_that_are_not_installed_are_listed(tmp_path, monkeypatch):
    monkeypatch.setattr(text, "installed_versions", lambda python, packages: {})
    quantization = SimpleNamespace(method="int4")
    manifest = SimpleNamespace(name="fake", quantization=quantization)
    chosen, left_out = text._choose(True, manifest, tmp_path)  # pyright: ignore
    assert [runtime.key for runtime, *_ in chosen] == ["forerun"]
    assert set(left_out) == {peer.title for peer in peers.PEERS}
    assert all("pip install 'forerun[peers]'" in why for why in left_out.values())


def test_versions_are_asked_of_the_interpreter_that_runs_the_peers():
    found = peers.installed_versions(sys.executable, {"pytest", "no-such-package-here"})
    assert found == {"pytest": pytest.__version__}
    assert peers.installed_versions(str(Path("no/such/python")), {"pytest"}) == {}


def test_the_peers_interpreter_can_be_chosen(monkeypatch):
    monkeypatch.delenv(peers.PYTHON_VARIABLE, raising=False)
    assert peers.peers_python() == sys.executable
    monkeypatch.setenv(peers.PYTHON_VARIABLE, "elsewhere/bin/python")
    assert peers.peers_python() == "elsewhere/bin/python"


def test_disturbance_by_others_is_counted(fakes, tmp_path, monkeypatch):
    bench = open_bench(tmp_path, [fakes("forerun", 300.0)])
    clock = iter(float(second) for second in range(100))
    monkeypatch.setattr(turns.machine, "busy_seconds", lambda: next(clock))
    start = time.monotonic()
    try:
        bench.measure(plan.make_plan(range(5000), [32], 1), 1)
    finally:
        bench.close()
    assert time.monotonic() - start < 10
    assert (bench.disturbed, bench.taken) == (2, 2)
