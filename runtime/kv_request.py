"""What a caller asked of the KV cache: its layout, its size, or a window; checked, then applied."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from forerun.devices.providers import PROVIDERS, find_provider
from forerun.errors import BundleError, OptionError
from forerun.runtime.budget import parse_size, plan_capacity, with_capacity
from forerun.runtime.layouts import (
    CHAIN,
    LAYOUTS,
    choose_layout,
    family,
    layout_name,
    layout_on,
    layouts_of,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from forerun.runtime.manifest import Manifest, Rotary
    from forerun.runtime.window import WindowArena

SINKS = 4
LEAST_WINDOW = 32
A_WINDOW, A_SKIP = "window", "skipping"
_FLOATS = ("fp32", "fp16")
_WHY_NOT_DRAFT = {
    A_WINDOW: "reading drafts evicts tokens that plain decoding would still see",
    A_SKIP: "drafts are verified in full, so that the text would depend on them",
}


def no_drafting(what: str) -> str:
    """Why nothing is drafted with a window of the KV cache (`A_WINDOW`), or with `A_SKIP`."""
    return (
        f"drafting does not go with {what}, since {_WHY_NOT_DRAFT[what]}; "
        f"use --drafter none, or no {what}"
    )


@dataclass(frozen=True)
class KVRequest:
    """A layout and a size of the KV cache.

    Attributes:
        layout: a name of `layouts.LAYOUTS`; None takes the bundle's default.
        budget: bytes, or a size like ``64MB``, that the cache may take; None takes all tokens.
        window: rows of the first tokens and the newest together, for texts without end.

    Raises:
        OptionError: one has another type, the budget is no size, or both a budget and a window
            were given.
    """

    layout: str | None = None
    budget: str | int | None = None
    window: int | None = None

    def __post_init__(self) -> None:
        _check_type("kv", self.layout, (str,), "a name such as 'int8'")
        _check_type("kv_budget", self.budget, (str, int), "bytes, or a size such as '64MB'")
        _check_type("window", self.window, (int,), "a whole number of tokens")
        if self.budget is not None and self.window is not None:
            raise OptionError("a KV budget and a window both set the cache's size; give one")
        if isinstance(self.budget, str):
            parse_size(self.budget)

    def apply(self, manifest: Manifest, device: str = "cpu") -> tuple[Manifest, str]:
        """The manifest of the bundle as it will run.

        Args:
            manifest: of the bundle.
            device: where it will run.

        Returns:
            The manifest with the layout and capacity alone that were asked for, and a line that
            says how large the cache is; empty if no budget was given.

        Raises:
            OptionError: the bundle or the device lacks the layout, or what was asked of its size
                is out of range or fixed there.
            BundleError: the bundle's cache has one size only, or does not say how its keys are
                rotated, which a window needs.
        """
        chosen = choose_layout(manifest, self.layout, device)
        if self.window is not None:
            if device != "cpu":
                raise OptionError(f"a window of the KV cache runs on the cpu, not on {device}")
            check_window(chosen, self.window, has=layouts_of(manifest))
            return with_capacity(chosen, self.window), ""
        if self.budget is None:
            return chosen, ""
        nbytes = parse_size(self.budget) if isinstance(self.budget, str) else self.budget
        plan = plan_capacity(layout_on(chosen, find_provider(device).form), nbytes)
        return with_capacity(chosen, plan.capacity, device), plan.text

    def apply_anywhere(self, manifest: Manifest) -> Manifest:
        """The manifest for the cpu, with the forms for other devices that can run what was asked.

        Args:
            manifest: of the bundle.

        Raises:
            OptionError: as `apply` for the cpu.
            BundleError: likewise.
        """
        chosen, _ = self.apply(manifest)
        fits = {CHAIN} | {row.form for row in PROVIDERS.values() if self._fits(manifest, row.name)}
        kept = {n: form for n, form in chosen.lowerings.items() if family(n) in fits}
        return replace(chosen, lowerings=kept)

    def arena(self, manifest: Manifest) -> WindowArena | None:
        """The window's cache for a manifest that `apply` gave, or None for the ordinary one.

        Raises:
            OptionError: the window is too small, or the layout's keys cannot be rotated.
            BundleError: the bundle does not say how keys are rotated.
        """
        # Imported here: onnxruntime takes long to import, and wrong input should be told before.
        from forerun.runtime.window import open_window

        return None if self.window is None else open_window(manifest, self.window)

    def _fits(self, manifest: Manifest, device: str) -> bool:
        try:
            self.apply(manifest, device)
        except (OptionError, BundleError):
            return False
        return True


def check_window(
    manifest: Manifest, rows: int, sinks: int = SINKS, has: Sequence[str] = ()
) -> Rotary:
    """Refuse a window that a bundle cannot have; returns how its keys are rotated.

    Args:
        manifest: whose `kv` is the layout that will run.
        rows: of sinks and window together.
        sinks: first tokens that are always kept.
        has: names of all layouts of the bundle.

    Raises:
        OptionError: too few or too many rows, or a layout whose keys cannot be rotated.
        BundleError: the bundle does not say how keys are rotated.
    """
    name = layout_name(manifest.kv)
    if name not in _FLOATS:
        cure = next((f"take --kv {n}" for n in _FLOATS if n in has), "take a bundle that has one")
        raise OptionError(
            f"a window needs a KV cache in {' or '.join(_FLOATS)}, since keys are rotated when "
            f"older ones are evicted; this one is {LAYOUTS[name].text}: {cure}"
        )
    if sinks < 0 or not sinks + LEAST_WINDOW <= rows <= manifest.kv.capacity:
        raise OptionError(
            f"{sinks} first tokens and a window take {sinks + LEAST_WINDOW} to "
            f"{manifest.kv.capacity} rows, got {rows}"
        )
    if manifest.rotary is None:
        raise BundleError(
            "the bundle does not say how its keys are rotated, which a window needs; "
            "export it again, or pull it with --force"
        )
    return manifest.rotary


def _check_type(option: str, value: object, kinds: tuple[type, ...], wanted: str) -> None:
    if value is not None and type(value) not in kinds:
        raise OptionError(
            f"{option} is {value!r}, of the type {type(value).__name__}; it must be {wanted}"
        )
