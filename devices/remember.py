"""Measurements that are kept between runs: one JSON file per kind, one entry per key."""

from __future__ import annotations

import contextlib
import json
import os
import time
from pathlib import Path
from typing import Any

from forerun.devices.home import home
from forerun.devices.table import cpu_name
from forerun.devices.threads import usable_cores

_MOST_ENTRIES = 64


class Remembered:
    """Entries of one kind of measurement, for this machine only.

    A damaged or unreadable file counts as empty: what was lost is measured again. Where nothing
    can be written, nothing is remembered.

    Args:
        name: of the file, e.g. ``costs``.
        folder: where it lies; None takes the cache folder of `home`.
    """

    def __init__(self, name: str, folder: Path | None = None) -> None:
        self._path = (folder or home() / "cache") / f"{name}.json"

    def read(self, key: str) -> Any:
        """Plain JSON data of an entry, or None."""
        entry = self._load().get(_full(key))
        return entry.get("value") if isinstance(entry, dict) else None

    def write(self, key: str, value: Any) -> None:
        """Keep an entry; beyond 64 the oldest is dropped."""
        entries = self._load()
        entries[_full(key)] = {"at": int(time.time()), "value": value}
        kept = sorted(entries.items(), key=lambda item: _age(item[1]))[-_MOST_ENTRIES:]
        temporary = self._path.with_name(f"{self._path.name}.{os.getpid()}")
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_text(json.dumps(dict(kept), indent=1), encoding="utf-8")
            temporary.replace(self._path)
        except OSError:
            with contextlib.suppress(OSError):
                temporary.unlink()

    def _load(self) -> dict[str, Any]:
        try:
            data = json.loads(self._path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return {}
        return data if isinstance(data, dict) else {}


def _age(entry: Any) -> float:
    at = entry.get("at") if isinstance(entry, dict) else None
    return at if type(at) is int else 0


def _full(key: str) -> str:
    return f"{cpu_name()}/{usable_cores()} cores/{key}"
