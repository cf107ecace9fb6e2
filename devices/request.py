"""What `--device` says: which device the target runs on, and which the drafter."""

from __future__ import annotations

from dataclasses import dataclass

from forerun.devices.providers import find_provider
from forerun.errors import OptionError

AUTO = "auto"
_PARTS = ("target", "draft")
_EXAMPLES = "give auto, a device (webgpu), or both (target=webgpu,draft=cpu)"


@dataclass(frozen=True)
class DeviceRequest:
    """Where target and drafter shall run; None leaves the choice to the measurements."""

    target: str | None = "cpu"
    draft: str | None = "cpu"


def parse_devices(text: str) -> DeviceRequest:
    """Read the value of `--device`.

    Args:
        text: ``auto``; a device for the target (the drafter stays on the CPU); or
            ``target=NAME,draft=NAME``, of which one may be absent and means the CPU, and where
            ``auto`` is a name too.

    Raises:
        OptionError: it is none of these, a part comes twice, or a device is unknown.
    """
    if "=" not in text:
        name = _device(text.strip())
        return DeviceRequest(name, None if name is None else "cpu")
    chosen: dict[str, str | None] = {}
    for item in text.split(","):
        part, _, name = (piece.strip() for piece in item.partition("="))
        if part not in _PARTS or part in chosen:
            raise OptionError(f"--device {text!r} is not understood; {_EXAMPLES}")
        chosen[part] = _device(name)
    return DeviceRequest(**chosen)


def _device(name: str) -> str | None:
    if not name:
        raise OptionError(f"--device names no device; {_EXAMPLES}")
    return None if name == AUTO else find_provider(name).name
