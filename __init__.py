"""Run autoregressive models on your own device, offline, on stock ONNX Runtime.

The public names are loaded when they are first used, so that `import forerun` stays quick.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from forerun.errors import ForerunError, UserError
    from forerun.runtime.load import load
    from forerun.runtime.text import Text
    from forerun.runtime.types import Event, SamplingParams, Stats

__version__ = "0.1.0"

_HOMES = {
    "load": "forerun.runtime.load",
    "Text": "forerun.runtime.text",
    "Event": "forerun.runtime.types",
    "SamplingParams": "forerun.runtime.types",
    "Stats": "forerun.runtime.types",
    "ForerunError": "forerun.errors",
    "UserError": "forerun.errors",
}

__all__ = ["Event", "ForerunError", "SamplingParams", "Stats", "Text", "UserError", "load"]


def __getattr__(name: str) -> Any:
    """Load a public name (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module 'forerun' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    """List the public names."""
    return sorted(__all__)
