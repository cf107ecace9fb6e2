"""Pictures of what quantization costs: quality against bytes, and quality against speed."""

from __future__ import annotations

import importlib
import math
from typing import TYPE_CHECKING, Any

from forerun.apps.bench.plot_labels import place_labels
from forerun.apps.bench.quality_points import (
    CACHED,
    KV,
    PEER,
    SKIP,
    WEIGHTS,
    Point,
    common_depth,
    shared_weights,
    to_points,
)
from forerun.errors import OptionError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

# Values that differ by more get a logarithmic axis.
_LOG_FROM = 6
_WIDTH, _HEIGHT, _DPI = 13.0, 6.6, 150
_INK, _GREY = "#222222", "#777777"
# Okabe and Ito's colours, which colour-blind people can tell apart; the markers differ as well.
FAMILIES = {
    WEIGHTS: ("#0072b2", "o", "weights"),
    KV: ("#d55e00", "s", "KV cache"),
    SKIP: ("#009e73", "^", "skipped feed-forward blocks"),
    PEER: ("#6a4c93", "D", "other runtimes"),
}


def check_plot(path: Path) -> None:
    """Refuse a picture that could not be drawn, before anything is computed for it.

    Raises:
        OptionError: the name does not end in ``.png``, its folder is missing, or matplotlib is.
    """
    if path.suffix.lower() != ".png":
        raise OptionError(f"the plot is written as PNG; {path.name!r} must end in .png")
    if not path.absolute().parent.is_dir():
        raise OptionError(f"{path.absolute().parent} is not a folder; make it first")
    try:
        importlib.import_module("matplotlib")
    except ImportError:
        raise OptionError('--plot needs matplotlib: pip install "forerun[plot]"') from None


