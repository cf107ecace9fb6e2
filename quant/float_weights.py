"""The float constants of a graph, read one at a time."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx
from onnx import helper, numpy_helper

from forerun.errors import SourceError
from forerun.export.writer import WEIGHTS_NAME

if TYPE_CHECKING:
    from pathlib import Path

    Factors = dict[str, tuple[np.ndarray, ...]]

_LEAST_SIDE = 16
# Weights that are looked at together when they are checked.
_CHUNK = 1 << 22


class FloatWeights:
    """Initializers of a graph by name.

    Args:
        model: the graph, its external weights not loaded.
        bundle: where its weights are.
        factors: of some of them, to be multiplied in; each of a shape that broadcasts.
    """

    def __init__(
        self, model: onnx.ModelProto, bundle: Path, factors: Factors | None = None
    ) -> None:
        self._file = bundle / WEIGHTS_NAME
        self._tensors = {t.name: t for t in model.graph.initializer}
        self._factors = factors or {}

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def is_matrix(self, name: str) -> bool:
        """Whether this is a constant that is large enough to be quantized."""
        tensor = self._tensors.get(name)
        return tensor is not None and len(tensor.dims) == 2 and min(tensor.dims) >= _LEAST_SIDE

    def shape(self, name: str) -> tuple[int, ...]:
        """Sides of a constant."""
        return tuple(self._tensors[name].dims)

    def array(self, name: str) -> np.ndarray:
        """A constant, mapped into memory if it is large."""
        tensor = self._tensors[name]
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            value = numpy_helper.to_array(tensor)
        else:
            offset = int(next(e.value for e in tensor.external_data if e.key == "offset"))
            dtype = helper.tensor_dtype_to_np_dtype(tensor.data_type)
            value = np.memmap(self._file, dtype, "r", offset, tuple(tensor.dims))
        for factor in self._factors.get(name, ()):
            value = value * factor
        return value

    def check(self) -> None:
        """Look for numbers that are none.

        Raises:
            SourceError: a constant has NaN or infinity; it names the constant.
        """
        for name in self._tensors:
            flat = self.array(name).reshape(-1)
            if flat.dtype.kind != "f":
                continue
            for start in range(0, len(flat), _CHUNK):
                finite = np.isfinite(flat[start : start + _CHUNK])
                if not finite.all():
                    count = int(np.count_nonzero(~np.isfinite(flat)))
                    raise SourceError(
                        f"the weights hold {count} NaN or infinity in {name!r}; "
                        "get the model again, or export another one"
                    )
