"""Rows of `evaluate` and of `bench quality` as points of a picture, and how those are called."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from forerun.errors import OptionError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

CACHED = 4096
MAX_JSON_BYTES = 64 << 20
WEIGHTS, KV, SKIP, PEER = "weights", "kv", "skip", "peer"
# What is said of the weights once instead of at every point.
_SHARED = (KV, SKIP)


@dataclass(frozen=True)
class Point:
    """One method.

    Attributes:
        model: of which it is a form.
        weights: form of its weights.
        label: what is written beside it.
        family: `WEIGHTS`, `KV`, `SKIP` or `PEER`.
        megabytes: of weights and a KV cache of `CACHED` tokens.
        kl: mean divergence from the reference, in nats; 0 is the reference itself.
        tok_s: cached tokens (``""`` where that is not known) to tokens a second; may be empty.
        layout: of its KV cache; None where that is not known.
        is_other_text: measured by `bench quality`, on less text.
    """

    model: str
    weights: str
    label: str
    family: str
    megabytes: float
    kl: float
    tok_s: dict[str, float] = field(default_factory=dict)
    layout: str | None = None
    is_other_text: bool = False


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
            points.append(_peer(row) if "runtime" in row else _ours(row, rows))
        except (KeyError, TypeError, ValueError, AttributeError):
            name = row.get("label") or row.get("weights") or "a row"
            raise OptionError(
                f"{name} cannot be drawn: it lacks its divergence or its size; "
                "measure it with --against"
            ) from None
    if not points:
        raise OptionError("there is nothing to draw")
    return _with_layouts(_shortened(points))


def shared_weights(points: Sequence[Point]) -> str | None:
    """The form of the weights that all rows of the KV cache and of skipping share, or None."""
    bases = {point.weights for point in points if point.family in _SHARED}
    return bases.pop() if len(bases) == 1 else None


def common_depth(points: Sequence[Point]) -> str | None:
    """The largest depth at which all of these were timed; None if there is none.

    Args:
        points: all with a speed.

    Returns:
        Cached tokens; ``""`` if no row tells them.
    """
    depths = set.intersection(*(set(point.tok_s) for point in points)) if points else set()
    return max(depths, key=lambda depth: int(depth or 0), default=None)


def _shortened(points: list[Point]) -> list[Point]:
    """Leave the weights out of labels where all rows of the KV cache and of skipping share them."""
    if shared_weights(points) is None:
        return points
    return [
        dataclasses.replace(point, label=point.label.partition(", ")[2])
        if point.family in _SHARED
        else point
        for point in points
    ]


def _with_layouts(points: list[Point]) -> list[Point]:
    """Tell the layout of weights whose own KV cache is another than that of most weights."""
    known = Counter(p.layout for p in points if p.family == WEIGHTS and p.layout)
    usual = max(known, key=lambda name: known[name], default=None)
    return [
        dataclasses.replace(point, label=f"{point.label}, KV {point.layout}")
        if point.family == WEIGHTS and point.layout not in (None, usual)
        else point
        for point in points
    ]


def _ours(row: dict[str, Any], rows: Sequence[dict[str, Any]]) -> Point:
    is_kv = row.get("kv") or row.get("window")
    family = SKIP if row.get("ffn_skip") else KV if is_kv else WEIGHTS
    cached = min(CACHED, row.get("window") or CACHED)
    nbytes = row["weight_bytes"] + cached * row["kv_bytes_per_token"]
    label = str(row["label"])
    return Point(
        str(row["model"]),
        label.partition(", ")[0],
        label,
        family,
        nbytes / 1e6,
        float(row["kl_mean"]),
        _speeds(row),
        _layout(row, rows),
    )


def _speeds(row: dict[str, Any]) -> dict[str, float]:
    by_depth = row.get("decode_by_depth") or {"": row.get("decode_tok_s") or {}}
    found = {depth: speed.get("median") for depth, speed in by_depth.items()}
    return {depth: float(rate) for depth, rate in found.items() if rate}


def _layout(row: dict[str, Any], rows: Sequence[dict[str, Any]]) -> str | None:
    """The KV layout that a row ran; rows without one ran the bundle's own.

    Files of before name no layout then; it is that of the same size which another row names.
    """
    named = row.get("kv") or row.get("kv_layout")
    if named:
        return str(named)
    same = {
        other["kv"]
        for other in rows
        if other.get("kv")
        and other.get("model") == row["model"]
        and other.get("kv_bytes_per_token") == row["kv_bytes_per_token"]
    }
    return same.pop() if len(same) == 1 else None


def _peer(row: dict[str, Any]) -> Point:
    nbytes = row["bytes"] + CACHED * row["kv_bytes_per_token"]
    weights = str(row["weights"])
    label = f"{row['runtime']} {weights}"
    return Point(
        str(row["model"]),
        weights,
        label,
        PEER,
        nbytes / 1e6,
        float(row["kl_mean"]),
        is_other_text=True,
    )
