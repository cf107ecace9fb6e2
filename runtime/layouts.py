"""The layouts of a KV cache this runtime knows, and the choice of one of a bundle's."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from forerun.errors import BundleError, OptionError

if TYPE_CHECKING:
    from forerun.runtime.manifest import KVLayout, Lowering, Manifest

CHAIN, TREE = "cpu", "cpu-tree"
_DENSE = "dense"


@dataclass(frozen=True)
class KnownLayout:
    """One way to store keys and values.

    Attributes:
        kind: see `KVLayout`.
        dtype: of the arrays; None where the kind alone tells how they are read.
        bits: of a value, likewise.
        exact: attention computes every row of a step as it would alone, bit for bit, so that a
            bundle whose products do so too keeps that promise.
        text: for people.
    """

    kind: str
    dtype: str | None
    bits: int | None
    exact: bool
    text: str


LAYOUTS = {
    "fp32": KnownLayout(_DENSE, "float32", 32, False, "32-bit float"),
    "fp16": KnownLayout(_DENSE, "float16", 16, False, "16-bit float"),
    "int8": KnownLayout(_DENSE, "int8", 8, True, "8-bit"),
    "int4": KnownLayout(_DENSE, "uint8", 4, True, "4-bit"),
    "gear-kcvt": KnownLayout("gear-kcvt", None, None, False, "GEAR on KCVT"),
    "gear-kivi": KnownLayout("gear-kivi", None, None, False, "GEAR on KIVI"),
}


def layout_name(layout: KVLayout) -> str:
    """The name of a layout among `LAYOUTS`.

    Raises:
        BundleError: this version does not know it.
    """
    for name, known in LAYOUTS.items():
        same = layout.kind == known.kind and known.dtype in (None, layout.dtype)
        if same and known.bits in (None, layout.bits):
            return name
    raise BundleError(
        f"the bundle's KV cache is {layout.kind!r} in {layout.bits} bits of {layout.dtype}, which "
        f"this forerun does not know (it knows {', '.join(LAYOUTS)}); update forerun"
    )


def check_layouts(manifest: Manifest) -> None:
    """Refuse a bundle with a KV cache that this version cannot read.

    Raises:
        BundleError: a layout is unknown, or has another name than it should, or no graph.
    """
    layout_name(manifest.kv)
    for name, layout in manifest.kv_layouts.items():
        if layout_name(layout) != name:
            raise BundleError(
                f"manifest: the KV layout {name!r} is a {layout_name(layout)!r} in truth; "
                "export or quantize the bundle again"
            )
        if lowering_of(name) not in manifest.lowerings:
            raise BundleError(
                f"manifest: the KV layout {name!r} has no lowering {lowering_of(name)!r}; "
                "export or quantize the bundle again"
            )


def lowering_of(name: str, tree: bool = False) -> str:
    """The lowering that runs a further layout of a bundle, for chains or for trees."""
    return f"{CHAIN}+{name}{'-tree' if tree else ''}"


def layouts_of(manifest: Manifest) -> list[str]:
    """Names of a bundle's layouts, its default first."""
    return [layout_name(manifest.kv), *manifest.kv_layouts]


def choose_layout(manifest: Manifest, name: str | None) -> Manifest:
    """The manifest as it would be if a bundle had only one layout of its KV cache.

    Args:
        manifest: of a bundle.
        name: of `LAYOUTS`; None takes the bundle's default.

    Returns:
        A manifest whose `kv` is that layout and whose lowerings `cpu` and `cpu-tree` run it. Other
        devices have the default layout alone, so with another one their lowerings are left out.

    Raises:
        OptionError: there is no such layout, or this bundle lacks it.
        BundleError: the bundle has a layout that this version does not know.
    """
    check_layouts(manifest)
    present = layouts_of(manifest)
    if name is None or name == present[0]:
        return _only_default(manifest)
    if name not in manifest.kv_layouts:
        raise OptionError(_why_absent(name, present))
    exact = manifest.row_exact and LAYOUTS[name].exact
    return replace(
        manifest,
        kv=manifest.kv_layouts[name],
        kv_layouts={},
        lowerings=_renamed(manifest.lowerings, name),
        row_exact=exact,
    )


def _only_default(manifest: Manifest) -> Manifest:
    others = tuple(lowering_of(name) for name in manifest.kv_layouts)
    kept = {n: form for n, form in manifest.lowerings.items() if not n.startswith(others or "?")}
    return replace(manifest, lowerings=kept, kv_layouts={})


def _renamed(forms: dict[str, Lowering], name: str) -> dict[str, Lowering]:
    """The lowerings of a layout under the names of the default's."""
    pairs = {CHAIN: lowering_of(name), TREE: lowering_of(name, tree=True)}
    return {plain: forms[own] for plain, own in pairs.items() if own in forms}


def _why_absent(name: str, present: list[str]) -> str:
    has = f"this bundle has {', '.join(present)}"
    if name not in LAYOUTS:
        return f"there is no KV layout {name!r}, there are {', '.join(LAYOUTS)}; {has}"
    return f"{has}, not {name}; make one that has it with `forerun quantize --kv {name}`"
