"""Opening a bundle on a device, and going on on the CPU when that was allowed and it fails."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from forerun.devices.plugins import missing
from forerun.devices.providers import PROVIDERS, find_provider
from forerun.errors import DeviceError, OptionError
from forerun.runtime.fallback import FallbackRunner
from forerun.runtime.kv_request import A_SKIP
from forerun.runtime.runner import Runner
from forerun.runtime.skipping import NO_SKIPPING, SkipRule, parse_skipping

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from forerun.runtime.arena import Rows
    from forerun.runtime.manifest import Manifest
    from forerun.runtime.static_runner import StaticRunner

_CPU = "cpu"
_DENSE = "dense"


@dataclass(frozen=True)
class _How:
    """What is the same on every device, see `open_runner`."""

    threads: int | None
    spin: bool
    arena: Rows | None
    skipping: SkipRule | None

    @property
    def needs_cpu(self) -> str:
        """What only the CPU can do of it; empty if nothing."""
        if self.arena is not None:
            return "a window of the KV cache"
        return "" if self.skipping is None else A_SKIP


def open_runner(
    manifest: Manifest,
    folder: Path,
    *,
    device: str = _CPU,
    threads: int | None = None,
    spin: bool = True,
    allow_fallback: bool = False,
    on_fallback: Callable[[str], None] | None = None,
    arena: Rows | None = None,
    skipping: str = NO_SKIPPING,
) -> Runner | StaticRunner | FallbackRunner:
    """Open a bundle's graph on a device.

    Args:
        manifest: of the bundle.
        folder: of the bundle.
        device: a name of `forerun.devices.providers.PROVIDERS`.
        threads: of the sessions; None takes one per core, up to eight.
        spin: let waiting threads spin; False when another session runs at the same time.
        allow_fallback: go on on the CPU if the device cannot be opened or fails later.
        on_fallback: told when that happens, and why; None gives a `RuntimeWarning`.
        arena: a KV cache of the caller's own, see `window.open_window`. CPU only.
        skipping: feed-forward blocks to leave out, see `skipping.parse_skipping`. CPU only.

    Raises:
        BundleError: the bundle has no form for the device, or its graph cannot be loaded.
        DeviceError: the device is not here, or cannot run the whole graph, and going on on the
            CPU was not allowed.
        OptionError: the device is unknown or cannot do what is asked, an option is out of range,
            or falling back to the CPU was asked of the CPU or of a bundle without a graph for it.
    """
    row = find_provider(device)
    how = _How(threads, spin, arena, parse_skipping(skipping, manifest))
    if how.needs_cpu and row.name != _CPU:
        raise OptionError(f"{how.needs_cpu} works on the cpu only, not on {row.name}")
    open_on = partial(_open, manifest, folder, how)
    if not allow_fallback:
        return open_on(row.name)
    if row.name == _CPU:
        raise OptionError("allow_fallback needs another device than the cpu")
    if _CPU not in manifest.lowerings:
        raise OptionError(
            f"allow_fallback needs a graph for the cpu, and of the bundle only {row.name}'s has "
            "that KV cache; name one that the cpu has too, or none"
        )
    tell = on_fallback or _warn
    try:
        return FallbackRunner(open_on(row.name), partial(open_on, _CPU), tell)
    except DeviceError as error:
        tell(f"{error}; going on on the cpu, as was allowed")
        return open_on(_CPU)


def devices_for(manifest: Manifest) -> list[str]:
    """Tested devices that are here and for which a bundle has a form of its graph."""
    return [
        row.name
        for row in PROVIDERS.values()
        if row.tested and row.form in manifest.lowerings and not missing(row)
    ]


def _open(manifest: Manifest, folder: Path, how: _How, device: str) -> Runner | StaticRunner:
    if device == _CPU:
        return _open_cpu(manifest, folder, how)
    if find_provider(device).static_shapes:
        from forerun.runtime.static_runner import StaticRunner

        return StaticRunner(manifest, folder, threads=how.threads, spin=how.spin, device=device)
    return Runner(manifest, folder, threads=how.threads, spin=how.spin, device=device)


def _open_cpu(manifest: Manifest, folder: Path, how: _How) -> Runner:
    kind = Runner
    if manifest.kv.kind != _DENSE:
        from forerun.runtime.gear.runner import GearRunner

        kind = GearRunner
    return kind(
        manifest,
        folder,
        threads=how.threads,
        spin=how.spin,
        skipping=how.skipping,
        arena=how.arena,
    )


def _warn(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=3)
