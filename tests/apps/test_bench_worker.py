import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from forerun.apps.bench.worker import Worker, WorkerError, group_members

linux = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc")

FAKE = """
import os, subprocess, sys, threading, time
from forerun.apps.bench.worker import serve

count = 0

def spin():
    global count
    while True:
        count += 1

def start_spinning(request):
    threading.Thread(target=spin, daemon=True).start()
    return {}

def start_child(request):
    code = "while True: pass"
    return {"child": subprocess.Popen([sys.executable, "-c", code]).pid}

def noisy(request):
    print("a library prints this")
    os.system("echo so does a child")
    return {"sum": sum(request["numbers"])}

def fail(request):
    raise ValueError("no such thing")

def sleep(request):
    time.sleep(60)
    return {}

def die(request):
    print("last words", file=sys.stderr, flush=True)
    os._exit(3)

serve({"spin": start_spinning, "child": start_child, "sum": noisy, "fail": fail, "sleep": sleep,
       "die": die})
"""


@pytest.fixture
def script(tmp_path):
    path = tmp_path / "fake.py"
    path.write_text(FAKE)
    return path


@pytest.fixture
def worker(script, tmp_path):
    made = Worker("fake", [sys.executable, str(script)], tmp_path / "fake.log")
    yield made
    made.close(timeout=1)


def is_alive(pid):
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return False
    return state not in "ZX"


def wait_gone(pid, seconds=5.0):
    deadline = time.monotonic() + seconds
    while is_alive(pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not is_alive(pid)


def test_answers_and_what_is_printed_goes_to_the_log(worker):
    assert worker.call("sum", numbers=[1, 2, 3]) == {"sum": 6}
    assert worker.call("sum", numbers=[4]) == {"sum": 4}
    log = worker.log.read_text()
    assert "a library prints this" in log
    assert "so does a child" in log


def test_an_error_is_told_and_the_worker_goes_on(worker):
    with pytest.raises(WorkerError, match="fake: ValueError: no such thing"):
        worker.call("fail")
    with pytest.raises(WorkerError, match="unknown operation 'nonsense'"):
        worker.call("nonsense")
    assert worker.call("sum", numbers=[]) == {"sum": 0}


def test_death_is_told_with_the_end_of_the_log(worker):
    with pytest.raises(WorkerError, match=r"has ended.*last words"):
        worker.call("die")
    with pytest.raises(WorkerError, match="has ended"):
        worker.call("sum", numbers=[1])


def test_no_answer_in_time(worker):
    worker.call("sum", numbers=[])
    with pytest.raises(WorkerError, match="no answer within"):
        worker.call("sleep", timeout=0.2)


@linux
def test_a_paused_worker_and_its_children_use_no_cpu(worker):
    worker.call("spin")
    child = worker.call("child")["child"]
    time.sleep(0.1)
    worker.pause()
    members = group_members(worker.pid)
    assert {pid for pid, *_ in members} >= {worker.pid, child}
    assert {state for _, state, _, _ in members} == {"T"}
    before = worker.cpu_seconds()
    assert before > 0
    time.sleep(0.3)
    assert worker.cpu_seconds() == before
    worker.resume()
    assert worker.call("sum", numbers=[7]) == {"sum": 7}
    time.sleep(0.3)
    assert worker.cpu_seconds() > before


@linux
def test_close_also_ends_children_of_a_paused_worker(worker):
    child = worker.call("child")["child"]
    worker.pause()
    worker.close(timeout=2)
    assert wait_gone(child)
    assert not is_alive(worker.pid)


@linux
def test_a_stopped_worker_does_not_outlive_a_killed_parent(script, tmp_path):
    code = f"""
        import sys, time
        from pathlib import Path
        from forerun.apps.bench.worker import Worker
        worker = Worker("fake", [sys.executable, {str(script)!r}], Path({str(tmp_path)!r}) / "log")
        worker.call("sum", numbers=[])
        worker.pause()
        print(worker.pid, flush=True)
        time.sleep(60)
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        assert is_alive(pid)
        os.kill(parent.pid, signal.SIGKILL)
    assert wait_gone(pid)
