"""The ids whose keys and values a runner holds, so that a later prompt can reuse them."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from typing import Any, Literal, Protocol

import numpy as np

from forerun.errors import BusyError
from forerun.runtime.manifest import Manifest
from forerun.runtime.rows import MAX_ROWS


class Arena(Protocol):
    """The part of the KV arena a session needs; see `forerun.runtime.arena.Rows`."""

    @property
    def length(self) -> int:
        """Rows in use, in tokens."""
        ...

    @property
    def capacity(self) -> int:
        """Rows there are, in tokens."""
        ...

    @property
    def most_rows(self) -> int:
        """Rows that one step may have."""
        ...

    @property
    def is_endless(self) -> bool:
        """Whether older tokens make room for new ones, so that a text never ends."""
        ...

    def commit(self, rows: Sequence[int]) -> Any:
        """Keep some of the rows of a tree, drop the others."""
        ...

    def restorable(self, length: int) -> int:
        """How many of the first `length` tokens `rewind` gives back as they were read."""
        ...

    def rewind(self, length: int) -> Any:
        """Forget every row from `length` on."""
        ...


class PlainRows:
    """The part of `Arena` of a cache without tricks: it ends, and gives back every row."""

    most_rows = MAX_ROWS
    is_endless = False

    def restorable(self, length: int) -> int:
        """All of them."""
        return length


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
        self,
        ids: Sequence[int] | np.ndarray,
        *,
        want: Literal["last", "all", "none"] = "last",
        parents: Sequence[int] | None = None,
    ) -> np.ndarray:
        """Run rows after the history; float32 [R, V] logits, valid until the next step."""
        ...

    def features(self) -> np.ndarray | None:
        """Tapped hidden states float32 [S, F] of the last step's rows, None without taps."""
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
        # An arena with a window evicts for every step, so its steps are short.
        self._most_rows = self._arena.most_rows
        self._arena.rewind(0)

    @property
    def capacity(self) -> int:
        """Tokens the arena holds."""
        return self._arena.capacity

    @property
    def is_endless(self) -> bool:
        """Whether a text never ends, since older tokens are evicted."""
        return self._arena.is_endless

    def keep_common(self, ids: Sequence[int]) -> int:
        """Rewind to the longest common prefix with `ids`, short of their last token.

        The last token always runs again, since its logits are wanted, and so do those that the
        cache cannot give back as they were read.

        Returns:
            How many tokens are still cached.
        """
        self.settle()
        self._go_back(min(common_prefix(self.ids, ids), max(len(ids) - 1, 0)))
        return len(self.ids)

    def feed(self, ids: list[int], want: Literal["last", "none"] = "last") -> np.ndarray:
        """Run `ids` after what is cached; logits float32 [R, V], valid until the next step."""
        while len(ids) > self._most_rows:
            self.feed(ids[: self._most_rows], "none")
            ids = ids[self._most_rows :]
        logits = self._step(ids, want=want)
        self.ids.extend(ids)
        return logits

    def try_rows(self, ids: Sequence[int], parents: Sequence[int] | None = None) -> np.ndarray:
        """Run rows that may be wrong; none of them counts as cached until `accept`.

        Args:
            ids: of the rows.
            parents: without it the rows are a chain, with it a tree, as in `Runner.step`.

        Returns:
            float32 logits [S, V] of all rows, valid until the next step.
        """
        if parents is None:
            return self._step(ids, want="all")
        return self._step(ids, want="all", parents=parents)

    def accept(self, ids: Sequence[int], rows: Sequence[int] | None = None) -> None:
        """Keep some of the rows that `try_rows` ran and drop the others.

        Args:
            ids: of the rows to keep, in order.
            rows: their numbers, if they were a tree; of a chain the first ones are kept.
        """
        if rows is not None:
            self._arena.commit(rows)
        elif len(self.ids) + len(ids) < self._arena.length:
            self._arena.rewind(len(self.ids) + len(ids))
        self.ids.extend(ids)

    def rewind(self, length: int) -> None:
        """Forget every token from `length` on.

        Raises:
            ContextLimitError: the cache evicted tokens before it.
        """
        if length < self._arena.length:
            self._arena.rewind(length)
        del self.ids[length:]

    @contextlib.contextmanager
    def reserved(self) -> Iterator[None]:
        """Keep generations away meanwhile.

        Raises:
            BusyError: one is running.
        """
        if not self.busy.acquire(blocking=False):
            raise busy_error()
        try:
            yield
        finally:
            self.busy.release()

    def settle(self) -> None:
        """Bring arena and ids back in line after a step that was broken off."""
        self._go_back(min(len(self.ids), self._arena.length))

    def _go_back(self, length: int) -> None:
        if length < self._arena.length:
            length = self._arena.restorable(length)
        self.rewind(length)


def busy_error() -> BusyError:
    """The error of a second generation on a model that has one running."""
    return BusyError(
        "a generation is still running on this model; finish, close or cancel it first"
    )


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """How many first ids two sequences share."""
    length = min(len(a), len(b))
    if list(a[:length]) == list(b[:length]):
        return length
    differs = np.asarray(a[:length], np.int64) != np.asarray(b[:length], np.int64)
    return int(differs.argmax())
