"""A thread for a second device: one call at a time is handed to it, and its outcome comes back."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from queue import SimpleQueue
from typing import Generic, TypeVar

from forerun.errors import BusyError

T = TypeVar("T")
_END = None


class Job(Generic[T]):
    """A call on the other thread."""

    def __init__(self, call: Callable[[], T]) -> None:
        self._call = call
        self._done = threading.Event()
        self._value: T | None = None
        self._error: BaseException | None = None

    def run(self) -> None:
        """Make the call and keep what it gives or raises."""
        try:
            self._value = self._call()
        except BaseException as error:  # raised again where it is waited for
            self._error = error
        finally:
            self._done.set()

    @property
    def done(self) -> bool:
        """Whether the call has ended, well or not."""
        return self._done.is_set()

    def wait(self) -> None:
        """Until the call has ended, well or not. An interrupt of the waiting thread is held back.

        The other thread must not be left running: it writes to state that the caller uses next.
        """
        held: BaseException | None = None
        while not self._done.is_set():
            try:
                self._done.wait()
            except BaseException as error:
                held = error
        if held is not None:
            raise held

    def result(self) -> T:
        """What the call returned; raises what it raised."""
        self.wait()
        if self._error is not None:
            raise self._error
        return self._value  # type: ignore[return-value]


class Worker:
    """Makes calls on a thread of its own, one after the other, and never holds more than one.

    Args:
        name: of the thread.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._calls: SimpleQueue[Job | None] = SimpleQueue()
        self._thread: threading.Thread | None = None
        self._latest: Job | None = None
        self._closed = False

    def submit(self, call: Callable[[], T]) -> Job[T]:
        """Start a call.

        Raises:
            BusyError: the call before has not ended, or the worker is closed.
        """
        if self._closed or (self._latest is not None and not self._latest.done):
            raise BusyError(f"the thread {self._name!r} is closed or busy; wait for its job")
        if self._thread is None:
            self._thread = threading.Thread(
                target=_serve, args=(self._calls,), name=self._name, daemon=True
            )
            self._thread.start()
            # The thread holds the queue only, so a worker that is dropped unclosed ends it too.
            weakref.finalize(self, self._calls.put, _END)
        job: Job[T] = Job(call)
        self._latest = job
        self._calls.put(job)
        return job

    def close(self) -> None:
        """End the thread after the call that runs; may be called twice."""
        self._closed = True
        thread, self._thread = self._thread, None
        if thread is not None:
            self._calls.put(_END)
            thread.join()


def _serve(calls: SimpleQueue[Job | None]) -> None:
    while (job := calls.get()) is not None:
        job.run()
        del job
