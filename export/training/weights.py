"""Float32 weights of a text bundle, whatever form its graph stores them in."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import helper, numpy_helper

from forerun.errors import UnsupportedError
from forerun.export.graph import EMBEDDING, HEAD_WEIGHT
from forerun.export.writer import WEIGHTS_NAME
from forerun.quant.affine import dequantize_affine, split_joined
from forerun.quant.blocks import Blocks, dequantize, unpack_codes, unpack_zeros
from forerun.quant.rows8 import Columns8, dequantize_columns
from forerun.runtime.manifest import Manifest, inside, load_manifest


class BundleWeights:
    """Reads initializers of a bundle's graph and undoes their quantization.

    Args:
        folder: a text bundle, float32 or quantized, whose graph has no branches.

    Attributes:
        manifest: of the bundle.
        heads: query heads.
        eps: added to the mean square in every RMS norm.

    Raises:
        UnsupportedError: the graph has branches, as one that can skip blocks has, or computes what
            drafters cannot be trained for.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        self.manifest: Manifest = load_manifest(self.folder)
        graph = inside(self.folder, self.manifest.lowerings["cpu"].graph)
        model = onnx.load(str(graph), load_external_data=False)
        if any(node.op_type == "If" for node in model.graph.node):
            raise UnsupportedError(
                f"{self.folder} can skip feed-forward blocks, and its weights cannot be read for "
                "training; give the bundle of the same weights without --skipping"
            )
        self._initializers = {t.name: t for t in model.graph.initializer}
        self._bits: dict[str, int] = {}
        # Blocks of the input of each matrix to which sums of its blocks are appended.
        self._joined: dict[str, int] = {}
        made = {output: node for node in model.graph.node for output in node.output}
        for node in model.graph.node:
            attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
            if node.op_type == "GroupQueryAttention":
                self.heads = int(attributes["num_heads"])
                if attributes.get("local_window_size", -1) > 0:
                    raise UnsupportedError("drafters cannot be trained for sliding windows yet")
            if node.op_type == "SimplifiedLayerNormalization":
                self.eps = float(attributes["epsilon"])
            if node.op_type == "MatMulNBits":
                self._bits[node.input[1]] = int(attributes["bits"])
                source = made.get(node.input[0])
                if source is not None and source.op_type == "Concat":
                    sums = made[source.input[1]]
                    blocks = next(t for t in model.graph.initializer if t.name == sums.input[1])
                    self._joined[node.input[1]] = blocks.dims[1]
            if node.op_type == "GatherBlockQuantized":
                self._bits[node.input[0]] = int(attributes["bits"])
        self._check_plain({node.op_type for node in model.graph.node})

    def array(self, name: str) -> np.ndarray:
        """The initializer as it is stored."""
        tensor = self._initializers[name]
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            return numpy_helper.to_array(tensor)
        offset = int(next(e.value for e in tensor.external_data if e.key == "offset"))
        dtype = helper.tensor_dtype_to_np_dtype(tensor.data_type)
        return np.memmap(self.folder / WEIGHTS_NAME, dtype, "r", offset, tuple(tensor.dims))

    def matrix(self, label: str) -> np.ndarray:
        """A projection as float32 [out, in], e.g. ``qkv.0`` or ``down.3``."""
        if label in self._bits:
            return self._dequantized(label)
        if f"{label}.codes" in self._initializers:
            return self._columns(label)
        return np.ascontiguousarray(self.array(label).T)

    def embedding(self) -> np.ndarray:
        """The embedding as float32 [vocab, hidden]."""
        if EMBEDDING in self._bits:
            return self._dequantized(EMBEDDING)
        return np.array(self.array(EMBEDDING))

    def head(self) -> np.ndarray:
        """The output head as float32 [vocab, hidden]: the embedding, or its copy in 8 bits."""
        own = f"{EMBEDDING}.{HEAD_WEIGHT}"
        return self._columns(own) if f"{own}.codes" in self._initializers else self.embedding()

    def _columns(self, name: str) -> np.ndarray:
        codes, scales = (np.asarray(self.array(f"{name}.{part}")) for part in ("codes", "columns"))
        return np.ascontiguousarray(dequantize_columns(Columns8(codes, scales)).T)

    def _dequantized(self, name: str) -> np.ndarray:
        bits = self._bits[name]
        scales = np.asarray(self.array(f"{name}.scales")).astype(np.float32)
        rows, blocks = scales.shape
        codes = unpack_codes(np.asarray(self.array(name)).reshape(rows, blocks, -1), bits)
        zeros = None
        if f"{name}.zeros" in self._initializers:
            packed = np.asarray(self.array(f"{name}.zeros")).reshape(rows, -1)
            zeros = unpack_zeros(packed, blocks, bits)
        q = Blocks(codes, scales, zeros, bits)
        if name in self._joined:
            return dequantize_affine(split_joined(q, self._joined[name]))
        return dequantize(q)

    def _check_plain(self, ops: set[str]) -> None:
        """Refuse what the torch target does not compute."""
        odd = ops & {"FastGelu", "Add"}
        names = self._initializers
        if odd or EMBEDDING not in names or HEAD_WEIGHT in names or "embedding_scale" in names:
            raise UnsupportedError(
                f"drafters can be trained for models of the llama kind with a tied embedding only, "
                f"not for {self.manifest.name}"
            )
