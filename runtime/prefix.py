"""The ids whose keys and values a runner holds, so that a later prompt can reuse them."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any, Literal, Protocol

import numpy as np

from forerun.runtime.manifest import Manifest


class Arena(Protocol):
    """The part of the KV arena a session needs."""

    @property
    def length(self) -> int:
        """Rows in use, in tokens."""
        ...

    @property
    def capacity(self) -> int:
        """Rows there are, in tokens."""
        ...

    def rewind(self, length: int) -> Any:
        """Forget every row from `length` on."""
        ...


class StepRunner(Protocol):
    """The part of `Runner` a session needs; tests put a scripted one in its place."""

    @property
    def manifest(self) -> Manifest:
        """The model."""
        ...

    @property
    def arena(self) -> Any:
        """Its KV cache, see `Arena`."""
        ...

    @property
    def session_time(self) -> float:
        """Seconds spent inside ONNX Runtime so far."""
        ...

    def step(
        self, ids: Sequence[int] | np.ndarray, *, want: Literal["last", "all", "none"] = "last"
    ) -> np.ndarray:
        """Run rows after the history; float32 [R, V] logits, valid until the next step."""
        ...


class PrefixCache:
    """A runner together with the ids that are in its KV arena, shared by all its sessions.

    Args:
        runner: its arena is taken as empty or filled by this object alone.

    Attributes:
        ids: what is cached; row n of the arena belongs to ids[n].
        busy: held while a generation runs.
    """

    def __init__(self, runner: StepRunner) -> None:
        self.runner = runner
        self.ids: list[int] = []
        self.busy = threading.Lock()
        self._step = runner.step
        self._arena: Arena = runner.arena
        self._arena.rewind(0)

    @property
    def capacity(self) -> int:
        """Tokens the arena holds."""
        return self._arena.capacity

    def keep_common(self, ids: Sequence[int]) -> int:
        """Rewind to the longest common prefix with `ids`, short of their last token.

        The last token always runs again, since its logits are wanted.

        Returns:
            How many tokens are still cached.
        """
        self.settle()
        length = min(_common_prefix(self.ids, ids), max(len(ids) - 1, 0))
        self.rewind(length)
        return length

    def feed(self, ids: list[int], want: Literal["last", "none"] = "last") -> np.ndarray:
        """Run `ids` after what is cached; logits float32 [R, V], valid until the next step."""
        logits = self._step(ids, want=want)
        self.ids.extend(ids)
        return logits

    def rewind(self, length: int) -> None:
        """Forget every token from `length` on."""
        if length < self._arena.length:
            self._arena.rewind(length)
        del self.ids[length:]

    def settle(self) -> None:
        """Bring arena and ids back in line after a step that was broken off."""
        self.rewind(min(len(self.ids), self._arena.length))


def _common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    length = min(len(a), len(b))
    if a[:length] == b[:length]:
        return length
    differs = np.asarray(a[:length], np.int64) != np.asarray(b[:length], np.int64)
    return int(differs.argmax())
