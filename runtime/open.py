"""Opening a bundle on a device, and going on on the CPU when that was allowed and it fails."""

from __future__ import annotations

import time
import warnings
from functools import partial
from typing import TYPE_CHECKING

from forerun.devices.plugins import missing
from forerun.devices.providers import PROVIDERS, find_provider
from forerun.devices.remember import Remembered
from forerun.errors import DeviceError, OptionError
from forerun.runtime.drafting.costs import costs_key
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


def open_on(
    device: str | None,
    manifest: Manifest,
    folder: Path,
    *,
    threads: int | None = None,
    spin: bool = True,
    allow_fallback: bool = False,
    on_fallback: Callable[[str], None] | None = None,
) -> Runner | StaticRunner | FallbackRunner:
    """`open_runner` for what `--device` said: None takes the fastest device that is here.

    With one device there is nothing to choose. Otherwise a step of one row is timed on each, once
    per machine. On the CPU `allow_fallback` asks for nothing.
    """
    chosen = device or fastest_device(manifest, folder, threads, spin)
    allow = allow_fallback and (device is not None or chosen != _CPU)
    return open_runner(
        manifest,
        folder,
        device=chosen,
        threads=threads,
        spin=spin,
        allow_fallback=allow,
        on_fallback=on_fallback,
    )


def devices_for(manifest: Manifest) -> list[str]:
    """Tested devices that are here and for which a bundle has a form of its graph."""
    return [
        row.name
        for row in PROVIDERS.values()
        if row.tested and row.form in manifest.lowerings and not missing(row)
    ]


def fastest_device(
    manifest: Manifest, folder: Path, threads: int | None = None, spin: bool = True
) -> str:
    """The device of `devices_for` on which a decoding step takes least time; timed once.

    Args:
        manifest: of the bundle.
        folder: of the bundle.
        threads: of the sessions; None takes one per core, up to eight.
        spin: let waiting threads spin.
    """
    here = devices_for(manifest)
    if here == [_CPU]:
        return _CPU
    kept = Remembered("devices")
    times: dict[str, float] = {}
    for device in here:
        key = costs_key(manifest, device, threads or 0)
        known = kept.read(key)
        if not isinstance(known, float) or known <= 0:
            known = _step_seconds(_open(manifest, folder, threads, spin, device))
            kept.write(key, known)
        times[device] = known
    return min(times, key=lambda name: times[name])


def _step_seconds(runner: Runner | StaticRunner) -> float:
    """Seconds of a step of one row, the least of three after one that warms up."""
    try:
        taken = []
        for _ in range(4):
            started = time.perf_counter()
            runner.step([0])
            taken.append(time.perf_counter() - started)
        return min(taken[1:])
    finally:
        runner.close()


def _open(
    manifest: Manifest, folder: Path, threads: int | None, spin: bool, device: str
) -> Runner | StaticRunner:
    if find_provider(device).static_shapes:
        from forerun.runtime.static_runner import StaticRunner

        return StaticRunner(manifest, folder, threads=threads, spin=spin, device=device)
    return Runner(manifest, folder, threads=threads, spin=spin, device=device)


def _warn(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=3)
