"""Ctrl-C as a request: the first one cancels the answer, the second one breaks off."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


class Interrupt:
    """Tells whether Ctrl-C came.

    Attributes:
        fired: True from the first Ctrl-C on.
    """

    def __init__(self) -> None:
        self.fired = False


@contextmanager
def cancel_on_interrupt(cancel: Callable[[], object]) -> Iterator[Interrupt]:
    """Call `cancel` at the first Ctrl-C inside the block; a second one raises KeyboardInterrupt.

    Outside the main thread, and in a job started with interrupts ignored (``nohup``, ``&``),
    nothing is changed.
    """
    interrupt = Interrupt()

    def on_signal(_number: int, _frame: FrameType | None) -> None:
        if interrupt.fired:
            raise KeyboardInterrupt
        interrupt.fired = True
        cancel()

    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or before is signal.SIG_IGN:
        yield interrupt
        return
    signal.signal(signal.SIGINT, on_signal)
    try:
        yield interrupt
    finally:
        signal.signal(signal.SIGINT, before)
