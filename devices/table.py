"""The devices this version can run on; each is a row."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from forerun.devices.threads import default_threads, usable_cores


@dataclass(frozen=True)
class DeviceRow:
    """One device.

    Attributes:
        name: what `--device` style options call it.
        provider: ONNX Runtime's execution provider.
        available: whether a session can be opened on it here.
        detail: what it is, or what it would need to appear.
    """

    name: str
    provider: str
    available: bool
    detail: str


def list_devices() -> list[DeviceRow]:
    """Return every device, available or not."""
    return [probe() for probe in _PROBES]


def _cpu() -> DeviceRow:
    import onnxruntime as ort

    provider = "CPUExecutionProvider"
    cores = usable_cores()
    detail = (
        f"{cpu_name()}, {cores} core{'s' if cores > 1 else ''} usable, {default_threads()} "
        f"threads by default, {memory_mb()} MB of memory, onnxruntime {ort.__version__}"
    )
    return DeviceRow("cpu", provider, provider in ort.get_available_providers(), detail)


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


_PROBES: tuple[Callable[[], DeviceRow], ...] = (_cpu,)
