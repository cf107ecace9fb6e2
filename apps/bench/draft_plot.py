"""A bar chart of speed-ups as SVG, written without any drawing library."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING, Any

from forerun.apps.bench.spread import SCATTER_LIMIT
from forerun.errors import OptionError

if TYPE_CHECKING:
    from pathlib import Path

_COLOURS = ("#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9", "#999999", "#f0e442")
_LEFT, _TOP, _GROUP_GAP, _BAR, _HEIGHT = 46, 34, 18, 13, 220
_NAME_WIDTH = 72
_PANEL = _TOP + _HEIGHT + 34
_LEGEND_ROW = 18


def check_plot_path(path: Path) -> None:
    """Refuse a file that a plot cannot be written to.

    Raises:
        OptionError: its name does not end in ``.svg``, or its folder is missing.
    """
    if path.suffix.lower() != ".svg":
        raise OptionError(f"the plot is written as SVG; {path.name!r} must end in .svg")
    if not path.absolute().parent.is_dir():
        raise OptionError(f"{path.absolute().parent} is not a folder; make it first")


def write_plot(result: dict[str, Any], path: Path) -> None:
    """Write bars of the speed-up by category and drafter, one panel for each temperature.

    Args:
        result: as `draft.run` returns it.
        path: file to write.
    """
    path.write_text(plot(result), encoding="utf-8")


def plot(result: dict[str, Any]) -> str:
    """Return the chart as SVG text."""
    rows = [row for row in result["rows"] if row["speedup"]]
    drafters = list(dict.fromkeys(row["drafter"] for row in rows))
    categories = list(dict.fromkeys(row["category"] for row in rows))
    temperatures = list(dict.fromkeys(row["temperature"] for row in rows))
    top = max([1.5, *(row["speedup"]["max"] for row in rows)]) * 1.08
    group = _group(drafters)
    width = max(_LEFT + group * len(categories) + 20, 420)
    height = _PANEL * len(temperatures) + _LEGEND_ROW * (len(drafters) + 1)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        f'viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="12">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
    ]
    for number, temperature in enumerate(temperatures):
        title = "greedy" if temperature == 0 else f"temperature {temperature:g}"
        offset = number * _PANEL
        here = [row for row in rows if row["temperature"] == temperature]
        parts += _axes(offset, width, top, f"{result['model']}: speed-up, {title}")
        parts += _bars(offset, top, here, categories, drafters)
    parts += _legend(_PANEL * len(temperatures), drafters)
    return "\n".join([*parts, "</svg>"]) + "\n"


def _group(drafters: list[str]) -> int:
    """Width of a category: its bars and a gap, and not less than its name takes."""
    return max(_GROUP_GAP + _BAR * len(drafters), _NAME_WIDTH)


def _y(offset: int, value: float, top: float) -> float:
    return round(offset + _TOP + _HEIGHT * (1 - value / top), 1)


def _axes(offset: int, width: int, top: float, title: str) -> list[str]:
    """Title, a line for every half, and a strong one for plain decoding."""
    parts = [_text(_LEFT, offset + 18, title, weight="bold")]
    for half in range(int(top * 2) + 1):
        value, y = half / 2, _y(offset, half / 2, top)
        colour = "#333" if half == 2 else "#ddd"
        parts.append(f'<line x1="{_LEFT}" x2="{width - 10}" y1="{y}" y2="{y}" stroke="{colour}"/>')
        parts.append(_text(_LEFT - 6, y + 4, f"{value:g}x", anchor="end"))
    return parts


def _bars(
    offset: int,
    top: float,
    rows: list[dict[str, Any]],
    categories: list[str],
    drafters: list[str],
) -> list[str]:
    """A bar to the median, and a thin line from the slowest run to the fastest."""
    parts, group = [], _group(drafters)
    for row in rows:
        place, colour = _place(row, categories, drafters, group)
        speed = row["speedup"]
        y, bottom = _y(offset, speed["median"], top), _y(offset, 0, top)
        fade = "" if row["steady"] else ' fill-opacity="0.45"'
        parts.append(
            f'<rect x="{place}" y="{y}" width="{_BAR - 2}" height="{round(bottom - y, 1)}" '
            f'fill="{colour}"{fade}><title>{escape(row["drafter"])} {speed["median"]:.2f}x</title>'
            "</rect>"
        )
        middle = place + (_BAR - 2) / 2
        low, high = _y(offset, speed["min"], top), _y(offset, speed["max"], top)
        parts.append(f'<line x1="{middle}" x2="{middle}" y1="{low}" y2="{high}" stroke="#222"/>')
    for number, name in enumerate(categories):
        middle = _LEFT + number * group + group / 2
        parts.append(_text(middle, offset + _TOP + _HEIGHT + 18, name, anchor="middle"))
    return parts


def _place(
    row: dict[str, Any], categories: list[str], drafters: list[str], group: int
) -> tuple[int, str]:
    """Left edge and colour of a row's bar."""
    bar = drafters.index(row["drafter"])
    margin = (group - _BAR * len(drafters)) // 2
    left = _LEFT + categories.index(row["category"]) * group + margin + bar * _BAR
    return left, _COLOURS[bar % len(_COLOURS)]


def _legend(offset: int, drafters: list[str]) -> list[str]:
    parts = []
    for number, name in enumerate(drafters):
        y, colour = offset + number * _LEGEND_ROW, _COLOURS[number % len(_COLOURS)]
        parts.append(f'<rect x="{_LEFT}" y="{y}" width="11" height="11" fill="{colour}"/>')
        parts.append(_text(_LEFT + 18, y + 10, name))
    note = f"pale: the runs scatter by more than {SCATTER_LIMIT:.0%}"
    return [*parts, _text(_LEFT, offset + len(drafters) * _LEGEND_ROW + 10, note)]


def _text(x: float, y: float, text: str, anchor: str = "start", weight: str = "normal") -> str:
    style = f'text-anchor="{anchor}" font-weight="{weight}"'
    return f'<text x="{x}" y="{y}" {style}>{escape(text)}</text>'
