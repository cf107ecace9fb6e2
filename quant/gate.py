"""The gate a quantized bundle must pass before it is let out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from forerun.errors import ExportMismatch, ForerunError, OptionError
from forerun.export.card import is_lower_limit, limit_text
from forerun.quant.corpus import Piece, corpus_pieces
from forerun.quant.measure_divergence import Divergence, Stream, compare
from forerun.quant.measure_open import Judged, open_judged
from forerun.runtime.layouts import layout_name
from forerun.runtime.manifest import Check

if TYPE_CHECKING:
    from pathlib import Path

    from forerun.quant.measure_divergence import Progress
    from forerun.runtime.manifest import Manifest

_CONTEXT = 256
_TOKENS = 512
_AGAINST = "float32 bundle"
# What limits may be, in words and as a test that NaN does not pass.
_ALLOWED: dict[str, tuple[str, Callable[[float], bool]]] = {
    "kl_mean": ("above 0 nats", lambda value: value > 0),
    "kl_p99": ("above 0 nats", lambda value: value > 0),
    "perplexity_ratio": ("above 0, where 1 is as good as float32", lambda value: value > 0),
    "top1": ("a share in 0..1", lambda value: 0 <= value <= 1),
}


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
        for name, (allowed, is_allowed) in _ALLOWED.items():
            value = getattr(self, name)
            if value is not None and not is_allowed(value):
                raise OptionError(
                    f"the limit {name} must be {allowed}, got {value:g}; "
                    "leave it out for the default"
                )


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
            self,
            f"quality on the built-in text: {told}; the bundle was not written; "
            "allow more, or choose a form that loses less",
        )

    @property
    def rows(self) -> list[tuple[str, float, str, str]]:
        """A table of all limits: measure, figure, limit, whether it was kept."""
        return gate_rows(self.checks)


_METRICS = {
    "kl_mean": "mean KL to float32",
    "kl_p99": "99th percentile of KL",
    "top1_agreement": "same best token",
    "perplexity_ratio": "perplexity by that of float32",
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


def gate_checks(measured: Divergence, limits: Limits, against: str = _AGAINST) -> tuple[Check, ...]:
    """Every limit that is set, with the figure that was measured.

    Args:
        measured: from `measure_gate`.
        limits: to be kept.
        against: what was compared with, and how the new bundle was run.
    """
    ratio = measured.perplexity / (measured.perplexity_against or float("nan"))
    found = (
        ("kl_mean", measured.kl_mean, limits.kl_mean),
        ("kl_p99", measured.kl_p99, limits.kl_p99),
        ("top1_agreement", measured.top1_agreement, limits.top1),
        ("perplexity_ratio", ratio, limits.perplexity_ratio),
    )
    return tuple(
        Check(against, name, float("nan") if value is None else value, bound)
        for name, value, bound in found
        if bound is not None
    )


def keep_limits(
    measured: Divergence, limits: Limits, manifest: Manifest | None = None
) -> tuple[Check, ...]:
    """Return all checks, for the manifest.

    Args:
        measured: from `measure_gate`.
        limits: to be kept.
        manifest: of what was judged, whose KV layout the checks name.

    Raises:
        QualityMismatch: a figure breaks its limit, or is not a number.
    """
    checks = gate_checks(measured, limits, _against(manifest) if manifest else _AGAINST)
    failed = tuple(check for check in checks if not is_kept(check))
    if failed:
        raise QualityMismatch(measured, checks, failed)
    return checks


def keep_skipping(
    folder: Path,
    manifest: Manifest,
    reference: Judged,
    reference_manifest: Manifest,
    limits: Limits,
    progress: Progress | None = None,
) -> tuple[float, tuple[Check, ...]]:
    """Find the largest default share of skipped blocks with which a bundle keeps its limits.

    Args:
        folder: of the bundle.
        manifest: of it; its default share and the smaller ones that were calibrated are tried.
        reference: what it was made from.
        reference_manifest: of that.
        limits: to be kept.
        progress: called with (stage, done, total).

    Returns:
        The share, and the checks with it; 0 and none if no share keeps the limits.
    """
    if (found := manifest.skipping) is None:
        return 0.0, ()
    ratios = {level.ratio for level in found.levels if level.ratio <= found.default}
    for ratio in sorted(ratios, reverse=True):
        judged = Judged(folder, ffn_skip=repr(ratio))
        measured = measure_gate(judged, manifest, reference, reference_manifest, progress)
        checks = gate_checks(measured, limits, _against(manifest, ratio))
        if all(map(is_kept, checks)):
            return ratio, checks
    return 0.0, ()


def is_kept(check: Check) -> bool:
    """Whether a figure is within its limit; NaN is not."""
    if is_lower_limit(check):
        return check.value >= check.bound
    return check.value <= check.bound


def gate_rows(checks: tuple[Check, ...]) -> list[tuple[str, float, str, str]]:
    """Rows of a table: measure, figure, limit, whether it was kept."""
    return [
        (
            _METRICS[check.metric],
            check.value,
            limit_text(check),
            "kept" if is_kept(check) else "NOT KEPT",
        )
        for check in checks
    ]


def _against(manifest: Manifest, skipped: float = 0.0) -> str:
    """What was compared with, and how the new bundle was run."""
    how = f"KV {layout_name(manifest.kv)}"
    return f"{_AGAINST} (this one with {how}{f', skipping {skipped:g}' if skipped else ''})"


def _told(check: Check) -> str:
    allowed = "at least" if is_lower_limit(check) else "at most"
    return f"{_METRICS[check.metric]} is {check.value:.3g}, allowed is {allowed} {check.bound:.3g}"
