"""`forerun devices`: what can run models here."""

from __future__ import annotations

from forerun.apps.cli import options
from forerun.apps.cli.output import emit_json, emit_table

HELP = """List the devices forerun knows, and which of them are here.

\b
forerun devices
forerun devices --json
"""

_COLUMNS = ("name", "provider", "available", "detail")


def devices(as_json: options.Json = False) -> None:
    """List devices; `HELP` is what the user reads."""
    from forerun.devices.table import list_devices

    rows = [tuple(getattr(row, column) for column in _COLUMNS) for row in list_devices()]
    if as_json:
        emit_json({"devices": [dict(zip(_COLUMNS, row, strict=True)) for row in rows]})
    else:
        emit_table(_COLUMNS, rows)
