"""Worker processes: one runtime each, spoken to in JSON lines over stdin and stdout.

A request is one line ``{"op": NAME, ...}``, its answer one line ``{"ok": true, ...}`` or
``{"ok": false, "error": TEXT}``. Only one worker may work at a time; the others, with all their
children, are stopped by SIGSTOP, because a waiting thread pool may spin.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from forerun.errors import ForerunError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    Handlers = Mapping[str, Callable[[dict[str, Any]], dict[str, Any]]]

_CAN_STOP = hasattr(signal, "SIGSTOP") and hasattr(os, "killpg")
_PR_SET_PDEATHSIG = 1


class WorkerError(ForerunError):
    """A worker refused a request, died, or did not answer in time."""


def die_with_parent() -> None:
    """Ask the kernel to kill this process when its parent ends, even if it is stopped (Linux)."""
    if not sys.platform.startswith("linux"):
        return
    import ctypes

    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def serve(handlers: Handlers) -> None:
    """Answer requests until stdin ends or ``quit`` comes; runs inside the worker process.

    What libraries print to stdout goes to stderr, so that it cannot break the protocol.

    Args:
        handlers: operation to function from the request to the fields of the answer.
    """
    die_with_parent()
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    for line in sys.stdin:
        request = json.loads(line)
        operation = request.pop("op", None)
        if operation == "quit":
            break
        answers.write(json.dumps(_answer(handlers, operation, request)) + "\n")
        answers.flush()


def _answer(handlers: Handlers, operation: object, request: dict[str, Any]) -> dict[str, Any]:
    handler = handlers.get(str(operation))
    if handler is None:
        return {"ok": False, "error": f"unknown operation {operation!r}; known: {list(handlers)}"}
    try:
        return {"ok": True, **handler(request)}
    except Exception as error:  # whatever it is, the parent must hear of it
        return {"ok": False, "error": f"{type(error).__name__}: {error}"}


class Worker:
    """The parent's end of one worker process.

    The process leads a group of its own, so that `pause` also reaches a server it started.

    Args:
        name: for messages.
        command: of the process.
        log: file that takes its stderr.
        env: environment; None inherits this process's.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        log: Path,
        env: Mapping[str, str] | None = None,
    ) -> None:
        self.name, self.log = name, log
        self._rest = b""
        with open(log, "wb") as stderr:
            self._process = subprocess.Popen(
                list(command),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                env=None if env is None else dict(env),
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        """Process id, which is also the id of the group."""
        return self._process.pid

    def call(self, operation: str, timeout: float = 300.0, **fields: Any) -> dict[str, Any]:
        """Send one request and wait for its answer.

        Raises:
            WorkerError: the worker refused, died, or took longer than `timeout` seconds.
        """
        line = json.dumps({"op": operation, **fields}).encode() + b"\n"
        try:
            assert self._process.stdin is not None
            self._process.stdin.write(line)
            self._process.stdin.flush()
        except OSError:
            raise WorkerError(f"{self.name}: the process has ended; {self._tail()}") from None
        try:
            answer = json.loads(self._read_line(timeout))
        except ValueError:
            raise WorkerError(f"{self.name}: its answer is not JSON; {self._tail()}") from None
        if not answer.pop("ok", False):
            raise WorkerError(f"{self.name}: {answer.get('error', 'refused')}")
        return answer

    def pause(self) -> None:
        """Stop the worker and its children until `resume`; returns when they are stopped."""
        if _CAN_STOP and self._process.poll() is None:
            os.killpg(self.pid, signal.SIGSTOP)
            _wait_stopped(self.pid)

    def resume(self) -> None:
        """Let a paused worker go on."""
        if _CAN_STOP and self._process.poll() is None:
            os.killpg(self.pid, signal.SIGCONT)

    def cpu_seconds(self) -> float:
        """CPU time that the worker and its living children have used, in seconds."""
        tick = os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 100
        return sum(user + system for *_, user, system in group_members(self.pid)) / tick

    def close(self, timeout: float = 5.0) -> None:
        """Ask the worker to end, then kill what is left of its group."""
        if self._process.poll() is None:
            with contextlib.suppress(OSError, AttributeError):
                self.resume()
                self._process.stdin.write(b'{"op": "quit"}\n')  # type: ignore[union-attr]
                self._process.stdin.close()  # type: ignore[union-attr]
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(timeout)
        if hasattr(os, "killpg"):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.pid, signal.SIGKILL)
        elif self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(OSError, AttributeError):
                pipe.close()  # type: ignore[union-attr]

    def _read_line(self, timeout: float) -> bytes:
        stdout = self._process.stdout
        assert stdout is not None
        deadline = time.monotonic() + timeout
        with selectors.DefaultSelector() as selector:
            selector.register(stdout, selectors.EVENT_READ)
            while b"\n" not in self._rest:
                left = deadline - time.monotonic()
                if left <= 0 or not selector.select(left):
                    raise WorkerError(f"{self.name}: no answer within {timeout:.0f} s")
                chunk = os.read(stdout.fileno(), 1 << 16)
                if not chunk:
                    raise WorkerError(f"{self.name}: the process has ended; {self._tail()}")
                self._rest += chunk
        line, self._rest = self._rest.split(b"\n", 1)
        return line

    def _tail(self) -> str:
        try:
            lines = self.log.read_text(errors="replace").strip().splitlines()
        except OSError:
            lines = []
        return f"its log {self.log} ends with: {lines[-1][:300]}" if lines else "its log is empty"


def group_members(group: int) -> list[tuple[int, str, int, int]]:
    """Processes of a group as (pid, state, user ticks, system ticks); empty where no /proc is."""
    members = []
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            text = entry.read_text()
        except OSError:
            continue
        # The name in brackets may hold blanks and brackets itself; what follows the last one not.
        fields = text[text.rindex(")") + 2 :].split()
        if int(fields[2]) == group:
            members.append((int(entry.parent.name), fields[0], int(fields[11]), int(fields[12])))
    return members


def _wait_stopped(group: int, timeout: float = 2.0) -> None:
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        if all(state in "TZX" for _, state, _, _ in group_members(group)):
            return
        time.sleep(0.002)
