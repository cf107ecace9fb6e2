"""Time and memory of one generation."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from forerun.runtime.types import Stats

_STATUS = Path("/proc/self/status")


@dataclass
class RunClock:
    """Adds up the time of a generation, without the time its consumer takes between events.

    Attributes:
        session_time: reads the seconds spent inside ONNX Runtime so far.
        prompt_tokens: tokens of the prompt.
        cached_tokens: how many of them were cached.
        prefilled: how many were run.
        new_tokens: tokens generated so far.
        rounds: steps after the prefill.
    """

    session_time: Callable[[], float]
    prompt_tokens: int
    cached_tokens: int = 0
    prefilled: int = 0
    new_tokens: int = 0
    rounds: int = 0

    def __post_init__(self) -> None:
        self._session_start = self._resumed = 0.0
        self._before = self._prefill = self._first = self._last = 0.0

    def begin(self, setup: float) -> None:
        """Start counting; `setup` seconds were spent before (checks, tokenizing the prompt)."""
        self._before = setup
        self._session_start = self.session_time()
        self._resumed = time.perf_counter()

    def pause(self) -> None:
        """Stop counting: the consumer has the turn."""
        self._before += time.perf_counter() - self._resumed

    def resume(self) -> None:
        """Count again."""
        self._resumed = time.perf_counter()

    def seconds(self) -> float:
        """Seconds counted so far; call while counting."""
        return self._before + time.perf_counter() - self._resumed

    def prefill_done(self, started: float) -> None:
        """Note the end of a prefill that began at `started` seconds."""
        self._prefill = self.seconds() - started

    def token_done(self) -> None:
        """Note a token."""
        self._last = self.seconds()
        if self.new_tokens == 0:
            self._first = self._last
        self.new_tokens += 1

    def stats(self, target: str = "cpu") -> Stats:
        """What was measured; call while counting. `target` is the device that ran the model."""
        wall = self.seconds()
        inside = self.session_time() - self._session_start
        later = self.new_tokens - 1
        spent = self._last - self._first
        return Stats(
            prompt_tokens=self.prompt_tokens,
            cached_tokens=self.cached_tokens,
            new_tokens=self.new_tokens,
            ttft_ms=1e3 * self._first,
            tpot_ms=1e3 * spent / later if later > 0 else 0.0,
            prefill_tok_s=self.prefilled / self._prefill if self._prefill > 0 else 0.0,
            decode_tok_s=later / spent if spent > 0 else 0.0,
            rounds=self.rounds,
            tokens_per_round=later / self.rounds if self.rounds else 0.0,
            session_share=min(inside / wall, 1.0) if wall > 0 else 0.0,
            peak_rss_mb=peak_rss_mb(),
            devices={"target": target, "draft": None},
        )


def peak_rss_mb() -> float:
    """Largest resident size of this process so far, in MiB; 0 where the system does not tell."""
    try:
        for line in _STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1024
    except (OSError, ValueError):
        pass
    try:
        import resource
    except ImportError:
        return 0.0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1 << 20) if sys.platform == "darwin" else peak / 1024
