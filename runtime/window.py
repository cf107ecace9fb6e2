"""A KV cache of fixed size for texts without end: the first tokens and a window of the newest.

Attention puts its surplus on the very first tokens whatever they say; with those kept, a model
stays itself however long the text becomes (StreamingLLM, Xiao 2023). What was evicted is forgotten.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import numpy as np

from forerun.errors import ContextLimitError, OptionError
from forerun.runtime.arena import KVArena
from forerun.runtime.kv_request import A_WINDOW, LEAST_WINDOW, SINKS, check_window, no_drafting
from forerun.runtime.rows import MAX_ROWS

if TYPE_CHECKING:
    from forerun.runtime.manifest import KVLayout, Manifest, Rotary

__all__ = ["LEAST_WINDOW", "SINKS", "WindowArena", "open_window"]

# Of the window: how much is evicted at once, and how many rows a step may have at most. Small
# steps and evictions keep more of the window, large ones move it less often.
_EVICTED, _STEP = 8, 4
# Stands for a text without end.
_ENDLESS = 1 << 31


class WindowArena(KVArena):
    """The first `sinks` tokens and the newest ones, in `layout.capacity` rows.

    Positions are those within the cache: when tokens are evicted, the keys behind them move
    forward and are rotated back by as many positions. A text may be rewound within the window,
    but not behind what was evicted: then it must be read again.

    Args:
        layout: with a capacity of `sinks` and the window together.
        rotary: the model's rotation of the keys.
        sinks: first tokens that are always kept.

    Attributes:
        evicted: tokens that are gone.
    """

    is_endless = True

    def __init__(self, layout: KVLayout, rotary: Rotary, sinks: int = SINKS) -> None:
        super().__init__(layout)
        self.sinks, self.evicted = sinks, 0
        self._rotary = rotary
        window = layout.capacity - sinks
        self._block = max(1, window // _EVICTED)
        self._most = min(max(1, window // _STEP), MAX_ROWS)

    @property
    def capacity(self) -> int:
        """Tokens that fit: a number that no text reaches, since there is no end."""
        return _ENDLESS

    @property
    def used(self) -> int:
        """Rows of the tensors that are occupied."""
        return self.length - self.evicted

    @property
    def position(self) -> int:
        """Position of the next token, counted within the cache."""
        return self.used

    @property
    def most_rows(self) -> int:
        """Rows that one step may have."""
        return self._most

    def make_room(self, rows: int) -> None:
        """Make room for a step's rows, evicting the oldest of the window if need be.

        Raises:
            ContextLimitError: more rows than `most_rows`; nothing was evicted.
        """
        if rows > self._most:
            raise ContextLimitError(
                f"a step of {rows} rows is too wide for a window of "
                f"{self.layout.capacity - self.sinks} tokens; it may have {self._most}"
            )
        over = self.used + rows - self.layout.capacity
        if over > 0:
            self._evict(min(max(over, self._block), self.used - self.sinks))

    def rewind(self, length: int) -> None:
        """Forget all but the first `length` tokens.

        Raises:
            OptionError: that many tokens were never read.
            ContextLimitError: tokens among them were evicted.
        """
        gone = self.sinks + self.evicted
        if self.evicted and 0 < length < gone:
            raise ContextLimitError(
                f"cannot rewind to {length}: tokens up to {gone} were evicted; read the text again"
            )
        super().rewind(length)
        if length == 0:
            self.evicted = 0

    def restorable(self, length: int) -> int:
        """None of the first `length` tokens if some of them were evicted, else all."""
        return 0 if self.evicted and length < self.sinks + self.evicted else length

    def pretend(self, length: int) -> None:
        """Count as `length` tokens of zeros, as many of them in the window as fit."""
        self.evicted = max(length - self.layout.capacity, 0)
        for array in self.arrays.values():
            array[:, :, : length - self.evicted] = 0
        self.length, self.pending = length, 0

    def commit(self, rows: object) -> None:
        """Refuse: see `no_drafting`.

        Raises:
            OptionError: always.
        """
        raise OptionError(no_drafting(A_WINDOW))

    def _evict(self, count: int) -> None:
        """Drop the oldest `count` tokens of the window, and close the gap; all if broken off."""
        try:
            self._close_gap(count)
        except BaseException:
            # Nobody knows which rows were moved.
            self.length = self.pending = self.evicted = 0
            raise

    def _close_gap(self, count: int) -> None:
        start, stop = self.sinks + count, self.used
        target = slice(self.sinks, stop - count)
        turns = [_turn(frequencies, count) for frequencies in self._rotary.frequencies]
        for role, array in self.arrays.items():
            part, _, layer = role.partition(".")
            rows = array[0, :, start:stop]
            if part == "key":
                rows = _turned_back(rows, *turns[self._rotary.layers[int(layer)]])
            array[0, :, target] = rows
        self.evicted += count


def open_window(manifest: Manifest, rows: int, sinks: int = SINKS) -> WindowArena:
    """The cache of a bundle with a window.

    Args:
        manifest: whose `kv` is the layout that will run.
        rows: of sinks and window together.
        sinks: first tokens that are always kept.

    Raises:
        OptionError: too few or too many rows, or a layout whose keys cannot be rotated.
        BundleError: the bundle does not say how keys are rotated.
    """
    rotary = check_window(manifest, rows, sinks)
    return WindowArena(dataclasses.replace(manifest.kv, capacity=rows), rotary, sinks)


def _turn(frequencies: tuple[float, ...], count: int) -> tuple[np.ndarray, np.ndarray]:
    angle = count * np.asarray(frequencies, np.float64)
    return np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)


def _turned_back(keys: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
    """Rotate keys [heads, rows, head_dim] back by the angle of cosines and sines [head_dim / 2]."""
    half = keys.shape[-1] // 2
    low, high = keys[..., :half].astype(np.float32), keys[..., half:].astype(np.float32)
    return np.concatenate([low * cos + high * sin, high * cos - low * sin], axis=-1)
