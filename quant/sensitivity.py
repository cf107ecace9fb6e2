"""Which matrices deserve 8 bits: what each loses with 4, measured, against a budget of bytes.

For each kind of matrix (all `qkv`, all `down`, ..) the divergence from the float32 model is
measured with only that kind rounded. Among the layers of a kind it is shared out by the error of
their products on calibration text, the quantity that GPTQ lowers (without calibration, by the
error of the weights). That costs one pass for a kind
and not one for a matrix. The budget is then spent where a byte saves most, as in knapsack by
density.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from forerun.errors import OptionError
from forerun.export.writer import ALIGN
from forerun.quant.calibration import read_logits
from forerun.quant.measure_divergence import kl_rows, log_softmax

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path

    import onnx

    from forerun.runtime.manifest import Manifest

    Progress = Callable[[str, int, int | None], None]


@dataclass(frozen=True)
class Candidate:
    """A matrix that could be stored in more bytes.

    Attributes:
        name: of the matrix.
        harm: mean KL divergence, in nats, that its smaller form costs.
        small: bytes of the smaller form in the weights file.
        large: bytes of the larger form, of which the harm is taken to be nothing.
    """

    name: str
    harm: float
    small: int
    large: int


def choose_wide(candidates: list[Candidate], budget: int, fixed: int) -> frozenset[str]:
    """Pick the matrices to store in the larger form.

    Args:
        candidates: all matrices that could be.
        budget: bytes of the weights file.
        fixed: bytes of everything else in it.

    Returns:
        Names; empty if nothing fits or nothing helps.

    Raises:
        OptionError: not even the smaller forms fit; it says what does.
    """
    least = fixed + sum(c.small for c in candidates)
    check_budget(budget, least)
    left = budget - least
    # Padded to pages, the larger form of a small matrix may cost nothing.
    useful = [c for c in candidates if c.harm > 0]
    chosen = set()
    for c in sorted(useful, key=lambda c: (-c.harm / max(c.large - c.small, 1), c.name)):
        if c.large - c.small <= left:
            left -= c.large - c.small
            chosen.add(c.name)
    return frozenset(chosen)


def check_budget(budget: int, least: int) -> None:
    """Refuse a budget below the bytes that the smaller forms take.

    Raises:
        OptionError: it is too small; it says what works.
    """
    if budget < least:
        raise OptionError(
            f"a budget of {budget / 1e6:.1f} MB is too small for these weights: the smallest that "
            f"works is {np.ceil(least / 1e5) / 10:.1f} MB; give that or more"
        )


def file_bytes(arrays: Iterable[np.ndarray]) -> int:
    """Most bytes that arrays take in the weights file, where each begins at a page."""
    return sum(-(-array.nbytes // ALIGN) * ALIGN for array in arrays)


def product_error(weight: np.ndarray, rounded: np.ndarray, moment: np.ndarray) -> float:
    """Mean squared error of a product, relative to the product's mean square.

    Args:
        weight: float32 [N, K].
        rounded: float32 [N, K], what is computed with instead.
        moment: float32 [K, K], sum of x x^T over inputs x.
    """
    error = rounded - weight
    lost = np.einsum("nk,nk->", error @ moment, error, dtype=np.float64)
    whole = np.einsum("nk,nk->", weight @ moment, weight, dtype=np.float64)
    return float(max(lost, 0) / max(whole, 1e-30))


def measure_harm(
    source: tuple[onnx.ModelProto, Manifest, Path],
    pieces: list[np.ndarray],
    errors: dict[str, float],
    rounded: Callable[[str], np.ndarray],
    progress: Progress,
) -> dict[str, float]:
    """Measure what rounding costs, kind by kind, and share it out among the matrices.

    Args:
        source: float32 graph without its external weights, manifest and folder of the bundle.
        pieces: token ids, each int64 [T].
        errors: `product_error` of each matrix.
        rounded: what a matrix is rounded to, in the shape of the graph's constant.
        progress: called with (stage, done, total).

    Returns:
        Name to mean KL divergence in nats. Sums over several kinds are no prediction, since
        divergences do not simply add up, but they order the matrices.
    """
    kinds: dict[str, list[str]] = {}
    for name, error in errors.items():
        if error > 0:
            kinds.setdefault(kind_of(name), []).append(name)
    reference = [log_softmax(x) for x in read_logits(*source, pieces)] if kinds else []
    harm = dict.fromkeys(errors, 0.0)
    for done, names in enumerate(kinds.values()):
        replaced = {name: rounded(name) for name in names}
        total = 0.0
        judged = read_logits(*source, pieces, replaced)
        for p, logits in zip(reference, judged, strict=True):
            total += float(kl_rows(log_softmax(logits), p).mean())
        whole = sum(errors[name] for name in names)
        for name in names:
            harm[name] = max(total / len(pieces), 0.0) * errors[name] / whole
        progress("sensitivity", done + 1, len(kinds))
    return harm


def kind_of(name: str) -> str:
    """``qkv.12`` is of the kind ``qkv``; a name without a layer is a kind of its own."""
    kind, _, layer = name.rpartition(".")
    return kind if layer.isdigit() else name
