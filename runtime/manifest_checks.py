"""Whether the numbers of a manifest agree with each other, and are within reason."""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING

from forerun.errors import BundleError

if TYPE_CHECKING:
    from forerun.runtime.manifest import KVLayout, Manifest, Rotary, Skipping

_MOST_LAYERS, _MOST_TOKENS, _MOST_WIDTH = 4096, 1 << 24, 1 << 16
# Means of many cosines are near 1 at most.
_COSINE = 1.001
_GEAR = "gear-"
_AGAIN = "export or quantize the bundle again"


def check_numbers(manifest: Manifest) -> None:
    """Refuse sizes, KV layouts, a rotation or what is said about skipping that cannot be.

    Raises:
        BundleError: names the part, and what it may be.
    """
    sizes = manifest.model
    numbers = (sizes.vocab, sizes.hidden, sizes.layers, sizes.context)
    layouts = {"kv": manifest.kv}
    layouts |= {f"kv_layouts.{name}": layout for name, layout in manifest.kv_layouts.items()}
    fits = all(_is_reasonable(layout) for layout in layouts.values())
    if min(numbers) < 1 or not fits:
        raise BundleError("manifest: sizes must be positive and within reason")
    for where, layout in layouts.items():
        _check_layout(where, layout, manifest.kv)
        if layout.kind.startswith(_GEAR):
            # Imported here: it takes numpy, and only these layouts need it.
            from forerun.runtime.gear.layout import part_layouts

            part_layouts(layout)
    if manifest.rotary is not None:
        _check_rotary(manifest.rotary, manifest.kv)
    if manifest.skipping is not None:
        _check_skipping(manifest.skipping, sizes.layers)


def _is_reasonable(layout: KVLayout) -> bool:
    positive = (layout.layers, layout.heads, layout.head_dim, layout.capacity, layout.bits)
    others = (layout.group, layout.rank, layout.buffer, layout.overhead)
    return (
        min(positive) >= 1
        and layout.layers <= _MOST_LAYERS
        and layout.capacity <= _MOST_TOKENS
        and max(layout.heads, layout.head_dim) <= _MOST_WIDTH
        and min(others) >= 0
        and max(layout.group, layout.buffer) <= _MOST_TOKENS
        and layout.overhead <= _MOST_TOKENS
    )


def _check_layout(where: str, layout: KVLayout, kv: KVLayout) -> None:
    sizes = [(one.layers, one.heads, one.head_dim, one.capacity) for one in (layout, kv)]
    if sizes[0] != sizes[1]:
        _refuse(where, f"has other sizes than kv: {sizes[0]} and {sizes[1]}")
    if layout.rank > layout.head_dim:
        _refuse(f"{where}.rank", f"is {layout.rank}; it must be from 0 to {layout.head_dim}")
    if not 0 <= layout.outliers <= 0.5:
        _refuse(f"{where}.outliers", f"is {layout.outliers}; it must be from 0 to 0.5")


def _check_rotary(rotary: Rotary, kv: KVLayout) -> None:
    lists, half = rotary.frequencies, kv.head_dim // 2
    if not 1 <= len(lists) <= kv.layers or any(len(one) != half for one in lists):
        lengths = [len(one) for one in lists[:8]]
        _refuse(
            "rotary.frequencies",
            f"has lists of {lengths} numbers; it must have 1 to {kv.layers} lists of {half}",
        )
    if not all(0 <= f <= math.tau for one in lists for f in one):
        _refuse("rotary.frequencies", "must be radians a position, from 0 to a whole turn")
    if len(rotary.layers) != kv.layers or not set(rotary.layers) <= set(range(len(lists))):
        _refuse("rotary.layers", f"must name one of the {len(lists)} lists for {kv.layers} layers")


def _check_skipping(found: Skipping, layers: int) -> None:
    if not 0 <= found.first < found.stop <= layers:
        _refuse("skipping", f"has layers {found.first} to {found.stop} of {layers}")
    if sorted(found.order) != list(range(found.first, found.stop)):
        _refuse("skipping.order", f"must be all layers from {found.first} to {found.stop - 1} once")
    if len(found.cosine) != layers or not all(map(_is_cosine, found.cosine)):
        _refuse("skipping.cosine", f"must be {layers} numbers from -1 to 1")
    ratios = [level.ratio for level in found.levels]
    rising = all(a < b for a, b in itertools.pairwise([0.0, *ratios, 1.0 + 1e-9]))
    for level in found.levels:
        if not (rising and _is_cosine(level.tau) and 1 <= level.run <= layers):
            _refuse("skipping.levels", "must have rising ratios, cosines, and runs of layers")
    if not 0 <= found.warmup <= _MOST_TOKENS:
        _refuse("skipping.warmup", f"is {found.warmup}; it must be a number of tokens")
    if found.default and not (ratios and ratios[0] <= found.default <= ratios[-1]):
        _refuse("skipping.default", f"is {found.default}; it must be 0 or within the levels")


def _is_cosine(value: float) -> bool:
    return -_COSINE <= value <= _COSINE


def _refuse(where: str, words: str) -> None:
    raise BundleError(f"manifest: {where} {words}; {_AGAIN}")
