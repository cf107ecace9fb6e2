"""A target that replays what the real one said, in a set time: a stand-in for an accelerator.

Verification needs the target's outputs along the committed text only, and those do not depend on
the device. So a runner that looks them up and then waits, without computing, behaves exactly like
a device that takes this long for a step and leaves the processor to the drafter. Every figure that
is made with it is a simulation and is called so.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from forerun.errors import ForerunError, OptionError
from forerun.runtime.prefix import PlainRows

if TYPE_CHECKING:
    from forerun.runtime.drafting.rounds import Rounds
    from forerun.runtime.manifest import Manifest
    from forerun.runtime.prefix import PrefixCache

RowsCost = Callable[[int], float]

# A sleep ends up to a tenth of a millisecond late; the rest of it is waited for awake.
_AWAKE_SECONDS = 1e-4
_CERTAIN = 1e4


@dataclass(frozen=True)
class Recording:
    """One answer of the real target.

    Attributes:
        prompt: ids, at least one.
        answer: ids that plain decoding gave, at least one.

    Raises:
        OptionError: one of them is empty.
    """

    prompt: tuple[int, ...]
    answer: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.prompt or not self.answer:
            raise OptionError("a recording needs a prompt and an answer of at least one token each")


def flat(rows: int) -> float:
    """The rows' cost r(n) of a device that verifies any number of them in the time of one."""
    return 1.0


class ReplayArena(PlainRows):
    """Counts tokens where a KV cache would hold them.

    Attributes:
        capacity: tokens that fit.
        length: tokens held.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.length = 0

    def rewind(self, length: int) -> None:
        """Forget every token from `length` on."""
        if not 0 <= length <= self.length:
            raise OptionError(f"cannot rewind to {length}: {self.length} tokens are cached")
        self.length = length

    def commit(self, rows: Sequence[int]) -> None:
        """Never needed, since there are no trees."""
        raise OptionError(f"a replayed target verifies chains only, got tree rows {list(rows)}")


class ReplayTarget:
    """A step runner that gives recorded tokens after a set time.

    The row at a position gets logits that leave no choice but the recorded next token. That is
    right for rows behind the recorded text, and what rows behind wrong drafts get is never read.

    Args:
        manifest: of the recorded model.
        seconds: time of a step of one row.
        rows_cost: r(n), the time of a step of n rows in units of `seconds`.

    Attributes:
        session_time: seconds of all steps, prompts left out.
        steps: number of those steps.
    """

    def __init__(self, manifest: Manifest, seconds: float, rows_cost: RowsCost = flat) -> None:
        self.manifest = manifest
        self.arena = ReplayArena(manifest.kv.capacity)
        self.session_time = 0.0
        self.steps = 0
        self._seconds, self._rows_cost = seconds, rows_cost
        self._text: tuple[int, ...] = ()
        self._free = 0
        self._logits = np.zeros((1, manifest.model.vocab), np.float32)
        self._marked: list[tuple[int, int]] = []

    def load(self, recording: Recording) -> None:
        """Replay this recording from now on. Its prompt is read at once: decoding is simulated."""
        self._text = recording.prompt + recording.answer
        self._free = len(recording.prompt)
        self.arena.rewind(0)

    def step(
        self,
        ids: Sequence[int] | np.ndarray,
        *,
        want: str = "last",
        parents: Sequence[int] | None = None,
    ) -> np.ndarray:
        """See `Runner.step`.

        Raises:
            OptionError: the rows are a tree.
        """
        started = time.perf_counter()
        if parents is not None:
            raise OptionError("a replayed target verifies chains only; take a drafter of chains")
        past, count = self.arena.length, len(ids)
        self.arena.length += count
        first = 0 if want == "all" else count - 1
        logits = self._rows(range(past + first + 1, past + count + 1))
        if past >= self._free:
            wait_until(started + self._seconds * self._rows_cost(count))
            self.session_time += time.perf_counter() - started
            self.steps += 1
        return logits

    def features(self) -> None:
        """A recording has no hidden states."""

    def close(self) -> None:
        """Nothing is held."""

    def _rows(self, positions: Sequence[int]) -> np.ndarray:
        """Logits float32 [R, V] for the tokens at these positions; beyond the text all are 0."""
        if len(positions) > len(self._logits):
            self._logits = np.zeros((len(positions), self._logits.shape[1]), np.float32)
            self._marked = []
        for place in self._marked:
            self._logits[place] = 0.0
        inside = [at for at in positions if at < len(self._text)]
        self._marked = [(row, self._text[at]) for row, at in enumerate(inside)]
        for place in self._marked:
            self._logits[place] = _CERTAIN
        return self._logits[: len(positions)]


def wait_until(deadline: float) -> None:
    """Sleep up to a moment of `time.perf_counter`, without keeping others from the processor."""
    left = deadline - time.perf_counter() - _AWAKE_SECONDS
    if left > 0:
        time.sleep(left)
    while time.perf_counter() < deadline:
        time.sleep(0)  # hands over the interpreter's lock, which the drafter may wait for


def play(
    target: ReplayTarget,
    cache: PrefixCache,
    rounds: Rounds | None,
    recording: Recording,
    warm: Callable[[], None] = lambda: None,
) -> float:
    """Decode a recording with a schedule, or plainly without one.

    Args:
        target: replays it.
        cache: of the target.
        rounds: the schedule, on the same cache.
        recording: what is to be said.
        warm: called when the prompt is read, before the clock starts.

    Returns:
        Seconds from the first token on, whose time belongs to the prompt.

    Raises:
        ForerunError: the schedule said something else than the recording.
    """
    cache.rewind(0)
    target.load(recording)
    cache.feed(list(recording.prompt))
    start, end = len(recording.prompt), len(recording.prompt) + len(recording.answer)
    tokens = [*recording.prompt, recording.answer[0]]
    warm()
    started = time.perf_counter()
    try:
        while len(tokens) < end:
            if rounds is None:
                tokens.append(_pick(cache.feed(tokens[-1:])[0], ()))
            else:
                said = rounds.round(tokens, _pick, end - len(tokens))
                tokens += [token for token, _ in said]
        seconds = time.perf_counter() - started
    finally:
        if rounds is not None:
            rounds.finish(len(tokens))
    if tuple(tokens[start:]) != recording.answer:
        raise ForerunError("a schedule changed the replayed text; the simulation is void")
    return seconds


def _pick(logits: np.ndarray, path: Sequence[int]) -> int:
    return int(logits.argmax())
