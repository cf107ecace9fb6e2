"""Labels beside the points of a chart, placed so that none covers another or a point."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

Box = tuple[float, float, float, float]

_SIZE = 8.5
_NEAR, _POINT, _PAD = 8.0, 6.0, 1.5
_RINGS = 9
_DIRECTIONS = 16
_INK, _LEADER = "#222222", "#aaaaaa"


def place_labels(axes: Any, points: Sequence[tuple[str, float, float]], renderer: Any) -> None:
    """Write a label beside every point; one that had to go further away gets a thin line.

    Args:
        axes: of matplotlib, laid out and with its final limits.
        points: label, x and y in data coordinates.
        renderer: of the figure's canvas, which measures texts.
    """
    scale = axes.figure.dpi / 72
    spots = [tuple(axes.transData.transform((x, y))) for _, x, y in points]
    taken = [_around(x, y, _POINT * scale) for x, y in spots]
    taken += [_box(text.get_window_extent(renderer)) for text in axes.texts]
    taken += [
        _upright(line.get_window_extent(renderer)) for line in axes.lines if _is_upright(line)
    ]
    frame = _box(axes.get_window_extent(renderer))
    # The crowded ones first: those alone find a place anyway.
    order = sorted(range(len(points)), key=lambda i: _nearest(spots, i))
    for index in order:
        name, x, y = points[index]
        text = axes.annotate(
            name, (x, y), (0, 0), textcoords="offset points", fontsize=_SIZE, color=_INK, zorder=4
        )
        extent = text.get_window_extent(renderer)
        width, height = extent.width, extent.height
        left, bottom, ring = choose_place(
            spots[index], (width, height), taken, frame, _NEAR * scale
        )
        text.set_position(((left - spots[index][0]) / scale, (bottom - spots[index][1]) / scale))
        box = (left, bottom, left + width, bottom + height)
        taken.append(box)
        if ring:
            _leader(axes, spots[index], box)


def choose_place(
    spot: tuple[float, ...], size: tuple[float, float], taken: list[Box], frame: Box, near: float
) -> tuple[float, float, int]:
    """Find the nearest free place for a box around a point.

    Args:
        spot: the point, in pixels.
        size: width and height of the box.
        taken: boxes (left, bottom, right, top) that must stay free.
        frame: the box must lie within it.
        near: distance of the first ring of places.

    Returns:
        Left and bottom of the box, and the number of its ring from 0; where nothing is free, the
        place with the least overlap.
    """
    best: tuple[float, float, int] | None = None
    least = math.inf
    for left, bottom, ring in _places(spot, size, near):
        box = (left - _PAD, bottom - _PAD, left + size[0] + _PAD, bottom + size[1] + _PAD)
        cost = sum(_overlap(box, other) for other in taken) + 4 * _outside(box, frame)
        if cost < least:
            best, least = (left, bottom, ring), cost
        if not cost:
            break
    assert best is not None
    return best


def _places(
    spot: tuple[float, ...], size: tuple[float, float], near: float
) -> Iterator[tuple[float, float, int]]:
    """Places on growing rings: to the right first, then left, above, below and between."""
    turns = sorted(range(_DIRECTIONS), key=lambda i: (i % 8 != 0, i % 4 != 0, i % 2 != 0, i))
    for ring in range(_RINGS):
        reach = near * (1 + 0.9 * ring)
        for turn in turns:
            angle = 2 * math.pi * turn / _DIRECTIONS
            across, up = math.cos(angle), math.sin(angle)
            left = spot[0] + across * reach + (across - 1) / 2 * size[0]
            bottom = spot[1] + up * reach + (up - 1) / 2 * size[1]
            yield left, bottom, ring


def _leader(axes: Any, spot: tuple[float, ...], box: Box) -> None:
    """A thin line from a point to the nearest edge of its label."""
    end = (min(max(spot[0], box[0]), box[2]), min(max(spot[1], box[1]), box[3]))
    ends = axes.transData.inverted().transform([spot, end])
    axes.plot(*zip(*ends, strict=True), color=_LEADER, linewidth=0.7, zorder=2)


def _nearest(spots: Sequence[tuple[float, ...]], index: int) -> float:
    others = [math.dist(spots[index], spot) for i, spot in enumerate(spots) if i != index]
    return min(others, default=math.inf)


def _around(x: float, y: float, reach: float) -> Box:
    return x - reach, y - reach, x + reach, y + reach


def _is_upright(line: Any) -> bool:
    return len(line.get_xdata()) > 1 == len(set(line.get_xdata()))


def _upright(extent: Any) -> Box:
    # An upright line has no width of its own.
    return extent.x0 - _PAD, extent.y0, extent.x1 + _PAD, extent.y1


def _box(extent: Any) -> Box:
    return extent.x0, extent.y0, extent.x1, extent.y1


def _overlap(a: Box, b: Box) -> float:
    across, up = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    return across * up if across > 0 and up > 0 else 0.0


def _outside(box: Box, frame: Box) -> float:
    area = (box[2] - box[0]) * (box[3] - box[1])
    return area - _overlap(box, frame)
