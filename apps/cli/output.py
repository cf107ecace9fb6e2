"""What goes to standard output: streamed text, one JSON object, or a table. Nothing else does."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from forerun.apps.cli.report import OutputClosed

# A model may write any character; those that steer a terminal are shown instead of obeyed.
_VISIBLE = {i: 0x2400 + i for i in range(32) if chr(i) not in "\n\t"}
_VISIBLE |= {0x7F: 0x2421, **dict.fromkeys(range(128, 160), 65533)}
_WIDE = 200


def emit(text: str) -> None:
    """Write text to standard output at once.

    Raises:
        OutputClosed: whoever read standard output has closed it.
    """
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        raise OutputClosed from None


def emit_answer(text: str) -> None:
    """Write a piece of an answer; on a terminal, control characters become visible signs."""
    emit(text.translate(_VISIBLE) if sys.stdout.isatty() else text)


def emit_json(value: Any) -> None:
    """Write one JSON object and a line end; infinities and NaN become null."""
    utf8 = (sys.stdout.encoding or "").lower().replace("-", "") == "utf8"
    emit(to_json(value, ascii_only=not utf8) + "\n")


def to_json(value: Any, ascii_only: bool = False) -> str:
    """Return the value as JSON on one line; infinities and NaN, which JSON lacks, become null."""
    return json.dumps(_finite(value), ensure_ascii=ascii_only, allow_nan=False)


def emit_table(columns: Sequence[str], rows: Iterable[Sequence[object]], title: str = "") -> None:
    """Write a table to standard output, see `render_table`."""
    # A pipe has no width: tables are then as wide as they need to be.
    emit(render_table(columns, rows, title, width=None if sys.stdout.isatty() else _WIDE))


def render_table(
    columns: Sequence[str],
    rows: Iterable[Sequence[object]],
    title: str = "",
    width: int | None = _WIDE,
) -> str:
    """Return a table with its line ends.

    Numbers are right-aligned, floats get four significant digits.

    Args:
        columns: their names.
        rows: a cell for each column.
        title: above the table.
        width: most characters of a line; None takes those of the terminal.
    """
    from rich.console import Console
    from rich.table import Table

    kept = [list(row) for row in rows]
    table = Table(title=title or None, title_justify="left")
    for index, name in enumerate(columns):
        numeric = bool(kept) and all(type(row[index]) in (int, float) for row in kept)
        table.add_column(name, justify="right" if numeric else "left", overflow="fold")
    for row in kept:
        table.add_row(*(_cell(value) for value in row))
    console = Console(width=width, markup=False, highlight=False)
    with console.capture() as captured:
        console.print(table)
    return "\n".join(line.rstrip() for line in captured.get().splitlines()) + "\n"


def _cell(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    return "" if value is None else str(value)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    # numpy numbers come from measurements; they turn into plain ones through item().
    item = getattr(value, "item", None)
    return _finite(item()) if item is not None else value
