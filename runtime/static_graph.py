"""One query width of a static graph, its inputs, outputs and KV cache bound once."""

from __future__ import annotations

import dataclasses
import time
from typing import TYPE_CHECKING, Any

import numpy as np
import onnxruntime as ort

from forerun.devices.session import open_session
from forerun.runtime.manifest import inside
from forerun.runtime.pieces import fill_mask

if TYPE_CHECKING:
    from pathlib import Path

    from forerun.devices.session import SessionOptions
    from forerun.runtime.arena import KVArena
    from forerun.runtime.manifest import Lowering
    from forerun.runtime.pieces import Piece


class StaticGraph:
    """A session of `width` rows; several widths share a KV cache.

    Roles of the inputs, with S for the width: `embeddings` float32 [1, S, D], `positions` int64
    [1, S], `mask` float32 [S, capacity] (added to the scores), `slots` int64 [heads * S, 1]
    (where the rows' keys and values go in a cache seen as [heads * capacity, head_dim], head by
    head), and the cache as in every lowering. All outputs are for all S rows.

    Args:
        form: the lowering.
        folder: of the bundle.
        options: of the session; they name the device.
        arena: the KV cache.
        width: rows of every run.

    Attributes:
        outputs: role to array [width, ..], of every output but the cache.
        seconds: spent inside ONNX Runtime.

    Raises:
        BundleError: the graph cannot be loaded.
        DeviceError: the device is not here, or cannot run the whole graph.
    """

    def __init__(
        self,
        form: Lowering,
        folder: Path,
        options: SessionOptions,
        arena: KVArena,
        width: int,
    ) -> None:
        layout = arena.layout
        axes = {"S": width, "U": width * layout.heads}
        options = dataclasses.replace(options, axes=axes)
        self._session: Any = open_session(inside(folder, form.graph), options)
        self._binding: Any = self._session.io_binding()
        self._kept: list[ort.OrtValue] = []
        for role, value in arena.values().items():
            self._binding.bind_ortvalue_input(form.inputs[f"past_{role}"].name, value)
            self._binding.bind_ortvalue_output(form.outputs[f"present_{role}"].name, value)
            self._kept.append(value)
        self._inputs = {
            role: self._bound(self._binding.bind_ortvalue_input, spec, axes)
            for role, spec in form.inputs.items()
            if not role.startswith("past_")
        }
        self.outputs = {
            role: self._bound(self._binding.bind_ortvalue_output, spec, axes)[0]
            for role, spec in form.outputs.items()
            if not role.startswith("present_")
        }
        # Slot of the first token of each head in a cache seen as [heads * capacity, head_dim].
        self._heads = np.arange(layout.heads)[:, None] * layout.capacity
        self._columns = np.arange(width)
        self.seconds = 0.0

    def run(
        self,
        embeddings: np.ndarray,
        positions: np.ndarray,
        piece: Piece,
        past: int,
        seen: np.ndarray,
    ) -> None:
        """Run a piece of a step; afterwards `outputs` holds its rows, then padding.

        Args:
            embeddings: float32 [rows of the step, D].
            positions: int64 [rows of the step].
            piece: which rows.
            past: committed tokens.
            seen: which rows of the step each row sees, bool [rows, rows].
        """
        # Padding repeats the last row, so that it is ordinary in every respect but its slot.
        rows = np.minimum(self._columns + piece.start, piece.stop - 1)
        self._inputs["embeddings"][0] = embeddings[rows]
        self._inputs["positions"][0] = positions[rows]
        slots = self._heads + (past + piece.start + self._columns)
        self._inputs["slots"][:, 0] = slots.ravel()
        fill_mask(self._inputs["mask"], piece, past, seen)
        started = time.perf_counter()
        self._session.run_with_iobinding(self._binding)
        self.seconds += time.perf_counter() - started

    def close(self) -> None:
        """Free the session."""
        self._binding = self._session = None
        self._kept.clear()

    def _bound(self, bind: Any, spec: Any, axes: dict[str, int]) -> np.ndarray:
        shape = [axes[axis] if isinstance(axis, str) else int(axis) for axis in spec.shape]
        array = np.zeros(shape, spec.dtype)
        value = ort.OrtValue.ortvalue_from_numpy(array)
        bind(spec.name, value)
        self._kept.append(value)
        return array