def write_quality_plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw two panels for every model: quality against bytes, and quality against speed.

    Args:
        rows: of `evaluate_all`, or of `quality_points.read_saved`.
        path: file to write.

    Raises:
        OptionError: see `quality_points.to_points` and `check_plot`.
    """
    check_plot(path)
    points = to_points(rows)
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # pyright: ignore[reportMissingImports]
    from matplotlib.figure import Figure  # pyright: ignore[reportMissingImports]

    models = list(dict.fromkeys(point.model for point in points))
    figure = Figure(figsize=(_WIDTH, _HEIGHT * len(models)), dpi=_DPI, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    grid: Any = figure.subplots(len(models), 2, squeeze=False)
    panels = []
    for pair, model in zip(grid, models, strict=True):
        panels += _draw_model(pair, model, [p for p in points if p.model == model])
    _legend(figure, grid[0][0], points)
    figure.supxlabel(_footnote(rows, points), fontsize=9, color=_GREY, x=0.01, ha="left")
    # The labels are placed by what is left free, which is known only once all else is laid out.
    canvas.draw()
    figure.set_layout_engine("none")
    for axes, drawn in panels:
        place_labels(axes, drawn, canvas.get_renderer())
    figure.savefig(path, metadata={"Software": "forerun"})


def _draw_model(pair: Any, model: str, points: list[Point]) -> list[tuple[Any, list[Any]]]:
    left, right = pair
    timed = [point for point in points if point.tok_s]
    depth = common_depth(timed)
    at = f" at depth {int(depth):,}" if depth else ""
    speeds = [] if depth is None else [(p, p.tok_s[depth]) for p in timed]
    size_label = f"weights and KV cache of {CACHED:,} tokens, MB"
    drawn = [
        (left, _draw(left, [(p, p.megabytes) for p in points], size_label)),
        (right, _draw(right, speeds, f"decoding{at}, tokens per second")),
    ]
    _share_heights(pair, points)
    left.set_title(f"{model}: quality against bytes", loc="left", fontweight="bold", fontsize=12)
    right.set_title(f"{model}: quality against speed", loc="left", fontweight="bold", fontsize=12)
    left.set_ylabel("mean KL to the reference, nats (lower is better)")
    if depth is None:
        why = "speeds were measured at different depths" if timed else "no speed was measured"
        right.text(0.5, 0.5, why, transform=right.transAxes, ha="center")
    return drawn


def _legend(figure: Any, axes: Any, points: list[Point]) -> None:
    """One row above all panels, where it cannot cover a point."""
    families = dict.fromkeys(point.family for point in points if point.kl > 0)
    handles = [_mark(axes, [], [], name, name == PEER) for name in families]
    shared = shared_weights(points)
    for name, handle in zip(families, handles, strict=True):
        if shared and name in (KV, SKIP):
            handle.set_label(f"{FAMILIES[name][2]} ({shared} weights)")
    if len(handles) > 1:
        place = "outside upper right"
        figure.legend(handles=handles, loc=place, ncols=len(handles), fontsize=9, frameon=False)


def _draw(axes: Any, points: list[tuple[Point, Any]], label: str) -> list[tuple[str, float, float]]:
    """Marks, and a dashed line where the reference lies; returns what is to be labelled."""
    axes.set_yscale("log")
    axes.set_xlabel(label)
    values = [value for _, value in points]
    if values and max(values) > _LOG_FROM * min(values):
        axes.set_xscale("log")
    skips = sorted((p.kl, value) for p, value in points if p.family == SKIP and p.kl > 0)
    if skips:
        heights, places = zip(*skips, strict=True)
        axes.plot(places, heights, color=FAMILIES[SKIP][0], linewidth=1, alpha=0.5, zorder=2)
    labels = []
    for point, value in points:
        if point.kl > 0:
            _mark(axes, [value], [point.kl], point.family, point.is_other_text)
            labels.append((point.label, value, point.kl))
        else:
            axes.axvline(value, color=_GREY, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
            axes.annotate(
                f"{point.label} (reference)",
                (value, 1),
                xycoords=("data", "axes fraction"),
                xytext=(-4, -6),
                textcoords="offset points",
                rotation=90,
                ha="right",
                va="top",
                fontsize=8.5,
                color=_GREY,
            )
    _style(axes)
    return labels


def _mark(axes: Any, x: list[float], y: list[float], family: str, hollow: bool) -> Any:
    colour, marker, words = FAMILIES[family]
    return axes.plot(
        x,
        y,
        linestyle="none",
        marker=marker,
        markersize=8,
        markerfacecolor="white" if hollow else colour,
        markeredgecolor=colour if hollow else "white",
        markeredgewidth=1.5 if hollow else 0.8,
        label=words,
        zorder=3,
    )[0]


def _style(axes: Any) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter  # pyright: ignore[reportMissingImports]

    axes.grid(True, which="major", color="#e4e4e4", linewidth=0.8)
    axes.grid(True, which="minor", color="#f3f3f3", linewidth=0.5)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color("#aaaaaa")
    axes.tick_params(colors=_INK, labelsize=9)
    plain = FuncFormatter(lambda value, _: f"{value:g}")
    for axis, scale in ((axes.xaxis, axes.get_xscale()), (axes.yaxis, axes.get_yscale())):
        if scale == "log":
            axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.set_major_formatter(plain)
            axis.set_minor_formatter(NullFormatter())
    axes.margins(x=0.12)


def _share_heights(pair: Any, points: list[Point]) -> None:
    """Give both panels one range, with room for labels above and below."""
    heights = [point.kl for point in points if point.kl > 0]
    if not heights:
        return
    low, high = math.log10(min(heights)), math.log10(max(heights))
    room = max(0.15 * (high - low), 0.18)
    for axes in pair:
        axes.set_ylim(10 ** (low - room), 10 ** (high + room))


def _footnote(rows: Sequence[dict[str, Any]], points: list[Point]) -> str:
    ours = [row for row in rows if "runtime" not in row]
    words = []
    if ours:
        contexts = ours[0].get("contexts") or []
        kinds = list(ours[0].get("by_text") or {})
        words.append(
            f"{ours[0].get('tokens', 0):,} positions of {', '.join(kinds)}; "
            f"contexts {', '.join(map(str, contexts))}; greedy decoding on the CPU"
        )
    if any(point.is_other_text for point in points):
        words.append("Hollow: from bench quality, contexts of 512 of prose and reference text")
    return ".  ".join(words)
