"""A small builder of ONNX graphs whose large weights go to one external file as they come."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

WEIGHTS_NAME = "weights.bin"
# Smaller constants go into the graph itself; larger ones begin at a page of the weights file.
INLINE_BYTES = 4096
ALIGN = 4096
_IR_VERSION = 10
_OPSETS = (("", 21), ("com.microsoft", 1))


class GraphWriter:
    """Collects nodes; writes weights at once, so that one tensor is in memory at a time.

    Args:
        folder: where `WEIGHTS_NAME` is written.
    """

    def __init__(self, folder: Path) -> None:
        self._nodes: list[onnx.NodeProto] = []
        self._initializers: list[onnx.TensorProto] = []
        self._inputs: list[onnx.ValueInfoProto] = []
        self._outputs: list[onnx.ValueInfoProto] = []
        self._file = open(folder / WEIGHTS_NAME, "wb")  # noqa: SIM115 - closed by close()
        self._folder = folder
        self._count = 0

    def close(self) -> None:
        """Close the weights file."""
        self._file.close()

    def add(
        self, op: str, inputs: list[str], outputs: list[str] | None = None, **attributes: Any
    ) -> str:
        """Append a node and return the name of its first output.

        Args:
            op: operator type; contrib operators get their domain.
            inputs: names; an empty name leaves an optional input out.
            outputs: names; without them the node has one output with a fresh name.
            **attributes: of the node.
        """
        self._count += 1
        outputs = outputs or [f"v{self._count}"]
        domain = "com.microsoft" if op in _CONTRIB else ""
        while inputs and not inputs[-1]:
            inputs = inputs[:-1]
        node = helper.make_node(
            op, inputs, outputs, name=f"{op}_{self._count}", domain=domain, **attributes
        )
        self._nodes.append(node)
        return outputs[0]

    def rename(self, old: str, new: str) -> None:
        """Give a value that a node made another name, e.g. that of a graph output."""
        for node in self._nodes:
            for names in (node.input, node.output):
                for i, name in enumerate(names):
                    if name == old:
                        names[i] = new

    def constant(self, name: str, value: np.ndarray, inline: bool = True) -> str:
        """Store an array as initializer.

        Args:
            name: of the initializer.
            value: its data.
            inline: small arrays go into the graph itself, not into the weights file.
        """
        value = np.ascontiguousarray(value)
        if inline and value.nbytes < INLINE_BYTES:
            self._initializers.append(numpy_helper.from_array(value, name))
            return name
        offset = -(-self._file.tell() // ALIGN) * ALIGN
        self._file.write(b"\0" * (offset - self._file.tell()))
        # Not tofile: on a full disk it raises an OSError without the error number.
        self._file.write(value.reshape(-1).view(np.uint8).data)
        return self.alias(name, value.dtype, value.shape, offset)

    def alias(self, name: str, dtype: np.dtype, shape: tuple[int, ...], offset: int) -> str:
        """Declare an initializer over bytes that are in the weights file already."""
        tensor = TensorProto(name=name, data_type=helper.np_dtype_to_tensor_dtype(np.dtype(dtype)))
        tensor.dims.extend(shape)
        tensor.data_location = TensorProto.EXTERNAL
        length = int(np.prod(shape)) * np.dtype(dtype).itemsize
        for key, item in (("location", WEIGHTS_NAME), ("offset", offset), ("length", length)):
            tensor.external_data.add(key=key, value=str(item))
        self._initializers.append(tensor)
        return name

    def has_constant(self, name: str) -> bool:
        """Whether an initializer of that name was stored."""
        return any(t.name == name for t in self._initializers)

    def offset_of(self, name: str) -> int:
        """Offset of an external initializer in the weights file."""
        tensor = next(t for t in self._initializers if t.name == name)
        return int(next(e.value for e in tensor.external_data if e.key == "offset"))

    def input(self, name: str, dtype: str, shape: tuple[int | str, ...]) -> str:
        """Declare a graph input."""
        kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
        self._inputs.append(helper.make_tensor_value_info(name, kind, list(shape)))
        return name

    def output(self, name: str, dtype: str, shape: tuple[int | str, ...]) -> str:
        """Declare a graph output."""
        kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
        self._outputs.append(helper.make_tensor_value_info(name, kind, list(shape)))
        return name

    def save(self, graph_name: str) -> None:
        """Write the graph next to its weights."""
        graph = helper.make_graph(
            self._nodes, "forerun", self._inputs, self._outputs, self._initializers
        )
        model = helper.make_model(
            graph,
            opset_imports=[helper.make_opsetid(*item) for item in _OPSETS],
            ir_version=_IR_VERSION,
            producer_name="forerun",
        )
        self._file.flush()
        (self._folder / graph_name).write_bytes(model.SerializeToString())


_CONTRIB = frozenset(
    {
        "GroupQueryAttention",
        "RotaryEmbedding",
        "SkipSimplifiedLayerNormalization",
        "QuickGelu",
        "FusedMatMul",
        "MatMulNBits",
        "GatherBlockQuantized",
        "FastGelu",
        "MatMulIntegerToFloat",
    }
)
