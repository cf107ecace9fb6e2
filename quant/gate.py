"""The gate a quantized bundle must pass before it is let out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from forerun.errors import ExportMismatch, ForerunError, OptionError
from forerun.quant.corpus import Piece, corpus_pieces
from forerun.quant.measure_divergence import Divergence, Stream, compare
from forerun.quant.measure_open import Judged, open_judged
from forerun.runtime.manifest import Check

if TYPE_CHECKING:
    from pathlib import Path

    from forerun.quant.measure_divergence import Progress
    from forerun.runtime.manifest import Manifest

_CONTEXT = 256
_TOKENS = 512
_AGAINST = "float32 bundle"


@dataclass(frozen=True)
class Limits:
    """What a bundle may cost; None sets no limit.

    Attributes:
        kl_mean: largest mean KL(reference || judged), in nats.
        kl_p99: largest 99th percentile of it.
        top1: smallest share of positions with the same most probable token.
        perplexity_ratio: largest perplexity by that of the reference.
    """

    kl_mean: float | None
    kl_p99: float | None = None
    top1: float | None = None
    perplexity_ratio: float | None = None

    def __post_init__(self) -> None:
        """Refuse limits that nothing, or everything, would keep."""
        for name in ("kl_mean", "kl_p99", "perplexity_ratio"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise OptionError(f"the limit {name} must be above 0, got {value:g}")
        if self.top1 is not None and not 0 <= self.top1 <= 1:
            raise OptionError(f"the limit top1 must be in 0..1, got {self.top1:g}")


class QualityMismatch(ExportMismatch):
    """A quantized bundle costs more than its limits allow.

    Args:
        measured: all that was measured.
        checks: every limit with its figure.
        failed: those of them that were not kept.
    """

    def __init__(
        self, measured: Divergence, checks: tuple[Check, ...], failed: tuple[Check, ...]
    ) -> None:
        self.measured, self.checks, self.failed = measured, checks, failed
        worst = failed[0]
        self.tensor, self.error, self.bound = worst.metric, worst.value, worst.bound
        self.where = "built-in text"
        told = "; ".join(_told(check) for check in failed)
        ForerunError.__init__(
            self, f"quality on the built-in text: {told}; the bundle was not written"
        )

    @property
    def rows(self) -> list[tuple[str, float, str, str]]:
        """A table of all limits: measure, figure, limit, whether it was kept."""
        return gate_rows(self.checks)


# metric: words, whether it is a lower limit.
_METRICS = {
    "kl_mean": ("mean KL to float32", False),
    "kl_p99": ("99th percentile of KL", False),
    "top1_agreement": ("same best token", True),
    "perplexity_ratio": ("perplexity by that of float32", False),
}


def measure_gate(
    judged: Judged,
    manifest: Manifest,
    reference: Judged,
    reference_manifest: Manifest | None = None,
    progress: Progress | None = None,
) -> Divergence:
    """Compare a bundle with its source on a short text, which is the same in every version.

    Args:
        judged: the new bundle, and how it is run.
        manifest: of it; it need not be written yet.
        reference: what it was made from.
        reference_manifest: of that, None reads it.
        progress: called with (stage, done, total).
    """
    context = min(_CONTEXT, manifest.kv.capacity)
    width = judged.rows_per_step
    # What only shows in decoding needs something before it.
    first = context // 2 if width else 0
    cut = corpus_pieces(manifest, judged.bundle, context, _TOKENS)
    pieces = [Piece("built-in", ids, first) for ids in cut]
    runner = open_judged(judged, manifest)
    try:
        other = open_judged(reference, reference_manifest)
        try:
            streams = [Stream(runner, width)]
            return compare(streams, Stream(other), pieces, progress)[0].result()
        finally:
            other.close()
    finally:
        runner.close()


def gate_checks(measured: Divergence, limits: Limits) -> tuple[Check, ...]:
    """Every limit that is set, with the figure that was measured."""
    ratio = measured.perplexity / (measured.perplexity_against or float("nan"))
    found = (
        ("kl_mean", measured.kl_mean, limits.kl_mean),
        ("kl_p99", measured.kl_p99, limits.kl_p99),
        ("top1_agreement", measured.top1_agreement, limits.top1),
        ("perplexity_ratio", ratio, limits.perplexity_ratio),
    )
    return tuple(
        Check(_AGAINST, name, float("nan") if value is None else value, bound)
        for name, value, bound in found
        if bound is not None
    )


def keep_limits(measured: Divergence, limits: Limits) -> tuple[Check, ...]:
    """Return all checks, for the manifest.

    Raises:
        QualityMismatch: a figure is over its limit, or is not a number.
    """
    checks = gate_checks(measured, limits)
    failed = tuple(check for check in checks if not is_kept(check))
    if failed:
        raise QualityMismatch(measured, checks, failed)
    return checks


def is_kept(check: Check) -> bool:
    """Whether a figure is within its limit; NaN is not."""
    if _METRICS[check.metric][1]:
        return check.value >= check.bound
    return check.value <= check.bound


def gate_rows(checks: tuple[Check, ...]) -> list[tuple[str, float, str, str]]:
    """Rows of a table: measure, figure, limit, whether it was kept."""
    return [
        (
            _METRICS[check.metric][0],
            check.value,
            f"{'>=' if _METRICS[check.metric][1] else '<='} {check.bound:g}",
            "kept" if is_kept(check) else "NOT KEPT",
        )
        for check in checks
    ]


def check_quality(
    manifest: Manifest,
    folder: Path,
    reference: Manifest,
    reference_folder: Path,
    limits: Limits | float,
    progress: Progress | None = None,
) -> Check:
    """Compare a quantized bundle with its float32 source on a short text.

    Args:
        manifest: of the new bundle, whose default KV layout is run.
        folder: of it.
        reference: manifest of the source.
        reference_folder: of that.
        limits: or the largest mean KL alone.
        progress: called with (stage, done, total).

    Returns:
        The first limit, by default the mean KL divergence, with its figure.

    Raises:
        QualityMismatch: a limit is not kept.
    """
    kept = limits if isinstance(limits, Limits) else Limits(limits)
    judged, source = Judged(folder), Judged(reference_folder)
    measured = measure_gate(judged, manifest, source, reference, progress)
    return keep_limits(measured, kept)[0]


def _told(check: Check) -> str:
    words, is_lower = _METRICS[check.metric]
    allowed = "at least" if is_lower else "at most"
    return f"{words} is {check.value:.3g}, allowed is {allowed} {check.bound:.3g}"
