"""Tables of a finished `forerun bench draft`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from forerun.apps.bench.draft_rows import ALL
from forerun.apps.bench.spread import SCATTER_LIMIT

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

UNSTEADY = "~"
_CIRCLES = 0.5
_FILE_WIDTH = 160


def print_report(result: dict[str, Any], console: Console | None = None) -> None:
    """Print speed-ups, what the drafters did, the peers, the simulation and every warning.

    Args:
        result: as `draft.run` returns it.
        console: where to; default stdout.
    """
    from rich.console import Console as RichConsole

    screen = console or RichConsole()
    if not screen.is_terminal:
        screen.width = max(screen.width, _FILE_WIDTH)
    about = result["machine"]
    screen.print(
        f"{result['model']} {result['weights']}, {about['cpu']}, {about['cores']} cores, "
        f"{result['threads']} threads, "
        f"{result['prompts']} prompts, up to {result['max_tokens']} tokens, median (min-max) of "
        f"{result['repeat']} interleaved run{'s' if result['repeat'] > 1 else ''}",
        highlight=False,
        soft_wrap=True,
    )
    for table in _tables(result):
        screen.print(table)
    for line in notes(result):
        screen.print(line, highlight=False, markup=False, soft_wrap=True)


def _tables(result: dict[str, Any]) -> list[Table]:
    tables = []
    for temperature in dict.fromkeys(row["temperature"] for row in result["rows"]):
        tables.append(_speed_table(result, temperature))
    if result["rows"]:
        tables.append(_drafting_table(result["overall"]["by_drafter"]))
    if result["peers"]:
        tables += [_peers_table(result["peers"]["rows"]), _against_table(result["peers"])]
    if result["simulated"]:
        from forerun.apps.bench.simulate import SimulatedRow, simulated_table

        tables.append(simulated_table([SimulatedRow(**row) for row in result["simulated"]]))
    return tables


def notes(result: dict[str, Any]) -> list[str]:
    """Everything that must be said beside the tables."""
    lines = [f"warning: {text}" for text in result["warnings"]]
    shaky = [row for row in result["rows"] if row["steady"] is False]
    if shaky:
        lines.append(
            f"warning: {UNSTEADY} marks {len(shaky)} of {len(result['rows'])} speed-ups whose runs "
            f"scatter by more than {SCATTER_LIMIT:.0%}; measure again on an idle machine"
        )
    if result["repeat"] == 1 and result["rows"]:
        lines.append("warning: one run only, so the scatter is not known; give --repeat 3")
    lines += [_difference(name, kinds) for name, kinds in _differing(result["overall"])]
    lines += _circles((result["peers"] or {}).get("rows", []))
    return lines + [f"left out: {name}: {why}" for name, why in result["left_out"].items()]


def _circles(rows: list[dict[str, Any]]) -> list[str]:
    """Who writes texts so repetitive that drafting from them proves little."""
    shares = {
        f"{row['runtime']} {row['weights']}": row["distinct_4grams"]
        for row in rows
        if row["category"] == ALL and (row["distinct_4grams"] or 1.0) < _CIRCLES
    }
    return [
        f"texts: those of {name} go in circles (share of distinct 4-grams {share:.2f}), which "
        "drafting from the text gains from"
        for name, share in shares.items()
    ]


def _differing(overall: dict[str, Any]) -> list[tuple[str, list[dict[str, Any]]]]:
    found = []
    for name, kinds in overall["by_drafter"].items():
        other = [figures for figures in kinds.values() if not figures["identical"]]
        if other:
            found.append((name, other))
    return found


def _difference(name: str, kinds: list[dict[str, Any]]) -> str:
    texts = sum(kind["texts"] for kind in kinds)
    other = texts - sum(kind["same_texts"] for kind in kinds)
    ties = sum(kind["near_ties"] for kind in kinds)
    gap = max((kind["largest_gap"] or 0.0 for kind in kinds), default=0.0)
    return (
        f"texts: {name}: {other} of {texts} are not those of plain decoding; {ties} of them part "
        f"at a near-tie, the largest gap is {gap:.3f}"
    )


def _speed_table(result: dict[str, Any], temperature: float) -> Table:
    """Drafters down, categories across; each cell is the speed-up against plain decoding."""
    from rich.table import Table

    kind = "sampled" if temperature > 0 else "greedy"
    rows = [row for row in result["rows"] if row["temperature"] == temperature]
    categories = list(dict.fromkeys(row["category"] for row in rows))
    title = "greedy" if temperature == 0 else f"temperature {temperature:g}"
    table = Table(title=f"speed-up against plain decoding, {title}", title_justify="left")
    table.add_column("drafter")
    for name in (*categories, "all", "tok/s", "plain tok/s"):
        table.add_column(name, justify="right")
    for drafter in dict.fromkeys(row["drafter"] for row in rows):
        cells = {row["category"]: row for row in rows if row["drafter"] == drafter}
        total = result["overall"]["by_drafter"][drafter][kind]
        table.add_row(
            drafter,
            *(_speed(cells.get(name)) for name in categories),
            _speed(total),
            _number(total["tok_s"], 1),
            _number(total["plain_tok_s"], 1),
        )
    shares = {row["category"]: row["distinct_4grams"] for row in rows}
    everything = next(iter(result["overall"]["by_drafter"].values()))[kind]["distinct_4grams"]
    table.add_section()
    table.add_row(
        "distinct 4-grams",
        *(_number(shares[name], 2) for name in categories),
        _number(everything, 2),
        "",
        "",
    )
    return table


def _drafting_table(by_drafter: dict[str, dict[str, Any]]) -> Table:
    from rich.table import Table

    table = Table(title="what the drafters did", title_justify="left")
    table.add_column("drafter")
    names = ("", "tokens/round", "acceptance", "draft ms/round", "verify ms/round", "same texts")
    for name in names:
        table.add_column(name, justify="right")
    for drafter, kinds in by_drafter.items():
        for kind, figures in kinds.items():
            ties = f", {figures['near_ties']} near-ties" if figures["near_ties"] else ""
            table.add_row(
                drafter,
                kind,
                _number(figures["tokens_per_round"], 2),
                _number(figures["acceptance"], 3),
                _number(figures["draft_ms_per_round"], 2),
                _number(figures["verify_ms_per_round"], 2),
                f"{figures['same_texts']} of {figures['texts']}{ties}",
            )
    return table


def _peers_table(rows: list[dict[str, Any]]) -> Table:
    """Each runtime and mode: tokens per second and what speculation gains it, by category."""
    from rich.table import Table

    table = Table(
        title="runtimes, greedy: tok/s (against the same runtime's plain decoding)",
        title_justify="left",
    )
    table.add_column("runtime")
    categories = list(dict.fromkeys(row["category"] for row in rows))
    for name in (*categories, "distinct 4-grams"):
        table.add_column(name, justify="right")
    for title in dict.fromkeys((row["runtime"], row["weights"], row["mode"]) for row in rows):
        cells = {
            row["category"]: row
            for row in rows
            if (row["runtime"], row["weights"], row["mode"]) == title
        }
        distinct = next(reversed(cells.values()))["distinct_4grams"]
        figures = (_peer_cell(cells.get(name)) for name in categories)
        table.add_row(" ".join(title), *figures, _number(distinct, 2))
    return table


def _peer_cell(row: dict[str, Any] | None) -> str:
    if row is None or row["tok_s"] is None:
        return ""
    gain = f" ({_speed(row)})" if row["speedup"] else ""
    return f"{row['tok_s']['median']:.1f}{gain}"


def _against_table(peers: dict[str, Any]) -> Table:
    from rich.table import Table

    table = Table(title=f"forerun {peers['drafter']} is faster by", title_justify="left")
    table.add_column("than the best")
    table.add_column("which is")
    table.add_column("on")
    table.add_column("ratio", justify="right")
    for row in peers["ratios"]:
        table.add_row(
            row["what"], row["peer"], row["category"], _mark(row) + f"{row['ratio']:.2f}x"
        )
    return table


def _speed(row: dict[str, Any] | None) -> str:
    if row is None or row["speedup"] is None:
        return ""
    speed = row["speedup"]
    spread = f" ({speed['min']:.2f}-{speed['max']:.2f})" if len(speed["runs"]) > 1 else ""
    return f"{_mark(row)}{speed['median']:.2f}x{spread}"


def _mark(row: dict[str, Any]) -> str:
    return "" if row["steady"] else UNSTEADY


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"
