"""One graph on one device with its own KV cache: `step` runs rows, and that is all."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import onnxruntime as ort

from forerun.devices.session import SessionOptions, open_session
from forerun.errors import BundleError, OptionError
from forerun.runtime.arena import KVArena, lazy_zeros
from forerun.runtime.manifest import inside
from forerun.runtime.rows import tree_bias, tree_depths

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from forerun.runtime.manifest import Manifest

Want = Literal["last", "all", "none"]
MAX_ROWS = 2048


class Runner:
    """Runs the rows of a step through a bundle's graph.

    The KV arrays are bound once, as input and as output, so a step neither allocates nor copies
    them. Prefill, decoding and the verification of trees are the same call.

    Args:
        manifest: of the bundle.
        folder: of the bundle.
        threads: of the session; None takes the best that was measured on this machine.
        spin: let waiting threads spin; False when another session runs at the same time.
        lowering: which form of the graph to run.

    Raises:
        BundleError: the bundle lacks the lowering, or its graph cannot be loaded.
    """

    def __init__(
        self,
        manifest: Manifest,
        folder: Path,
        *,
        threads: int | None = None,
        spin: bool = True,
        lowering: str = "cpu",
    ) -> None:
        if lowering not in manifest.lowerings:
            have = ", ".join(manifest.lowerings)
            raise BundleError(f"the bundle has no lowering {lowering!r}; it has {have}")
        self.manifest = manifest
        self.arena = KVArena(manifest.kv)
        self.session_time = 0.0
        self._form = manifest.lowerings[lowering]
        options = SessionOptions(threads=threads, spin=spin)
        self._session: Any = open_session(inside(folder, self._form.graph), options)
        self.threads = options.resolved_threads()
        self._binding: Any = self._session.io_binding()
        self._kept: list[ort.OrtValue] = []
        self._bind_cache()
        self._allocate_inputs()

    def step(
        self,
        ids: Sequence[int] | np.ndarray,
        *,
        want: Want | Sequence[int] = "last",
        parents: Sequence[int] | None = None,
    ) -> np.ndarray:
        """Run rows behind the committed history.

        Args:
            ids: token ids of the rows.
            want: which rows' logits to compute: the last one, all, none, or row numbers.
            parents: without it the rows are a chain and are committed. With it they are a tree:
                parents[i] is the row before row i, or -1 for the history; the rows stay pending
                until `arena.commit` picks those to keep.

        Returns:
            float32 logits [R, V] of the wanted rows, a view that is valid until the next step.

        Raises:
            ContextLimitError: the rows do not fit into the KV cache; nothing was run.
            OptionError: no rows, too many rows, or ids outside the vocabulary; nothing was run.
        """
        ids = np.asarray(ids, np.int64)
        self._check(ids)
        rows = self._wanted(want, len(ids))
        logits = self._bind_step(ids, rows, parents)
        started = time.perf_counter()
        self._session.run_with_iobinding(self._binding)
        self.session_time += time.perf_counter() - started
        if parents is None:
            self.arena.length += len(ids)
            self.arena.pending = 0
        else:
            self.arena.pending = len(ids)
        return logits[: 0 if want == "none" else len(rows)]

    def hidden(self) -> np.ndarray:
        """Hidden states float32 [R, D] of the last step's wanted rows.

        Raises:
            OptionError: the bundle was exported without them.
        """
        if self._hidden is None:
            raise OptionError("the bundle has no hidden states; export it with --hidden-states")
        return self._hidden[: self._wanted_count]

    def close(self) -> None:
        """Free the session and the cache."""
        self._binding = self._session = None
        self._kept.clear()

    def _check(self, ids: np.ndarray) -> None:
        if ids.ndim != 1 or not 1 <= len(ids) <= MAX_ROWS:
            raise OptionError(f"a step takes 1 to {MAX_ROWS} rows, got shape {ids.shape}")
        vocab = self.manifest.model.vocab
        if len(ids) == 1:
            low = high = ids[0]
        else:
            low, high = ids.min(), ids.max()
        if low < 0 or high >= vocab:
            raise OptionError(f"token ids must be in 0..{vocab - 1}, got {low}..{high}")
        self.arena.check_room(len(ids))

    @staticmethod
    def _wanted(want: Want | Sequence[int], count: int) -> np.ndarray:
        if isinstance(want, str) and want in ("last", "none"):
            return np.array([count - 1])
        if isinstance(want, str) and want == "all":
            return np.arange(count)
        rows = np.asarray(want, np.int64)
        if rows.ndim != 1 or not rows.size or rows.min() < 0 or rows.max() >= count:
            raise OptionError(f"wanted rows must be among the {count} rows, got {want!r}")
        return rows

    def _bind_cache(self) -> None:
        for role, array in self.arena.arrays.items():
            value = ort.OrtValue.ortvalue_from_numpy(array)
            self._kept.append(value)
            past = self._form.inputs[f"past_{role}"].name
            present = self._form.outputs[f"present_{role}"].name
            self._binding.bind_ortvalue_input(past, value)
            self._binding.bind_ortvalue_output(present, value)

    def _allocate_inputs(self) -> None:
        sizes = self.manifest.model
        self._ids = np.zeros((1, MAX_ROWS), np.int64)
        self._positions = np.zeros((1, MAX_ROWS), np.int64)
        self._rows = np.zeros(MAX_ROWS, np.int64)
        self._seqlens = np.zeros(1, np.int32)
        self._total = np.zeros((), np.int32)
        # Never written, so its pages are the kernel's zero page and cost no memory.
        self._no_bias = lazy_zeros((MAX_ROWS * self.arena.capacity,), "float32")
        self._bias = self._no_bias
        self._logits = np.zeros((1, sizes.vocab), np.float32)
        self._hidden = None
        if "hidden" in self._form.outputs:
            self._hidden = np.zeros((1, sizes.hidden), np.float32)
        self._wanted_count = 0
        self._shape = (0, 0)
        for role in ("seqlens", "total"):
            self._bind_input(role, getattr(self, f"_{role}"), getattr(self, f"_{role}").shape)

    def _bind_input(self, role: str, array: np.ndarray, shape: tuple[int, ...]) -> None:
        name = self._form.inputs[role].name
        self._binding.bind_input(name, "cpu", 0, array.dtype, shape, array.ctypes.data)

    def _bind_output(self, role: str, array: np.ndarray, rows: int) -> None:
        name = self._form.outputs[role].name
        shape = (1, rows, array.shape[1])
        self._binding.bind_output(name, "cpu", 0, array.dtype, shape, array.ctypes.data)

    def _bind_step(
        self, ids: np.ndarray, rows: np.ndarray, parents: Sequence[int] | None
    ) -> np.ndarray:
        count, past = len(ids), self.arena.length
        total = past + count
        self._ids[0, :count] = ids
        self._rows[: len(rows)] = rows
        self._seqlens[0] = total - 1
        self._total[...] = total
        if parents is None:
            self._bias = self._no_bias
            self._positions[0, :count] = np.arange(past, total)
        else:
            self._positions[0, :count] = past + tree_depths(parents, count)
            self._bias = tree_bias(parents, past)
        if self._shape != (count, len(rows)):
            self._bind_shapes(count, len(rows))
        self._bind_input("bias", self._bias, (1, 1, count, total))
        return self._logits

    def _bind_shapes(self, count: int, wanted: int) -> None:
        self._bind_input("ids", self._ids, (1, count))
        self._bind_input("positions", self._positions, (1, count))
        self._bind_input("rows", self._rows, (wanted,))
        if wanted > len(self._logits):
            self._logits = np.zeros((wanted, self._logits.shape[1]), np.float32)
            if self._hidden is not None:
                self._hidden = np.zeros((wanted, self._hidden.shape[1]), np.float32)
        self._bind_output("logits", self._logits, wanted)
        if self._hidden is not None:
            self._bind_output("hidden", self._hidden, wanted)
        self._shape, self._wanted_count = (count, wanted), wanted
