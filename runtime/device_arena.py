"""A KV cache in the memory of a GPU: nothing of it ever crosses to the host."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import numpy as np

from forerun.devices.plugins import allocate, reason
from forerun.devices.providers import find_provider
from forerun.devices.session import open_session
from forerun.errors import BundleError, DeviceError, ForerunError
from forerun.runtime.arena import Rows
from forerun.runtime.manifest import inside

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    import onnxruntime as ort

    from forerun.devices.session import SessionOptions
    from forerun.runtime.manifest import Manifest

_MOVE = "{}-move"


class DeviceArena(Rows):
    """Keys and values of all layers on a device.

    The tensors are made when a graph is first bound to them, and again after the device failed.
    Committing a path of a tree runs a small graph that moves the rows where they lie.

    Args:
        manifest: of the bundle.
        folder: of the bundle.
        options: of the sessions; they name the device.
        lowering: the form of the graph, which tells dtype and shape of the tensors there.
    """

    def __init__(
        self, manifest: Manifest, folder: Path, options: SessionOptions, lowering: str
    ) -> None:
        super().__init__(manifest.kv)
        self._row = find_provider(options.device)
        self._options, self._folder = options, folder
        self._name = _MOVE.format(lowering)
        self._form = manifest.lowerings.get(self._name)
        self._specs = {
            role.removeprefix("past_"): spec
            for role, spec in manifest.lowerings[lowering].inputs.items()
            if role.startswith("past_")
        }
        self._values: dict[str, ort.OrtValue] = {}
        self._mover: Any = None

    @property
    def nbytes(self) -> int:
        """Bytes reserved on the device."""
        return sum(int(np.prod(s.shape)) * np.dtype(s.dtype).itemsize for s in self._specs.values())

    def values(self) -> dict[str, ort.OrtValue]:
        """The tensors on the device.

        Raises:
            DeviceError: there is no room for them.
        """
        if not self._values:
            self._values = {
                role: allocate(self._row, spec.shape, spec.dtype)
                for role, spec in self._specs.items()
            }
        return self._values

    @contextlib.contextmanager
    def guarded(self) -> Iterator[None]:
        """Turn any failure of the device into one error, and free what was on it.

        Raises:
            DeviceError: the device ran out of memory, was lost, or refused to compute. The cache
                is empty then, and the next step opens everything anew.
        """
        try:
            yield
        except ForerunError:
            raise
        except Exception as error:  # ONNX Runtime raises a class of its own for each status code
            self._mover, self._values = None, {}
            self.length = self.pending = 0
            self.epoch += 1
            raise DeviceError(
                f"{self._row.name} failed in the middle of a step ({reason(error)}); what it had "
                "read is lost. Try again, with a shorter text if its memory is full, or on the cpu"
            ) from error

    def move(self, source: np.ndarray, start: int) -> None:
        """Copy rows within every tensor, on the device.

        Raises:
            BundleError: the bundle has no graph for it.
            DeviceError: the device failed.
        """
        count, heads = len(source), self.layout.heads
        target = np.zeros((1, heads, count, 3), np.int64)
        target[..., 1] = np.arange(heads)[:, None]
        target[..., 2] = np.arange(start, start + count)
        with self.guarded():
            session, binding = self._open_mover()
            binding.bind_cpu_input("source", source)
            binding.bind_cpu_input("target", target)
            session.run_with_iobinding(binding)

    def _open_mover(self) -> Any:
        if self._mover is None:
            if self._form is None:
                raise BundleError(
                    f"the bundle has no lowering {self._name!r}, so trees cannot be committed on "
                    f"{self._row.name}; export it again"
                )
            session: Any = open_session(inside(self._folder, self._form.graph), self._options)
            binding = session.io_binding()
            for role, value in self.values().items():
                binding.bind_ortvalue_input(self._form.inputs[f"past_{role}"].name, value)
                binding.bind_ortvalue_output(self._form.outputs[f"present_{role}"].name, value)
            self._mover = session, binding
        return self._mover
