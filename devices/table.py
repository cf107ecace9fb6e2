"""The devices forerun knows, and which of them are here."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from pathlib import Path

from forerun.devices.providers import PROVIDERS, Provider
from forerun.devices.threads import default_threads, usable_cores


@dataclass(frozen=True)
class DeviceRow:
    """One device.

    Attributes:
        name: what `--device` calls it.
        provider: ONNX Runtime's execution provider.
        available: whether a session can be opened on it here; it was tried.
        detail: what it is, or what it would need to appear.
        holds: dtypes, KV cache and shapes that it can hold.
        tested: it was run for this version of forerun.
    """

    name: str
    provider: str
    available: bool
    detail: str
    holds: str = ""
    tested: bool = False


def list_devices() -> list[DeviceRow]:
    """Return every device, available or not; a session is opened on each that may be."""
    return [_describe(row) for row in PROVIDERS.values()]


def _describe(row: Provider) -> DeviceRow:
    from forerun.devices.plugins import missing

    lack = missing(row)
    here = _cpu_detail() if row.name == "cpu" else f"opens; for {row.needs}"
    return DeviceRow(row.name, row.provider, not lack, lack or here, row.holds, row.tested)


def _cpu_detail() -> str:
    import onnxruntime as ort

    cores = usable_cores()
    return (
        f"{cpu_name()}, {cores} core{'s' if cores > 1 else ''} usable, {default_threads()} "
        f"threads by default, {memory_mb()} MB of memory, onnxruntime {ort.__version__}"
    )


def cpu_name() -> str:
    """The processor's name as the system tells it."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def memory_mb() -> int:
    """Physical memory in MB, 0 if the system does not tell."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 1_000_000
    except (AttributeError, ValueError, OSError):
        return 0
