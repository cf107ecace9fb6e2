"""Progress of long work on stderr: bars at a terminal, plain lines anywhere else."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Protocol

_MEGABYTE = 1_000_000
_LINE_EVERY_S = 5.0


@dataclass(frozen=True)
class Stage:
    """How a stage is shown: what it is called, what it counts, and how many make one unit."""

    label: str
    unit: str = ""
    scale: int = 1


STAGES = {
    "wait for another pull": Stage("wait for another pull"),
    "download": Stage("download", "MB", _MEGABYTE),
    "unpack": Stage("unpack", "MB", _MEGABYTE),
    "verify": Stage("verify", "MB", _MEGABYTE),
    "export": Stage("export"),
    "check": Stage("check"),
    "prefill": Stage("read the prompt", "tokens"),
    "generate": Stage("prompts", "done"),
    "calibrate": Stage("calibrate", "texts"),
    "sizes": Stage("sizes", "matrices"),
    "sensitivity": Stage("what 8 bits gain", "kinds of weights"),
    "quantize": Stage("quantize", "matrices"),
    "calibrate KV": Stage("calibrate KV", "texts"),
    "cosines": Stage("cosines of blocks", "texts"),
    "try skipping": Stage("try skipping", "layers"),
    "order": Stage("order of skipping", "layers"),
    "levels": Stage("skipping levels", "levels"),
    "evaluate": Stage("evaluate", "tokens"),
    "measure threads": Stage("measure threads", "done"),
    "measure": Stage("measure steps", "rounds"),
    "drafters": Stage("measure drafters", "done"),
    "agreement": Stage("greedy agreement", "prompts"),
    "recall": Stage("recall", "tokens"),
    "speed": Stage("speed", "runs"),
    "chat": Stage("chat", "tokens"),
    "write answers": Stage("write answers", "tokens"),
    "train": Stage("train"),
    "answers": Stage("answers", "done"),
    "prompts of the peers": Stage("prompts of the peers", "done"),
}


class Progress(Protocol):
    """Called with the name of a stage, how much is done, and how much there is if known."""

    def __call__(self, stage: str, done: int, total: int | None) -> None:
        """Tell how far a stage has come."""


def amount(stage: str, done: int, total: int | None) -> str:
    """Return the words for how far a stage has come, e.g. ``12.0 of 92.5 MB (13 %)``."""
    kind = STAGES.get(stage, Stage(stage))
    numbers = [_number(n, kind.scale) for n in (done, total) if n is not None]
    share = f" ({100 * done // total} %)" if total else ""
    return f"{' of '.join(numbers)} {kind.unit}".rstrip() + share


def _number(value: int, scale: int) -> str:
    return str(value) if scale == 1 else f"{value / scale:.1f}"


class Reporter:
    """Base of the two displays: keeps the time of each stage and decides when to show it.

    Args:
        quiet_for: seconds a stage may take before anything is shown of it.
        clock: seconds, monotonic.
    """

    def __init__(self, quiet_for: float = 0.0, clock: Callable[[], float] = time.monotonic) -> None:
        self._quiet_for, self._clock = quiet_for, clock
        self._stage, self._done, self._start = "", 0, 0.0

    def __call__(self, stage: str, done: int, total: int | None) -> None:
        """Take note of progress, and show it if it is time."""
        now = self._clock()
        fresh = stage != self._stage or done < self._done
        if fresh:
            self._stage, self._start = stage, now
        self._done = done
        if now - self._start >= self._quiet_for:
            self._show(stage, done, total, fresh)

    def __enter__(self) -> Reporter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Leave the terminal as it was, so that other text can follow."""

    def _show(self, stage: str, done: int, total: int | None, fresh: bool) -> None:
        raise NotImplementedError


class Lines(Reporter):
    """One line when a stage begins, one every few seconds, one when it is done."""

    def __init__(self, quiet_for: float = 0.0, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(quiet_for, clock)
        self._last, self._finished = float("-inf"), False

    def _show(self, stage: str, done: int, total: int | None, fresh: bool) -> None:
        finished = total is not None and done >= total
        if fresh:
            self._finished = False
        if self._finished:
            return
        now = self._clock()
        if not (finished or fresh or now - self._last >= _LINE_EVERY_S):
            return
        self._last, self._finished = now, finished
        label = STAGES.get(stage, Stage(stage)).label
        elapsed = now - self._start
        left = "" if finished else _left(done, total, elapsed)
        tail = f", {elapsed:.1f} s" if finished else left
        sys.stderr.write(f"forerun: {label}: {amount(stage, done, total)}{tail}\n")
        sys.stderr.flush()


def _left(done: int, total: int | None, elapsed: float) -> str:
    if not total or done <= 0 or elapsed < 1.0:
        return ""
    return f", about {elapsed * (total - done) / done:.0f} s left"


class Bars(Reporter):
    """A bar for each stage, drawn by rich; rich is imported when the first bar is needed."""

    def __init__(self, quiet_for: float = 0.0, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(quiet_for, clock)
        self._bars: Any = None
        self._task: Any = None

    def _show(self, stage: str, done: int, total: int | None, fresh: bool) -> None:
        if self._bars is None:
            self._bars = _new_bars()
            self._bars.start()
            fresh = True
        if fresh or self._task is None:
            label = STAGES.get(stage, Stage(stage)).label
            self._task = self._bars.add_task(label, total=total, amount="")
        self._bars.update(
            self._task, completed=done, total=total, amount=amount(stage, done, total)
        )

    def close(self) -> None:
        """Stop drawing; a later call begins with new bars."""
        if self._bars is not None:
            self._bars.stop()
        self._bars = self._task = None
        self._stage = ""


def _new_bars() -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as RichProgress

    return RichProgress(
        TextColumn("{task.description:<16}"),
        BarColumn(bar_width=30),
        TextColumn("{task.fields[amount]}"),
        TimeRemainingColumn(elapsed_when_finished=True),
        console=Console(stderr=True, markup=False, highlight=False),
        redirect_stdout=False,
    )


def reporter(quiet_for: float = 0.0) -> Reporter:
    """Return bars when stderr is a terminal, plain lines otherwise.

    Args:
        quiet_for: seconds a stage may take before anything is shown of it.
    """
    return Bars(quiet_for) if sys.stderr.isatty() else Lines(quiet_for)
