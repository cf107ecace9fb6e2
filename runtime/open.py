"""Opening a bundle on a device, and going on on the CPU when that was allowed and it fails."""

from __future__ import annotations

import warnings
from functools import partial
from typing import TYPE_CHECKING

from forerun.devices.plugins import missing
from forerun.devices.providers import PROVIDERS, find_provider
from forerun.errors import DeviceError, OptionError
from forerun.runtime.fallback import FallbackRunner
from forerun.runtime.runner import Runner

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from forerun.runtime.manifest import Manifest
    from forerun.runtime.static_runner import StaticRunner

_CPU = "cpu"


def open_runner(
    manifest: Manifest,
    folder: Path,
    *,
    device: str = _CPU,
    threads: int | None = None,
    spin: bool = True,
    allow_fallback: bool = False,
    on_fallback: Callable[[str], None] | None = None,
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

    Raises:
        BundleError: the bundle has no form for the device, or its graph cannot be loaded.
        DeviceError: the device is not here, or cannot run the whole graph, and going on on the
            CPU was not allowed.
        OptionError: the device is unknown, `threads` is out of range, or falling back to the CPU
            was asked of the CPU.
    """
    row = find_provider(device)
    open_on = partial(_open, manifest, folder, threads, spin)
    if not allow_fallback:
        return open_on(row.name)
    if row.name == _CPU:
        raise OptionError("allow_fallback needs another device than the cpu")
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


def _open(
    manifest: Manifest, folder: Path, threads: int | None, spin: bool, device: str
) -> Runner | StaticRunner:
    if find_provider(device).static_shapes:
        from forerun.runtime.static_runner import StaticRunner

        return StaticRunner(manifest, folder, threads=threads, spin=spin, device=device)
    return Runner(manifest, folder, threads=threads, spin=spin, device=device)


def _warn(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=3)
