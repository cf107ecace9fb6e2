"""Storing the matrices of a bundle in a format, within a budget of bytes if there is one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx

from forerun.errors import UnsupportedError
from forerun.export.graph import HEAD_WEIGHT
from forerun.export.tree import TREE_GRAPH_NAME, write_tree_graph
from forerun.export.writer import INLINE_BYTES
from forerun.quant.affine import find_grid
from forerun.quant.calibration import calibration_pieces, input_moments
from forerun.quant.float_weights import FloatWeights
from forerun.quant.methods import LEAST_BLOCK, METHODS, Method, unpack
from forerun.quant.rewrite import GraphRewriter
from forerun.quant.rows8 import quantize_rows
from forerun.quant.sensitivity import (
    Candidate,
    check_budget,
    choose_wide,
    file_bytes,
    measure_harm,
    product_error,
)
from forerun.quant.smooth import smooth_factors
from forerun.runtime.manifest import inside

if TYPE_CHECKING:
    from collections.abc import Callable

    from forerun.quant.formats import WeightFormat
    from forerun.quant.methods import Stored
    from forerun.runtime.manifest import Manifest

    Progress = Callable[[str, int, int | None], None]

_WIDE = "least8"
# How `export` multiplies by a table that is also the embedding.
_TIED_HEAD = "FusedMatMul"
# Matrices of constants that products share, and constants that are small one by one.
_SLACK = 1 << 18
_JUDGED_PIECES = 2
# The rows of a tied table are also the embedding, where no channel matters more than another; its
# share against the head's moments, as tried: 0 gives a KL of 0.057, 0.1 to 1 give 0.041 to 0.044.
_AS_EMBEDDING = 0.3
# Rows that are looked at together for 4-bit blocks a matrix is made of.
_GRID_ROWS = 1 << 12


class WeightStore:
    """Stores the matrices of one float32 bundle.

    Args:
        manifest: of the bundle.
        bundle: its folder.
        form: how to store them.
        report: called with (stage, done, total).

    Raises:
        SourceError: the weights hold NaN or infinity.
        UnsupportedError: a matrix cannot be cut into blocks; it names the matrix.
    """

    def __init__(
        self, manifest: Manifest, bundle: Path, form: WeightFormat, report: Progress
    ) -> None:
        self._manifest, self._bundle = manifest, bundle
        self._form, self._report = form, report
        self._graph = manifest.lowerings["cpu"].graph
        self._model = onnx.load(str(inside(bundle, self._graph)), load_external_data=False)
        self._weights = FloatWeights(self._model, bundle)
        self._weights.check()
        self._shapes = _matrices(self._model, self._weights)
        self._heads = {n.input[1] for n in self._model.graph.node if n.op_type == _TIED_HEAD}
        self._wide: frozenset[str] = frozenset()
        self._check_widths()
        self._packed: dict[str, Stored] = {}
        self._pieces = calibration_pieces(manifest, bundle)
        self._moments: dict[str, np.ndarray] = {}
        self._factors: dict[str, tuple[np.ndarray, ...]] = {}

    def write(self, folder: Path, budget: int | None = None) -> frozenset[str]:
        """Write graphs and weights.

        Args:
            folder: of the new bundle.
            budget: bytes of the weights file; what is left of them goes to the matrices that gain
                most by 8 bits.

        Returns:
            Names of the matrices that got 8 bits because of the budget.

        Raises:
            OptionError: the budget is too small; it says what works.
        """
        if budget is not None:
            self._check_budget(budget)
        self._calibrate(everything=budget is not None)
        if budget is not None:
            self._wide = self._plan(budget)
        rewriter = GraphRewriter(
            self._model,
            self._bundle,
            folder,
            self._store,
            head_in_rows=self._form.row_exact,
            factors=self._factors,
        )
        rewriter.write(self._graph, lambda done, total: self._report("quantize", done, total))
        if TREE_GRAPH_NAME in self._manifest.files:
            write_tree_graph(folder, self._graph)
        return self._wide

    def _calibrate(self, everything: bool) -> None:
        # A head in rows leaves its table to be the embedding alone, which no moments are known of.
        asked = {n for n, table in self._shapes.items() if not (table and self._form.row_exact)}
        everything = everything or self._form.smooth
        names = {name for name in asked if everything or self._is_calibrated(name)}
        if names:
            self._moments = input_moments(
                self._model, self._manifest, self._bundle, self._pieces, self._report, names
            )
        for name, moment in self._moments.items():
            if self._shapes[name]:
                size = float(np.diagonal(moment).mean())
                moment[np.diag_indices_from(moment)] += np.float32(_AS_EMBEDDING * size)
        if self._form.smooth:
            self._factors = smooth_factors(self._model, self._weights, self._moments)

    def _is_calibrated(self, name: str) -> bool:
        method = self._method(name)
        if method is METHODS["affine4"]:
            # A matrix that is made of such blocks keeps them.
            rows = self._rows(name)
            parts = (rows[i : i + _GRID_ROWS] for i in range(0, len(rows), _GRID_ROWS))
            return any(find_grid(part) is None for part in parts)
        return method.calibrated

    def _method(self, name: str) -> Method:
        if name in self._wide:
            return METHODS[_WIDE]
        for prefix, method in self._form.special:
            if name.startswith(prefix):
                return METHODS[method]
        return METHODS[self._form.table if self._shapes[name] else self._form.method]

    def _rows(self, name: str) -> np.ndarray:
        """A matrix as [N, K]."""
        array = self._weights.array(name)
        return np.asarray(array if self._shapes[name] else np.ascontiguousarray(array.T))

    def _store(self, name: str, weight: np.ndarray) -> Stored:
        if name in self._packed and name not in self._wide:
            return self._packed[name]
        return self._method(name).pack(weight, self._moments.get(name))

    def _plan(self, budget: int) -> frozenset[str]:
        names = self._blocked()
        errors, sizes = {}, {}
        for done, name in enumerate(names):
            rows = self._rows(name)
            stored = self._packed[name] = self._store(name, rows)
            moment = self._moments.get(name)
            if moment is None:
                moment = np.eye(rows.shape[1], dtype=np.float32)
            errors[name] = product_error(rows, unpack(stored), moment)
            wide = METHODS[_WIDE].pack(rows, None)
            sizes[name] = file_bytes(stored.arrays()), file_bytes(wide.arrays())
            self._report("quantize", done + 1, len(names))
        # The head in rows is made from the float32 table, so only the embedding is rounded.
        model = _with_own_head(self._model) if self._form.row_exact else self._model
        source = (model, self._manifest, self._bundle)
        judged = self._pieces[:: max(1, len(self._pieces) // _JUDGED_PIECES)][:_JUDGED_PIECES]
        harm = measure_harm(source, judged, errors, self._rounded, self._report)
        candidates = [Candidate(name, harm[name], *sizes[name]) for name in names]
        return choose_wide(candidates, budget, self._fixed_bytes())

    def _check_budget(self, budget: int) -> None:
        """Refuse a budget that is too small, before anything that takes long."""
        small = 0
        for done, name in enumerate(names := self._blocked()):
            rows = self._rows(name)
            small += file_bytes(self._method(name).pack(rows, None).arrays())
            self._report("sizes", done + 1, len(names))
        check_budget(budget, self._fixed_bytes() + small)

    def _check_widths(self) -> None:
        for name, table in self._shapes.items():
            dims = self._weights.shape(name)
            width = dims[1] if table else dims[0]
            in_blocks = not self._in_rows(name) and self._method(name).block > 0
            if in_blocks and width % LEAST_BLOCK:
                raise UnsupportedError(
                    f"the matrix {name!r} is {width} wide, which blocks of {LEAST_BLOCK} do not "
                    "divide; keep these weights in float32"
                )

    def _blocked(self) -> list[str]:
        """Names of the matrices that the form's methods store."""
        return [name for name in self._shapes if not self._in_rows(name)]

    def _in_rows(self, name: str) -> bool:
        return self._form.row_exact and name == HEAD_WEIGHT

    def _rounded(self, name: str) -> np.ndarray:
        values = unpack(self._packed[name])
        return values if self._shapes[name] else np.ascontiguousarray(values.T)

    def _fixed_bytes(self) -> int:
        kept = {n for node in self._model.graph.node for n in node.input if n in self._weights}
        arrays = [self._weights.array(name) for name in kept - set(self._shapes)]
        total = file_bytes(a for a in arrays if a.nbytes >= INLINE_BYTES) + _SLACK
        if self._form.row_exact:
            names = [n for n in self._shapes if n in self._heads or n == HEAD_WEIGHT]
            total += sum(file_bytes(quantize_rows(self._rows(n)).arrays()) for n in names)
        return total


def _with_own_head(model: onnx.ModelProto) -> onnx.ModelProto:
    """The graph with a name of its own for the table that the head shares with the embedding."""
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    tensors = {t.name: t for t in changed.graph.initializer}
    for node in changed.graph.node:
        if node.op_type == _TIED_HEAD and node.input[1] in tensors:
            table = tensors[node.input[1]]
            own = changed.graph.initializer.add()
            own.CopyFrom(table)
            own.name = node.input[1] = f"{table.name}.{HEAD_WEIGHT}"
    return changed


def _matrices(model: onnx.ModelProto, weights: FloatWeights) -> dict[str, bool]:
    """Name of each matrix that is quantized, and whether it is a table of rows [V, D]."""
    found: dict[str, bool] = {}
    for node in model.graph.node:
        if node.op_type == "Gather" and weights.is_matrix(node.input[0]):
            found[node.input[0]] = True
        if node.op_type == "MatMul" and weights.is_matrix(node.input[1]):
            found[node.input[1]] = False
    return found
