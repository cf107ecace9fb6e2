"""Adding KV layouts in GEAR's form to a bundle."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import onnx

from forerun.errors import OptionError, UnsupportedError
from forerun.quant.gear_graph import gear_graph, gear_inputs, gear_outputs, of_dense_cache
from forerun.runtime.gear.layout import CHUNK, SHARED_SCALES, part_layouts
from forerun.runtime.layouts import CHAIN, lowering_of

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from forerun.runtime.manifest import KVLayout, Manifest

GEAR = tuple(SHARED_SCALES)
RANK = 4
# Twice the paper's share: with only one largest and one smallest key of a channel in 64 tokens,
# SmolLM2-135M recalled 9 points less of what it had read than with a float32 cache.
OUTLIERS = 0.04
_GRAPH = "model-{}.onnx"


def gear_layout(
    dense: KVLayout, kind: str, *, rank: int = RANK, outliers: float = OUTLIERS
) -> KVLayout:
    """The layout of the same cache in a form of GEAR; `overhead` is what its arrays take.

    Args:
        dense: the layout of the bundle.
        kind: a name of `GEAR`.
        rank: of the factors, per head and chunk.
        outliers: share of the values that are kept exactly.

    Raises:
        OptionError: the kind is unknown.
    """
    if kind not in GEAR:
        raise OptionError(
            f"a KV layout in GEAR's form must be one of {', '.join(GEAR)}, got {kind!r}"
        )
    layout = dataclasses.replace(
        dense,
        dtype="uint8",
        bits=4,
        group=CHUNK,
        kind=kind,
        rank=rank,
        outliers=outliers,
        # One chunk fills up, and the rows of the last one are kept for going back.
        buffer=2 * CHUNK,
        overhead=0,
    )
    chunk = dense.layers * sum(sizes.nbytes for sizes in part_layouts(layout).values())
    # Up to the next whole byte, so that no plan for memory is too small.
    return dataclasses.replace(layout, overhead=-(-chunk // CHUNK) - layout.nbytes_per_token)


def with_gear(folder: Path, manifest: Manifest, names: Sequence[str] = GEAR) -> Manifest:
    """Write the graphs of layouts in GEAR's form into a bundle's folder.

    Args:
        folder: of the bundle, with the graph of its lowering ``cpu``.
        manifest: of the bundle.
        names: of the layouts, among `GEAR`.

    Returns:
        The manifest with the layouts and their lowerings ``cpu+NAME`` and ``cpu+NAME-tree``, which
        are the same graph.

    Raises:
        OptionError: a name is unknown.
        UnsupportedError: the model attends in a way that this form cannot.
    """
    form = manifest.lowerings.get(CHAIN)
    if form is None:
        raise UnsupportedError(f"{manifest.name} has no graph for the cpu, which GEAR starts from")
    if manifest.kv.dtype == "float16":
        raise UnsupportedError(
            f"{manifest.name} has a KV cache of float16, and GEAR cannot start from its graph; "
            "add GEAR before float16 is made the default"
        )
    model = onnx.load(str(folder / form.graph), load_external_data=False)
    layouts, lowerings = dict(manifest.kv_layouts), dict(manifest.lowerings)
    for name in names:
        layout = gear_layout(manifest.kv, name)
        graph = _GRAPH.format(name)
        (folder / graph).write_bytes(gear_graph(model, layout).SerializeToString())
        inputs = {r: s for r, s in form.inputs.items() if not of_dense_cache(r)}
        outputs = {r: s for r, s in form.outputs.items() if not of_dense_cache(r)}
        layouts[name] = layout
        lowerings[lowering_of(name)] = lowerings[lowering_of(name, tree=True)] = (
            dataclasses.replace(
                form,
                graph=graph,
                inputs=inputs | gear_inputs(layout),
                outputs=outputs | gear_outputs(layout),
            )
        )
    return dataclasses.replace(manifest, kv_layouts=layouts, lowerings=lowerings)
