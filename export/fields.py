"""Typed access to loosely typed settings (config.json, GGUF metadata)."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from forerun.errors import SourceError

MAX_JSON_BYTES = 64 << 20
_REQUIRED: Any = object()


class Fields:
    """Settings read by name, each checked for its type when it is asked for.

    Args:
        data: the settings; a key whose value is None counts as absent.
        where: shown in errors, e.g. the path of the file.
        prefix: put before every name.
    """

    def __init__(self, data: Mapping[str, Any], where: str, prefix: str = "") -> None:
        self.data, self.where, self.prefix = data, where, prefix

    def raw(self, name: str) -> Any:
        """The value as it is, or None."""
        return self.data.get(self.prefix + name)

    def integer(self, name: str, default: Any = _REQUIRED) -> Any:
        """An int; bools and floats are refused."""
        return self._get(name, default, int, "an integer")

    def number(self, name: str, default: Any = _REQUIRED) -> Any:
        """A finite float (ints are converted)."""
        value = self.raw(name)
        if type(value) is int and abs(value) < 1 << 53:
            return float(value)
        value = self._get(name, default, float, "a number")
        if isinstance(value, float) and not math.isfinite(value):
            raise self.error(name, value, "a finite number")
        return value

    def flag(self, name: str, default: Any = _REQUIRED) -> Any:
        """A bool."""
        return self._get(name, default, bool, "true or false")

    def text(self, name: str, default: Any = _REQUIRED) -> Any:
        """A string."""
        return self._get(name, default, str, "a string")

    def error(self, name: str, value: Any, wanted: str) -> SourceError:
        """The error for a value of the wrong kind."""
        shown = repr(value)
        shown = shown if len(shown) < 60 else shown[:57] + "..."
        return SourceError(f"{self.where}: {self.prefix}{name} is {shown}, expected {wanted}")

    def _get(self, name: str, default: Any, kind: type, wanted: str) -> Any:
        value = self.raw(name)
        if value is None:
            if default is _REQUIRED:
                raise SourceError(f"{self.where}: {self.prefix}{name} is missing")
            return default
        if type(value) is not kind:
            raise self.error(name, value, wanted)
        return value


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file.

    Raises:
        SourceError: it is missing, larger than 64 MiB, not JSON or not an object.
    """
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise SourceError(f"{path} is over {MAX_JSON_BYTES >> 20} MiB; not a settings file")
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SourceError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise SourceError(f"{path} is not valid JSON ({error})") from None
    if not isinstance(data, dict):
        raise SourceError(f"{path} does not hold a JSON object")
    return data
