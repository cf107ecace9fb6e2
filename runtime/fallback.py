"""A runner whose device may fail: the text so far is read again elsewhere, and it goes on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from forerun.errors import DeviceError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from forerun.runtime.manifest import Manifest

_PIECE = 512


class FallbackRunner:
    """Passes every step to a runner; when its device fails, to another one from then on.

    The ids behind the KV cache are kept, so that the other runner can read them. What it computes
    may differ in the last bits, as between any two devices.

    Args:
        runner: on the device that may fail.
        reopen: opens the other one; called at most once.
        tell: told when and why the change was made.
    """

    def __init__(self, runner: Any, reopen: Callable[[], Any], tell: Callable[[str], None]) -> None:
        self._runner, self._reopen, self._tell = runner, reopen, tell
        self._moved, self._spent = False, 0.0
        self.arena = FollowedArena(self)

    @property
    def manifest(self) -> Manifest:
        """The model."""
        return self._runner.manifest

    @property
    def device(self) -> str:
        """Where the steps run now."""
        return self._runner.device

    @property
    def threads(self) -> int:
        """Of the sessions."""
        return self._runner.threads

    @property
    def session_time(self) -> float:
        """Seconds spent inside ONNX Runtime so far."""
        return self._spent + self._runner.session_time

    @property
    def cache(self) -> Any:
        """The KV cache of the present runner."""
        return self._runner.arena

    def step(
        self,
        ids: Sequence[int] | np.ndarray,
        *,
        want: Any = "last",
        parents: Sequence[int] | None = None,
    ) -> np.ndarray:
        """Run rows behind the committed history; arguments and errors as of `Runner.step`."""
        known = self.arena.known
        logits = self.guarded(known, lambda: self._runner.step(ids, want=want, parents=parents))
        if parents is None:
            known.extend(int(token) for token in ids)
            self.arena.drafted = []
        else:
            self.arena.drafted = [int(token) for token in ids]
        return logits

    def features(self) -> np.ndarray | None:
        """Tapped hidden states float32 [S, F] of all rows of the last step, None without taps."""
        return self._runner.features()

    def hidden(self) -> np.ndarray:
        """Hidden states float32 [R, D] of the last step's wanted rows."""
        return self._runner.hidden()

    def close(self) -> None:
        """Free the sessions."""
        self._runner.close()

    def guarded(self, known: Sequence[int], act: Callable[[], Any]) -> Any:
        """Do something with the runner; if its device fails, read `known` elsewhere and redo it."""
        try:
            return act()
        except DeviceError as error:
            if self._moved:
                raise
            self._move(known, error)
            return act()

    def _move(self, known: Sequence[int], error: DeviceError) -> None:
        self._tell(f"{error}; going on on the cpu, as was allowed")
        self._moved = True
        self._spent = self._runner.session_time
        self._runner.close()
        self._runner = self._reopen()
        for start in range(0, len(known), _PIECE):
            self._runner.step(known[start : start + _PIECE], want="none")


class FollowedArena:
    """The KV cache of a `FallbackRunner`: that of the runner in charge, and the ids in it.

    Attributes:
        known: ids of the committed rows.
        drafted: ids of the rows that wait for `commit`.
    """

    def __init__(self, owner: FallbackRunner) -> None:
        self._owner = owner
        self.known: list[int] = []
        self.drafted: list[int] = []

    @property
    def length(self) -> int:
        """Committed tokens."""
        return self._owner.cache.length

    @property
    def capacity(self) -> int:
        """Tokens that fit."""
        return self._owner.cache.capacity

    @property
    def most_rows(self) -> int:
        """Rows that one step may have."""
        return self._owner.cache.most_rows

    @property
    def is_endless(self) -> bool:
        """Whether older tokens make room for new ones."""
        return self._owner.cache.is_endless

    @property
    def nbytes(self) -> int:
        """Bytes reserved."""
        return self._owner.cache.nbytes

    def restorable(self, length: int) -> int:
        """How many of the first `length` tokens `rewind` gives back as they were read."""
        return self._owner.cache.restorable(length)

    def pretend(self, length: int) -> None:
        """Count as `length` tokens that nobody read, as `forerun.runtime.arena.Rows.pretend`."""
        self._owner.cache.pretend(length)
        self.known = [0] * length
        self.drafted = []

    def commit(self, rows: Sequence[int]) -> None:
        """Keep some of the pending rows, as `forerun.runtime.arena.Rows.commit`."""
        # After a failure there are no pending rows any more: those to keep are run as a chain.
        before = self._owner.device
        kept = [self.drafted[row] for row in rows if 0 <= row < len(self.drafted)]
        self._owner.guarded(
            [*self.known, *kept],
            lambda: self._owner.cache.commit(rows) if self._owner.device == before else None,
        )
        self.known += kept
        self.drafted = []

    def rewind(self, length: int) -> None:
        """Forget all but the first `length` tokens."""
        self._owner.cache.rewind(length)
        del self.known[length:]
        self.drafted = []
