"""A graph whose inputs, outputs and KV cache are bound once to memory that stays."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnxruntime as ort

from forerun.devices.session import SessionOptions, open_session
from forerun.runtime.manifest import inside
from forerun.runtime.rows import MAX_ROWS
from forerun.runtime.skipping import FfnGate

if TYPE_CHECKING:
    from forerun.runtime.arena import Rows
    from forerun.runtime.manifest import Lowering, ModelSizes


class BoundGraph:
    """One session on one form of the graph; several can share a KV cache.

    The KV tensors are bound as input and as output, so the graph writes into them in place, on
    whichever device they are; a step neither allocates nor copies them.

    Args:
        form: the lowering to load.
        folder: of the bundle.
        options: of the session.
        arena: the KV cache.
        sizes: of the model.

    Attributes:
        gate: says which feed-forward blocks to skip; None if the graph runs all of them.
        seconds: spent inside ONNX Runtime.

    Raises:
        BundleError: the graph cannot be loaded.
        DeviceError: the device is not here, cannot run the whole graph, or lacks memory.
    """

    def __init__(
        self,
        form: Lowering,
        folder: Path,
        options: SessionOptions,
        arena: Rows,
        sizes: ModelSizes,
    ) -> None:
        self._form = form
        self._session: Any = open_session(inside(folder, form.graph), options)
        self._binding: Any = self._session.io_binding()
        self._kept = [self._bind_cache(role, value) for role, value in arena.values().items()]
        self._ids = np.zeros((1, MAX_ROWS), np.int64)
        self._positions = np.zeros((1, MAX_ROWS), np.int64)
        self._rows = np.zeros(MAX_ROWS, np.int64)
        self._seqlens = np.zeros(1, np.int32)
        self._total = np.zeros((), np.int32)
        self._logits = np.zeros((1, sizes.vocab), np.float32)
        self._hidden = np.zeros((1, sizes.hidden), np.float32) if "hidden" in form.outputs else None
        tapped = form.outputs.get("features")
        width = int(tapped.shape[-1]) if tapped else 0
        self._features = np.zeros((1, width), np.float32) if tapped else None
        self.gate = FfnGate(sizes.layers) if "ffn_flags" in form.inputs else None
        self._bind_gate()
        self._off_host = options.device != "cpu"
        self._shape = (0, 0)
        self.seconds = 0.0

    def run(
        self,
        ids: np.ndarray,
        positions: np.ndarray | int,
        rows: np.ndarray,
        past: int,
        bias: np.ndarray | None = None,
    ) -> np.ndarray:
        """Run rows behind `past` cached tokens.

        Args:
            ids: int64 [S].
            positions: int64 [S], or the position of the first row of a chain.
            rows: int64 [R], which rows' logits to compute.
            past: cached tokens.
            bias: float32 [1, 1, S, past + S], for a graph that takes one.

        Returns:
            float32 [R, V], a view that is valid until the next run.
        """
        count, wanted = len(ids), len(rows)
        if self._shape != (count, wanted):
            self._bind_shapes(count, wanted)
        self._ids[0, :count] = ids
        self._rows[:wanted] = rows
        self._place(positions, count)
        self._seqlens[0] = past + count - 1
        self._total[...] = past + count
        if self._off_host:
            # A device gets its copy of an input when it is bound, not when the graph runs.
            self._bind_inputs(count, wanted)
            self._bind_gate()
        if bias is not None:
            self._bind_input("bias", bias, bias.shape)
        self._compute()
        return self._logits[:wanted]

    @property
    def hidden(self) -> np.ndarray | None:
        """float32 [R, D] of the last run's wanted rows, if the graph gives them."""
        return None if self._hidden is None else self._hidden[: self._shape[1]]

    @property
    def features(self) -> np.ndarray | None:
        """float32 [S, F] of all rows of the last run, if the graph gives them."""
        return None if self._features is None else self._features[: self._shape[0]]

    def end_profile(self) -> Path:
        """Stop profiling and return the trace, of a session opened with `profile`."""
        return Path(self._session.end_profiling())

    def close(self) -> None:
        """Free the session."""
        self._binding = self._session = None
        self._kept.clear()

    def _place(self, positions: np.ndarray | int, count: int) -> None:
        """Write the positions of `count` rows into their input."""
        if isinstance(positions, int) and count > 1:
            positions = np.arange(positions, positions + count)
        self._positions[0, :count] = positions

    def _reserve(self, count: int, wanted: int) -> None:
        """Make room for the outputs of `count` rows, `wanted` of them with logits."""
        if wanted > len(self._logits):
            self._logits = np.zeros((wanted, self._logits.shape[1]), np.float32)
            if self._hidden is not None:
                self._hidden = np.zeros((wanted, self._hidden.shape[1]), np.float32)
        if self._features is not None and count > len(self._features):
            self._features = np.zeros((count, self._features.shape[1]), np.float32)

    def _compute(self) -> None:
        started = time.perf_counter()
        self._session.run_with_iobinding(self._binding)
        self.seconds += time.perf_counter() - started

    def _bind_cache(self, role: str, value: ort.OrtValue) -> ort.OrtValue:
        self._binding.bind_ortvalue_input(self._form.inputs[f"past_{role}"].name, value)
        self._binding.bind_ortvalue_output(self._form.outputs[f"present_{role}"].name, value)
        return value

    def _bind_input(self, role: str, array: np.ndarray, shape: tuple[int, ...]) -> None:
        name = self._form.inputs[role].name
        self._binding.bind_input(name, "cpu", 0, array.dtype, shape, array.ctypes.data)

    def _bind_output(self, role: str, array: np.ndarray, rows: int) -> None:
        name, shape = self._form.outputs[role].name, (1, rows, array.shape[1])
        self._binding.bind_output(name, "cpu", 0, array.dtype, shape, array.ctypes.data)

    def _bind_inputs(self, count: int, wanted: int) -> None:
        self._bind_input("ids", self._ids, (1, count))
        self._bind_input("positions", self._positions, (1, count))
        self._bind_input("rows", self._rows, (wanted,))
        self._bind_input("seqlens", self._seqlens, (1,))
        self._bind_input("total", self._total, ())

    def _bind_gate(self) -> None:
        if self.gate is None:
            return
        for role, array in (
            ("ffn_flags", self.gate.flags),
            ("skip_tau", self.gate.tau),
            ("skip_run", self.gate.run),
        ):
            self._bind_input(role, array, array.shape)
        name, ran = self._form.outputs["ffn_ran"].name, self.gate.ran
        self._binding.bind_output(name, "cpu", 0, ran.dtype, ran.shape, ran.ctypes.data)

    def _bind_shapes(self, count: int, wanted: int) -> None:
        self._reserve(count, wanted)
        self._bind_inputs(count, wanted)
        self._bind_outputs(slice(0, wanted), slice(0, count))
        self._shape = (count, wanted)

    def _bind_outputs(self, wanted: slice, rows: slice) -> None:
        """Bind what is computed of the wanted rows and of all rows, to these parts of the room."""
        for role, array, part in (
            ("logits", self._logits, wanted),
            ("hidden", self._hidden, wanted),
            ("features", self._features, rows),
        ):
            if array is not None:
                self._bind_output(role, array[part], part.stop - part.start)
