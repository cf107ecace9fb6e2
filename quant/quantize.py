"""From a float32 bundle to a smaller one: weights, KV cache, skipping, and what that costs."""

from __future__ import annotations

import dataclasses
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import onnx

from forerun.errors import OptionError, UnsupportedError
from forerun.export.bundle import new_bundle, require_space
from forerun.export.card import CARD_NAME, write_card
from forerun.export.npu import without_static
from forerun.export.recipe import RECIPE
from forerun.export.tree import TREE_GRAPH_NAME, tree_lowering, write_tree_graph
from forerun.export.webgpu import with_webgpu, without_webgpu
from forerun.export.writer import WEIGHTS_NAME
from forerun.quant.calibration import calibration_pieces
from forerun.quant.float_weights import FloatWeights
from forerun.quant.formats import FORMATS, KEPT, KEPT_BOUNDS, PLAIN_FORMATS, WeightFormat
from forerun.quant.gate import Limits, keep_limits, keep_skipping, measure_gate
from forerun.quant.gear import with_gear
from forerun.quant.kv import calibrate
from forerun.quant.kv_graphs import DENSE, FLOAT, with_layouts, without_layouts
from forerun.quant.measure_open import Judged
from forerun.quant.methods import METHODS
from forerun.quant.skip_calibrate import KL_LIMIT, add_skipping, check_skippable
from forerun.quant.weights import WeightStore
from forerun.runtime.layouts import layout_name
from forerun.runtime.manifest import Manifest, Quantization, inside, load_manifest, seal

if TYPE_CHECKING:
    from collections.abc import Callable

    Progress = Callable[[str, int, int | None], None]

_EXACT_KV = "int8"
_KEPT_BYTES = 4.1
# Bytes of a weight that no budget goes beyond: 8 bits for every matrix, and a head of its own.
_MOST_BYTES = 1.6
# Graphs of a bundle, for chains and trees in every layout and for two devices, in units of the
# float32 one, which names fewer constants.
_GRAPHS = 32
_TREE = "cpu-tree"


@dataclass(frozen=True)
class Wish:
    """What a smaller bundle shall be like.

    Attributes:
        weights: a name of `FORMATS` or `PLAIN_FORMATS`, or ``fp32`` to leave them as they are.
        kv: the KV layout that it runs by default, one of `kv_graphs.DENSE`; None takes 8 bits for
            row-exact weights and float32 for others. All others can be chosen when it is loaded.
        budget: bytes of the weights file; what `weights` leaves of them goes to 8 bits for the
            matrices where that gains most.
        skipping: calibrate which feed-forward blocks can be skipped, and let the graph do it.
        limits: what the bundle may cost; None takes the format's own bound, or that of the KV
            layout for weights that stay as they are.

    Raises:
        OptionError: a name is not known, or options contradict each other.
    """

    weights: str = "int4"
    kv: str | None = None
    budget: int | None = None
    skipping: bool = False
    limits: Limits | None = None

    def __post_init__(self) -> None:
        names = (*FORMATS, *PLAIN_FORMATS, KEPT)
        if self.weights not in names:
            raise OptionError(f"weights must be one of {', '.join(names)}, got {self.weights!r}")
        if self.kv not in (None, *DENSE):
            raise OptionError(
                f"the default KV layout must be one of {', '.join(DENSE)}, got {self.kv!r}; those "
                "of GEAR are chosen when a bundle is loaded"
            )
        form = self.form
        if self.budget is not None and (form is None or METHODS[form.method].bits != 4):
            raise OptionError(
                f"a budget says which matrices of a 4-bit form get 8 bits; {self.weights} has none"
            )
        if form is None and self.kv in (None, FLOAT) and not self.skipping:
            raise OptionError("nothing would change: name a weight format, a KV layout or skipping")

    @property
    def form(self) -> WeightFormat | None:
        """How weights are stored; None leaves them as they are."""
        return None if self.weights == KEPT else (FORMATS | PLAIN_FORMATS)[self.weights]

    @property
    def default_kv(self) -> str:
        """The KV layout that the bundle runs when nothing is said."""
        exact = self.form is not None and self.form.row_exact
        return self.kv or (_EXACT_KV if exact else FLOAT)

    @property
    def kept_limits(self) -> Limits:
        """What the bundle may cost with its default KV layout, when nothing is skipped."""
        if self.limits:
            return self.limits
        return Limits(self.form.kl_bound if self.form else KEPT_BOUNDS[self.default_kv])

    @property
    def skipping_limits(self) -> Limits:
        """What it may cost with its default share of skipped blocks."""
        kept = self.kept_limits
        if self.limits or self.form:
            return kept
        return Limits(max(KEPT_BOUNDS[self.default_kv], KL_LIMIT))


def quantize(
    bundle: Path,
    out: Path,
    *,
    weights: str | Wish = "int4",
    progress: Progress | None = None,
) -> Manifest:
    """Write a smaller bundle, after measuring what that costs.

    Args:
        bundle: a float32 bundle.
        out: folder of the new bundle; appears only when everything succeeded.
        weights: name of a weight format, or all that is wished.
        progress: called with (stage, done, total).

    Raises:
        OptionError: see `Wish`; or the budget is too small, and it says what works.
        SourceError: the weights hold NaN or infinity.
        UnsupportedError: the bundle is quantized already, can skip already or has another KV cache
            than float32 by default; or its graph or the width of a matrix does not allow it.
        SpaceError: the disk has too little room.
        QualityMismatch: the new bundle costs more than its limits allow.
    """
    wish = Wish(weights) if isinstance(weights, str) else weights
    bundle, report = Path(bundle), progress or (lambda stage, done, total: None)
    manifest = load_manifest(bundle)
    manifest.check_files(bundle)
    _check_source(manifest, bundle, wish)
    # The static form reads the float32 weights, which the new bundle does not have.
    source = without_layouts(without_webgpu(without_static(manifest)))
    require_space(Path(out).parent, needed_bytes(source, wish), "quantizing")
    with new_bundle(Path(out)) as folder:
        new = _with_weights(source, bundle, folder, wish, report)
        new = _with_rest(with_webgpu(folder, new), folder, wish, report)
        new = _gated((new, folder), (manifest, bundle), wish, report)
        write_card(folder, new)
        return seal(folder, new)


