"""Pictures of what quantization costs: quality against bytes, and quality against speed."""

from __future__ import annotations

import dataclasses
import importlib
import json
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from forerun.apps.bench.plot_labels import place_labels
from forerun.errors import OptionError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

CACHED = 4096
# Values that differ by more get a logarithmic axis.
_LOG_FROM = 6
MAX_JSON_BYTES = 64 << 20
_WIDTH, _HEIGHT, _DPI = 13.0, 6.6, 150
_INK, _GREY = "#222222", "#777777"
# Okabe and Ito's colours, which colour-blind people can tell apart; the markers differ as well.
FAMILIES = {
    "weights": ("#0072b2", "o", "weights"),
    "kv": ("#d55e00", "s", "KV cache"),
    "skip": ("#009e73", "^", "skipped feed-forward blocks"),
    "peer": ("#6a4c93", "D", "other runtimes"),
}


@dataclass(frozen=True)
class Point:
    """One method.

    Attributes:
        model: of which it is a form.
        label: what is written beside it.
        family: of `FAMILIES`.
        megabytes: of weights and a KV cache of `CACHED` tokens.
        kl: mean divergence from the reference, in nats; 0 is the reference itself.
        tok_s: tokens a second, None if that was not measured.
        is_other_text: measured by `bench quality`, on less text.
    """

    model: str
    label: str
    family: str
    megabytes: float
    kl: float
    tok_s: float | None
    is_other_text: bool = False


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


def read_saved(path: Path) -> list[dict[str, Any]]:
    """Read rows that ``evaluate --json`` or ``bench quality --json`` wrote.

    Returns:
        The rows; those of `bench quality` have a field `runtime` and get the model's name.

    Raises:
        OptionError: the file is missing, or neither of the two wrote it.
    """
    try:
        with open(path, encoding="utf-8") as stream:
            data = json.loads(stream.read(MAX_JSON_BYTES))
    except OSError as error:
        raise OptionError(f"{path} cannot be read: {error.strerror or error}") from None
    except (ValueError, RecursionError):
        raise OptionError(f"{path} is not valid JSON") from None
    rows = data.get("rows", [data]) if isinstance(data, dict) else None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        rows = []
    if not rows or not all("kl_mean" in row for row in rows):
        raise OptionError(
            f"{path} holds no figures; give what `forerun evaluate --json` or "
            "`forerun bench quality --json` wrote"
        )
    return [{"model": data.get("model"), **row} for row in rows]


def to_points(rows: Sequence[dict[str, Any]]) -> list[Point]:
    """Turn rows into points; forms of ours that `bench quality` measured too are left out.

    Raises:
        OptionError: a row lacks a field, or its divergence was not measured.
    """
    points = []
    for row in rows:
        if row.get("runtime") == "forerun":
            continue
        try:
            points.append(_peer(row) if "runtime" in row else _ours(row))
        except (KeyError, TypeError, ValueError):
            name = row.get("label") or row.get("weights") or "a row"
            raise OptionError(
                f"{name} cannot be drawn: it lacks its divergence or its size; "
                "measure it with --against"
            ) from None
    if not points:
        raise OptionError("there is nothing to draw")
    return _shortened(points)


def _shortened(points: list[Point]) -> list[Point]:
    """Leave the weights out of labels where all rows of the KV cache and of skipping share them."""
    marked = [point for point in points if point.family in ("kv", "skip")]
    bases = {point.label.partition(", ")[0] for point in marked}
    if len(bases) != 1:
        return points
    return [
        dataclasses.replace(point, label=point.label.partition(", ")[2])
        if point.family in ("kv", "skip")
        else point
        for point in points
    ]


def _ours(row: dict[str, Any]) -> Point:
    is_kv = row.get("kv") or row.get("window")
    family = "skip" if row.get("ffn_skip") else "kv" if is_kv else "weights"
    cached = min(CACHED, row.get("window") or CACHED)
    nbytes = row["weight_bytes"] + cached * row["kv_bytes_per_token"]
    speed = row.get("decode_tok_s") or {}
    return Point(
        str(row["model"]),
        str(row["label"]),
        family,
        nbytes / 1e6,
        float(row["kl_mean"]),
        speed.get("median"),
    )


def _peer(row: dict[str, Any]) -> Point:
    nbytes = row["bytes"] + CACHED * row["kv_bytes_per_token"]
    label = f"{row['runtime']} {row['weights']}"
    return Point(str(row["model"]), label, "peer", nbytes / 1e6, float(row["kl_mean"]), None, True)


def write_quality_plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw two panels for every model: quality against bytes, and quality against speed.

    Args:
        rows: of `evaluate_all`, or of `read_saved`.
        path: file to write.

    Raises:
        OptionError: see `to_points` and `check_plot`.
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
    size_label = f"weights and KV cache of {CACHED} tokens, MB"
    drawn = [
        (left, _draw(left, [(p, p.megabytes) for p in points], size_label)),
        (right, _draw(right, [(p, p.tok_s) for p in timed], "decoding, tokens per second")),
    ]
    _share_heights(pair, points)
    left.set_title(f"{model}: quality against bytes", loc="left", fontweight="bold", fontsize=12)
    right.set_title(f"{model}: quality against speed", loc="left", fontweight="bold", fontsize=12)
    left.set_ylabel("mean KL to the reference, nats (lower is better)")
    if not timed:
        right.text(0.5, 0.5, "no speed was measured", transform=right.transAxes, ha="center")
    return drawn


def _legend(figure: Any, axes: Any, points: list[Point]) -> None:
    """One row above all panels, where it cannot cover a point."""
    families = dict.fromkeys(point.family for point in points if point.kl > 0)
    handles = [_mark(axes, [], [], name, name == "peer") for name in families]
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
    skips = sorted((p.kl, value) for p, value in points if p.family == "skip" and p.kl > 0)
    if skips:
        heights, places = zip(*skips, strict=True)
        axes.plot(places, heights, color=FAMILIES["skip"][0], linewidth=1, alpha=0.5, zorder=2)
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
