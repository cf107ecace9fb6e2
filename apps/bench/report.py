"""Tables of a finished benchmark."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from forerun.apps.bench.spread import SCATTER_LIMIT

_UNSTEADY = "~"
_FILE_WIDTH = 120


def print_report(result: dict[str, Any], console: Console | None = None) -> None:
    """Print rows, ratios, what was left out and every warning.

    Args:
        result: as `text.run` returns it.
        console: where to; default stdout.
    """
    screen = console or Console()
    if not screen.is_terminal:
        screen.width = max(screen.width, _FILE_WIDTH)
    about = result["machine"]
    screen.print(
        f"{result['model']}, {about['cpu']}, {about['cores']} cores, {result['threads']} threads, "
        f"median (min-max) of {result['runs']} interleaved runs",
        highlight=False,
        soft_wrap=True,
    )
    screen.print(_rows_table(result["rows"]))
    if result["ratios"]:
        screen.print(_ratio_table(result["ratios"]))
    for line in notes(result):
        screen.print(line, highlight=False, markup=False, soft_wrap=True)


def notes(result: dict[str, Any]) -> list[str]:
    """Everything that must be said beside the tables: warnings, scatter, who was left out."""
    lines = [f"warning: {text}" for text in result["warnings"]]
    shaky = [row for row in result["ratios"] if not row["steady"]]
    if shaky:
        lines.append(
            f"warning: {_UNSTEADY} marks {len(shaky)} of {len(result['ratios'])} ratios whose runs "
            f"scatter by more than {SCATTER_LIMIT:.0%}; measure again on an idle machine"
        )
    lines += [f"left out: {title}: {why}" for title, why in result["left_out"].items()]
    return lines


def _rows_table(rows: list[dict[str, Any]]) -> Table:
    table = Table()
    table.add_column("runtime")
    for name in ("depth", "prefill tok/s", "decode tok/s", "TTFT ms", "session share", "peak MB"):
        table.add_column(name, justify="right")
    last = None
    for row in rows:
        if last is not None and row["depth"] != last:
            table.add_section()
        last = row["depth"]
        share = row["session_share"]
        table.add_row(
            f"{row['runtime']} {row['weights']}",
            str(row["depth"]),
            _cell(row["prefill_tok_s"], 0),
            _cell(row["decode_tok_s"], 1),
            _cell(row["ttft_ms"], 0),
            f"{share['median']:.3f}" if share else "",
            "" if row["peak_rss_mb"] is None else f"{row['peak_rss_mb']:.0f}",
        )
    return table


def _cell(figure: dict[str, Any] | None, digits: int) -> str:
    if figure is None:
        return ""
    low, high = f"{figure['min']:.{digits}f}", f"{figure['max']:.{digits}f}"
    mark = _UNSTEADY if figure["scatter"] > SCATTER_LIMIT else ""
    return f"{mark}{figure['median']:.{digits}f} ({low}-{high})"


def _ratio_table(ratios: list[dict[str, Any]]) -> Table:
    """Peers down, measurements across; each cell is how many times faster forerun is."""
    table = Table(title="forerun is faster by", title_justify="left")
    table.add_column("than")
    columns = list(dict.fromkeys((row["what"], row["depth"]) for row in ratios))
    for what, depth in sorted(columns):
        table.add_column(_heading(what, depth), justify="right")
    for peer in dict.fromkeys((row["peer"], row["weights"]) for row in ratios):
        cells = {
            (row["what"], row["depth"]): f"{'' if row['steady'] else _UNSTEADY}{row['ratio']:.2f}x"
            for row in ratios
            if (row["peer"], row["weights"]) == peer
        }
        table.add_row(" ".join(peer), *(cells.get(column, "") for column in sorted(columns)))
    return table


def _heading(what: str, depth: int) -> str:
    kind = what.split("_")[0]
    if kind == "prefill":
        return f"prefill {depth or 512}"
    return f"decode at {depth}"