def needed_bytes(source: Manifest, wish: Wish) -> int:
    """An estimate of the bytes that a new bundle takes on the disk."""
    count = source.model.parameters
    weights = count * (wish.form.bytes_per_weight if wish.form else _KEPT_BYTES)
    if wish.budget is not None:
        weights = max(weights, min(wish.budget, count * _MOST_BYTES))
    return int(weights) + _GRAPHS * source.files[source.lowerings["cpu"].graph].bytes


def _check_source(manifest: Manifest, bundle: Path, wish: Wish) -> None:
    """Refuse a bundle that is no plain float32 one, or that cannot become what is wished."""
    if manifest.quantization.method != "none":
        raise UnsupportedError(
            f"{bundle} is quantized already ({manifest.quantization.method}); "
            "quantize the float32 bundle"
        )
    if manifest.skipping is not None:
        raise UnsupportedError(
            f"{bundle} can skip feed-forward blocks already, and only a bundle without can be "
            "quantized; give the float32 bundle that it was made from"
        )
    if (kv := layout_name(manifest.kv)) != FLOAT:
        raise UnsupportedError(
            f"{bundle} has a KV cache in {kv} by default, and only a bundle with {FLOAT} can be "
            "quantized; give the float32 bundle that it was made from"
        )
    if wish.skipping:
        check_skippable(bundle, manifest)


def _gated(
    new: tuple[Manifest, Path], source: tuple[Manifest, Path], wish: Wish, report: Progress
) -> Manifest:
    """Measure the new bundle against its limits, and how much skipping they leave room for."""
    (manifest, folder), (plain, bundle) = new, source
    reference = Judged(bundle)
    measured = measure_gate(Judged(folder), manifest, reference, plain, report)
    checks = keep_limits(measured, wish.kept_limits, manifest)
    if manifest.skipping:
        ratio, more = keep_skipping(
            folder, manifest, reference, plain, wish.skipping_limits, report
        )
        skipping = dataclasses.replace(manifest.skipping, default=ratio)
        manifest = dataclasses.replace(manifest, skipping=skipping)
        # Readers that keep one figure a metric shall keep that of the bundle as it runs unasked.
        checks = (*more, *checks)
    return dataclasses.replace(manifest, checks=(*plain.checks, *checks))


def _with_weights(
    source: Manifest, bundle: Path, folder: Path, wish: Wish, report: Progress
) -> Manifest:
    """Write graphs and weights, all else as it was."""
    # What the float32 bundle lacks, the new one lacks as well.
    recipe = min(source.recipe, RECIPE)
    if wish.form is None:
        graph = inside(bundle, source.lowerings["cpu"].graph)
        FloatWeights(onnx.load(str(graph), load_external_data=False), bundle).check()
        _copy(source, bundle, folder, frozenset())
        return dataclasses.replace(source, recipe=recipe)
    graph = source.lowerings["cpu"].graph
    _copy(source, bundle, folder, frozenset((graph, TREE_GRAPH_NAME, WEIGHTS_NAME)))
    wide = WeightStore(source, bundle, wish.form, report).write(folder, wish.budget)
    return dataclasses.replace(
        source,
        quantization=_described(wish.weights, wish.form, wide),
        row_exact=wish.form.row_exact,
        recipe=recipe,
    )


def _with_rest(manifest: Manifest, folder: Path, wish: Wish, report: Progress) -> Manifest:
    """Add skipping and the layouts of the KV cache, measured on the new weights."""
    pieces = calibration_pieces(manifest, folder)
    if wish.skipping:
        wished = wish.skipping_limits.kl_mean
        limit = KL_LIMIT if wished is None else min(KL_LIMIT, wished)
        manifest = add_skipping(folder, manifest, pieces, kl_limit=limit, report=report)
        if _TREE in manifest.lowerings:
            write_tree_graph(folder, manifest.lowerings["cpu"].graph)
            forms = manifest.lowerings | {_TREE: tree_lowering(manifest.lowerings["cpu"])}
            manifest = dataclasses.replace(manifest, lowerings=forms)
    graph = manifest.lowerings["cpu"].graph
    model = onnx.load(str(folder / graph), load_external_data=False)
    scales = calibrate(model, manifest, folder, pieces, progress=report)
    if not _has_window(model):
        manifest = with_gear(folder, manifest)
    return with_layouts(folder, manifest, scales, default=wish.default_kv, names=DENSE)


def _has_window(model: onnx.ModelProto) -> bool:
    """Whether a layer attends to a window only, which GEAR's attention cannot."""
    return any(
        attribute.name == "local_window_size" and attribute.i > 0
        for node in model.graph.node
        for attribute in node.attribute
    )


def _copy(manifest: Manifest, bundle: Path, folder: Path, left_out: frozenset[str]) -> None:
    for name in manifest.files:
        if name not in left_out | {CARD_NAME}:
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(inside(bundle, name), target)


def _described(weights: str, form: WeightFormat, wide: frozenset[str]) -> Quantization:
    method, detail = METHODS[form.method], form.detail
    if wide:
        detail += f"; 8 bits for {len(wide)} matrices by a budget"
    return Quantization(weights, method.bits, method.block, detail)
