"""The layouts of a KV cache this runtime knows, and the choice of one of a bundle's."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from forerun.devices.providers import PROVIDERS, find_provider
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
        BundleError: a layout is unknown or there twice, has another name than it should, or no
            graph.
    """
    if layout_name(manifest.kv) in manifest.kv_layouts:
        raise BundleError(
            f"manifest: the KV layout {layout_name(manifest.kv)!r} is there twice; "
            "export or quantize the bundle again"
        )
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


def layout_on(manifest: Manifest, lowering: str) -> KVLayout:
    """The layout of the KV cache that a form of the graph runs.

    Args:
        manifest: of a bundle, or what `choose_layout` made of it.
        lowering: its name. Those of other devices keep the dtype they were exported with,
            whatever the bundle's default is.

    Raises:
        BundleError: this version does not know it.
    """
    form = manifest.lowerings.get(lowering)
    spec = form.inputs.get("past_key.0") if form else None
    if spec is None or spec.dtype == manifest.kv.dtype:
        return manifest.kv
    bits = next((row.bits for row in LAYOUTS.values() if row.dtype == spec.dtype), None)
    if bits is None:
        raise BundleError(
            f"the KV cache of the lowering {lowering!r} is {spec.dtype}, which this forerun does "
            f"not know (it knows {', '.join(LAYOUTS)}); update forerun"
        )
    plain = {"group": 0, "kind": _DENSE, "rank": 0, "outliers": 0.0, "buffer": 0, "overhead": 0}
    return replace(manifest.kv, dtype=spec.dtype, bits=bits, **plain)


def choose_layout(manifest: Manifest, name: str | None, device: str = "cpu") -> Manifest:
    """The manifest as it would be if a bundle had only one layout of its KV cache.

    Args:
        manifest: of a bundle.
        name: of `LAYOUTS`; None takes the default, of the bundle on the cpu and of the device's
            own form elsewhere.
        device: where it will run; other devices than the cpu run one layout alone.

    Returns:
        A manifest whose `kv` is that layout and whose lowerings `cpu` and `cpu-tree` run it, and
        with the lowerings of those other devices that run it too; of all of them if no layout is
        named. Without a graph for the cpu in a layout that only the device has.

    Raises:
        OptionError: there is no such layout, or this bundle or the device lacks it.
        BundleError: the bundle has a layout that this version does not know.
    """
    check_layouts(manifest)
    present, form = layouts_of(manifest), find_provider(device).form
    only = layout_name(layout_on(manifest, form))
    if form != CHAIN and name not in (None, only):
        known = "" if name in LAYOUTS else f"; there are {', '.join(LAYOUTS)}"
        raise OptionError(
            f"{device} runs the KV layout {only} alone, not {name}{known}; use the cpu, or {only}"
        )
    if name is None:
        kept = {n: f for n, f in manifest.lowerings.items() if "+" not in n}
        return replace(manifest, lowerings=kept, kv_layouts={})
    if name not in present and form == CHAIN:
        raise OptionError(_why_absent(name, present))
    own = manifest.kv if name == present[0] else manifest.kv_layouts.get(name)
    return replace(
        manifest,
        kv=own or layout_on(manifest, form),
        kv_layouts={},
        lowerings=_running(manifest, name),
        row_exact=manifest.row_exact and (name == present[0] or LAYOUTS[name].exact),
    )


def _running(manifest: Manifest, name: str) -> dict[str, Lowering]:
    """The lowerings that run a layout, those of the cpu under the names of the default's."""
    forms = manifest.lowerings
    is_default = name == layout_name(manifest.kv)
    pairs = {CHAIN: lowering_of(name), TREE: lowering_of(name, tree=True)}
    pairs = {plain: plain if is_default else own for plain, own in pairs.items()}
    found = {plain: forms[own] for plain, own in pairs.items() if own in forms}
    for root in {row.form for row in PROVIDERS.values()} - {CHAIN}:
        if root in forms and layout_name(layout_on(manifest, root)) == name:
            found |= {n: form for n, form in forms.items() if family(n) == root}
    return found


def family(lowering: str) -> str:
    """The form that a lowering belongs to, e.g. ``webgpu`` for ``webgpu-tree``."""
    return lowering.partition("-")[0]


def _why_absent(name: str, present: list[str]) -> str:
    has = f"this bundle has {', '.join(present)}"
    if name not in LAYOUTS:
        return f"there is no KV layout {name!r}, there are {', '.join(LAYOUTS)}; {has}"
    if LAYOUTS[name].kind != _DENSE:
        return (
            f"{has}, not {name}; `forerun quantize` of a float32 bundle adds it, unless the model "
            "has a sliding window"
        )
    return f"{has}, not {name}; make one that has it with `forerun quantize --kv {name}`"
