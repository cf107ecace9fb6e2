"""The arithmetic of a benchmark: spreads of repeated measurements, and honest ratios of them."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

SCATTER_LIMIT = 0.20


@dataclass(frozen=True)
class Spread:
    """Repeated measurements of one quantity, in the order of the runs."""

    values: tuple[float, ...]

    @property
    def median(self) -> float:
        """Median of the runs."""
        return statistics.median(self.values)

    @property
    def scatter(self) -> float:
        """Largest minus smallest run, as a share of the median."""
        return (max(self.values) - min(self.values)) / self.median if self.median else 0.0

    @property
    def steady(self) -> bool:
        """Whether the runs scatter by no more than `SCATTER_LIMIT`."""
        return self.scatter <= SCATTER_LIMIT

    def to_json(self, digits: int = 2) -> dict[str, Any]:
        """Median, minimum, maximum, scatter and all runs, rounded to `digits` decimals."""
        return {
            "median": round(self.median, digits),
            "min": round(min(self.values), digits),
            "max": round(max(self.values), digits),
            "scatter": round(self.scatter, 3),
            "runs": [round(value, digits) for value in self.values],
        }


@dataclass(frozen=True)
class Ratio:
    """How many times faster one runtime is than another.

    Attributes:
        value: ratio of the medians.
        paired: spread of the ratios run by run; the runs of a pair were neighbours in time, so
            a slow drift of the machine cancels out.
        steady: whether both sides scatter by no more than `SCATTER_LIMIT`.
    """

    value: float
    paired: Spread
    steady: bool

    def to_json(self) -> dict[str, Any]:
        """The ratio, its run-by-run spread, and whether it may be trusted."""
        return {
            "ratio": round(self.value, 3),
            "paired": self.paired.to_json(3),
            "steady": self.steady,
        }


def ratio(ours: Spread, theirs: Spread) -> Ratio | None:
    """Ratio of two rates (higher is better), or None where there is nothing to divide by.

    Args:
        ours: runs of the one, e.g. in tokens per second.
        theirs: as many runs of the other, taken in turn with them.
    """
    if not theirs.median or min(theirs.values) <= 0:
        return None
    pairs = tuple(a / b for a, b in zip(ours.values, theirs.values, strict=False))
    return Ratio(ours.median / theirs.median, Spread(pairs), ours.steady and theirs.steady)


def spread(values: Sequence[float | None]) -> Spread | None:
    """Spread of the runs that gave a figure, or None if none did."""
    known = tuple(float(value) for value in values if value is not None)
    return Spread(known) if known else None
