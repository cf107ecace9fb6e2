"""Rewriting a float32 bundle so that its matrices are block-quantized."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx

from forerun.errors import OptionError, UnsupportedError
from forerun.export.bundle import new_bundle, require_space
from forerun.export.card import CARD_NAME, write_card
from forerun.export.npu import without_static
from forerun.export.recipe import RECIPE
from forerun.export.tree import TREE_GRAPH_NAME, write_tree_graph
from forerun.export.webgpu import with_webgpu, without_webgpu
from forerun.export.writer import WEIGHTS_NAME
from forerun.quant.calibration import input_moments
from forerun.quant.evaluate import corpus_pieces
from forerun.quant.gate import check_quality
from forerun.quant.kv8 import calibrate_scales, in_eight_bits
from forerun.quant.rewrite import GraphRewriter
from forerun.quant.rounding import quantize_blocks, quantize_gptq
from forerun.runtime.manifest import Manifest, Quantization, inside, load_manifest, seal

if TYPE_CHECKING:
    from collections.abc import Callable

    from forerun.quant.blocks import Blocks

    Progress = Callable[[str, int, int | None], None]

_SMALL_BLOCK = 32
_CALIBRATION_CONTEXT = 512
_CALIBRATION_TOKENS = 4096


@dataclasses.dataclass(frozen=True)
class WeightFormat:
    """One way to store matrices.

    Attributes:
        bits: of a code.
        block: weights that share a scale.
        detail: for people.
        wide: prefixes of the names of matrices that get 8 bits whatever `bits` says.
        calibrated: rounding errors are moved to where the built-in text does not notice (GPTQ).
        kl_bound: largest mean KL divergence to the float32 bundle that is let out.
        bytes_per_weight: size of a bundle, everything beside the weights included, for estimates.
        row_exact: verification of drafts is bit-equal to decoding: blocks of 32, an 8-bit KV
            cache, and the head in per-row integer products, which also flattens T(n).
    """

    bits: int
    block: int
    detail: str
    wide: tuple[str, ...]
    calibrated: bool
    kl_bound: float
    bytes_per_weight: float
    row_exact: bool = False


# Queries, keys and values are an eighth of the weights and over a third of what 4 bits cost in KL.
_QKV = ("qkv.",)

FORMATS = {
    "int4": WeightFormat(4, 64, "4 bits (qkv 8), blocks of 64, GPTQ", _QKV, True, 0.75, 1.0),
    "int4-exact": WeightFormat(
        4, 32, "4 bits (qkv, head, KV 8), blocks of 32, GPTQ", _QKV, True, 0.75, 1.2, True
    ),
    "int8": WeightFormat(8, 32, "8 bits, blocks of 32, least error", (), False, 0.02, 1.3),
}


def quantize(
    bundle: Path, out: Path, *, weights: str = "int4", progress: Progress | None = None
) -> Manifest:
    """Write a bundle with quantized matrices, after measuring what that costs.

    Args:
        bundle: a float32 bundle.
        out: folder of the new bundle; appears only when everything succeeded.
        weights: a name of `FORMATS`.
        progress: called with (stage, done, total).

    Raises:
        OptionError: an unknown format.
        UnsupportedError: the bundle is quantized already.
        ExportMismatch: the KL divergence to the float32 bundle exceeds the format's bound.
    """
    if weights not in FORMATS:
        raise OptionError(f"weights must be one of {', '.join(FORMATS)}, got {weights!r}")
    bundle, form = Path(bundle), FORMATS[weights]
    manifest = load_manifest(bundle)
    manifest.check_files(bundle)
    # The static form reads the float32 weights, which the new bundle does not have.
    manifest = without_webgpu(without_static(manifest))
    if manifest.quantization.method != "none":
        raise UnsupportedError(
            f"{bundle} is quantized already ({manifest.quantization.method}); "
            "quantize the float32 bundle"
        )
    needed = int(manifest.model.parameters * form.bytes_per_weight)
    require_space(Path(out).parent, needed, "quantizing")
    report = progress or (lambda stage, done, total: None)
    with new_bundle(Path(out)) as folder:
        _copy_others(manifest, bundle, folder)
        _rewrite(manifest, bundle, folder, form, report)
        quant = Quantization(weights, form.bits, form.block, form.detail)
        # What the float32 bundle lacks, the new one lacks as well.
        recipe = min(manifest.recipe, RECIPE)
        new = dataclasses.replace(
            manifest, quantization=quant, row_exact=form.row_exact, recipe=recipe
        )
        new = in_eight_bits(new) if form.row_exact else new
        new = with_webgpu(folder, new)
        check = check_quality(new, folder, manifest, bundle, form.kl_bound, report)
        new = dataclasses.replace(new, checks=(*manifest.checks, check))
        write_card(folder, new)
        return seal(folder, new)


def _copy_others(manifest: Manifest, bundle: Path, folder: Path) -> None:
    graph = manifest.lowerings["cpu"].graph
    for name in manifest.files:
        if name not in (graph, TREE_GRAPH_NAME, WEIGHTS_NAME, CARD_NAME):
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(inside(bundle, name), target)


def _rewrite(
    manifest: Manifest, bundle: Path, folder: Path, form: WeightFormat, report: Progress
) -> None:
    graph = manifest.lowerings["cpu"].graph
    model = onnx.load(str(inside(bundle, graph)), load_external_data=False)

    moments: dict[str, np.ndarray] = {}
    pieces = calibration_pieces(manifest, bundle)
    if form.calibrated:
        moments = input_moments(model, manifest, bundle, pieces, report)
    scales = None
    if form.row_exact:
        scales = calibrate_scales(model, manifest, bundle, pieces, report)

    def to_blocks(name: str, weight: np.ndarray) -> Blocks:
        # Some models are as wide as 32 divides and 64 does not; smaller blocks lose nothing.
        block = form.block if weight.shape[1] % form.block == 0 else _SMALL_BLOCK
        if name.startswith(form.wide):
            return quantize_blocks(weight, 8, block)
        if name in moments:
            return quantize_gptq(weight, moments[name], form.bits, block)
        return quantize_blocks(weight, form.bits, block)

    rewriter = GraphRewriter(
        model, bundle, folder, to_blocks, head_in_rows=form.row_exact, kv_scales=scales
    )
    rewriter.write(graph, lambda done, total: report("quantize", done, total))
    if TREE_GRAPH_NAME in manifest.files:
        write_tree_graph(folder, graph)


def calibration_pieces(manifest: Manifest, bundle: Path) -> list[np.ndarray]:
    """Pieces of the built-in text from its end; the measurements read it from its beginning."""
    context = min(_CALIBRATION_CONTEXT, manifest.kv.capacity)
    return corpus_pieces(manifest, bundle, context, _CALIBRATION_TOKENS, from_end=True)
