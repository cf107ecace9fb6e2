"""What bundles are worth: distance from a reference, recall, agreement, size, speed and memory."""

from __future__ import annotations

import dataclasses
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from forerun.errors import OptionError
from forerun.quant.corpus import (
    CORPUS,
    bos_ids,
    corpus_pieces,
    corpus_text,
    load_tokenizer,
    measured_ids,
    measured_part,
    measured_pieces,
)
from forerun.quant.measure_agreement import agreement, agreement_prompts
from forerun.quant.measure_divergence import (
    Divergence,
    Stream,
    Tally,
    compare,
    log_softmax,
)
from forerun.quant.measure_open import (
    Judged,
    check_judged,
    label,
    open_judged,
    view,
    weight_bytes,
)
from forerun.quant.measure_speed import depths_of, measure_speed
from forerun.quant.recall import DEPTHS, PAIRS, depths_within, recall, recall_text
from forerun.runtime.layouts import layout_name

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from forerun.quant.measure_divergence import Progress
    from forerun.runtime.manifest import Manifest

__all__ = [
    "CORPUS",
    "QUICK",
    "Divergence",
    "Judged",
    "Plan",
    "contexts_within",
    "corpus_pieces",
    "evaluate",
    "evaluate_all",
    "log_softmax",
    "weight_bytes",
]

MIN_CONTEXT = 16
# As many models are open at once, beside the reference.
_AT_ONCE = 4


@dataclass(frozen=True)
class Plan:
    """How much is measured.

    Attributes:
        contexts: lengths of the pieces of text, whose second halves are judged.
        tokens: of text, as much for each context and each kind.
        text: a file that is read in place of the built-in texts.
        prompts: for greedy agreement; 0 leaves it out.
        depths: of the recall test, in tokens; those that a model's cache cannot hold are left out.
        pairs: at every depth; 0 leaves the test out.
        rounds: of the measurement of speed and memory; 0 leaves it out.
        speed_depths: cached tokens at which decoding is timed, all of which must fit; None takes
            `measure_speed.DEPTHS` as far as they fit.
    """

    contexts: tuple[int, ...] = (512, 2048)
    tokens: int = 9216
    text: Path | None = None
    prompts: int = 12
    depths: tuple[int, ...] = DEPTHS
    pairs: int = PAIRS
    rounds: int = 2
    speed_depths: tuple[int, ...] | None = None


QUICK = Plan(contexts=(512,), tokens=1536, prompts=3, depths=(256, 1024), pairs=8, rounds=1)


def evaluate(
    bundle: Path,
    against: Path | None = None,
    *,
    plan: Plan | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measure one bundle as it is; see `evaluate_all`."""
    return evaluate_all([Judged(bundle)], against, plan=plan, progress=progress)[0]


def evaluate_all(
    judged: Sequence[Judged],
    against: Path | None = None,
    *,
    plan: Plan | None = None,
    progress: Progress | None = None,
) -> list[dict[str, Any]]:
    """Measure bundles on public-domain text, or on a text of the user's.

    The figures of quality are the same in every run on a machine.

    Args:
        judged: what to measure.
        against: the bundle to compare with, usually the float32 one; it must have the same
            tokenizer.
        plan: how much to measure; None takes what a README quotes.
        progress: called with (stage, done, total).

    Returns:
        A JSON object for each; the README lists its fields.

    Raises:
        OptionError: a context, the amount of text or a depth of speed is out of range, the
            tokenizers differ, a KV layout is unknown, or the text is none.
        BundleError: a bundle cannot be loaded.
        MeasureError: the process that measures speed failed.
    """
    plan = plan or Plan()
    reference = Judged(against, threads=judged[0].threads) if against else None
    everyone = [*judged, reference] if reference else [*judged]
    manifests = [check_judged(one) for one in everyone]
    _check(manifests, plan)
    if plan.rounds:
        for one, manifest in zip(judged, manifests, strict=False):
            depths_of(one, manifest, plan.speed_depths)
    material = _Material(manifests, everyone, plan)
    rows: list[dict[str, Any]] = []
    truth: dict[str, Any] | None = None
    for start in range(0, len(judged), _AT_ONCE):
        group = judged[start : start + _AT_ONCE]
        found, truth = _measure(group, reference, material, truth, progress)
        rows += found
    _add_sizes(rows, judged, manifests, against, plan)
    if plan.rounds:
        speeds = measure_speed(list(judged), plan.rounds, progress, plan.speed_depths)
        rows = [{**row, **speed} for row, speed in zip(rows, speeds, strict=True)]
    return rows


def contexts_within(everyone: Sequence[Judged], contexts: tuple[int, ...]) -> tuple[int, ...]:
    """The contexts that all of these can hold; the longest possible one if none can."""
    most = _limit([view(one) for one in everyone])
    return tuple(context for context in contexts if context <= most) or (most,)


def _check(manifests: list[Manifest], plan: Plan) -> None:
    if len({manifest.tokenizer.sha256 for manifest in manifests}) > 1:
        raise OptionError(
            "the bundles have different tokenizers, so they cannot be compared; "
            "give bundles of one model"
        )
    most = _limit(manifests)
    for context in plan.contexts:
        if not MIN_CONTEXT <= context <= most:
            raise OptionError(
                f"a context must be in {MIN_CONTEXT}..{most} tokens, which is what every "
                f"cache holds, got {context}"
            )
    if not plan.contexts or plan.tokens < max(plan.contexts):
        raise OptionError(
            f"tokens must be at least the longest context, {max(plan.contexts, default=0)}, "
            f"got {plan.tokens}"
        )


def _limit(manifests: list[Manifest]) -> int:
    """Tokens that every cache holds and every model was made for."""
    return min(min(m.kv.capacity, m.model.context) for m in manifests)


class _Material:
    """What is read: the same for all rows.

    Args:
        manifests: of all models; they have one tokenizer.
        everyone: what is opened, in the same order.
        plan: how much.
    """

    def __init__(self, manifests: list[Manifest], everyone: list[Judged], plan: Plan) -> None:
        manifest, folder = manifests[0], everyone[0].bundle
        self.plan, self.limit = plan, _limit(manifests)
        bos, ids = bos_ids(manifest), measured_ids(manifest, folder, plan.text)
        self.pieces = measured_pieces(ids, bos, plan.contexts, plan.tokens)
        self.prompts = agreement_prompts(ids, bos, plan.prompts) if plan.prompts else []
        self.recall = None
        depths = depths_within(self.limit, plan.depths) if plan.pairs else ()
        if depths:
            tokenizer = load_tokenizer(manifest, folder)
            prose = measured_part(corpus_text(CORPUS[0]))
            filler = tokenizer.encode(prose, add_special_tokens=False).ids
            self.recall = recall_text(tokenizer, filler, bos, depths, plan.pairs)


def _measure(
    judged: Sequence[Judged],
    reference: Judged | None,
    material: _Material,
    truth: dict[str, Any] | None,
    progress: Progress | None,
) -> tuple[list[dict[str, Any]], dict[str, Any] | None]:
    """Quality of models that are open at once; `truth` is the reference's recall, if known."""
    with ExitStack() as stack:
        streams = []
        for one in (*judged, reference):
            if one is not None:
                runner = open_judged(one)
                stack.callback(runner.close)
                streams.append(Stream(runner, one.rows_per_step))
        other = streams.pop() if reference else None
        tallies = compare(streams, other, material.pieces, progress)
        rows = [_distances(tally, material.plan, material.pieces) for tally in tallies]
        if other and material.recall and truth is None:
            truth = recall(other, material.recall, progress)
        for row, stream in zip(rows, streams, strict=True):
            if other and material.prompts:
                row["agreement_tokens"] = agreement(
                    stream, _as_it_decodes(other), material.prompts, material.limit, progress
                )
            found = recall(stream, material.recall, progress) if material.recall else None
            row.update(_recall_fields(found, truth))
    return rows, truth


def _as_it_decodes(reference: Stream) -> Stream:
    """A reference whose rows, many in a step, are those of decoding; float32 has them anyway."""
    is_float = reference.runner.manifest.quantization.method == "none"
    return reference if is_float else replace(reference, rows_per_step=1)


def _distances(tally: Tally, plan: Plan, pieces: list[Any]) -> dict[str, Any]:
    kinds = list(dict.fromkeys(piece.kind for piece in pieces))
    return {
        **dataclasses.asdict(tally.result()),
        "by_context": {str(c): dataclasses.asdict(tally.result(context=c)) for c in plan.contexts},
        "by_text": {kind: dataclasses.asdict(tally.result(kind=kind)) for kind in kinds},
    }


def _recall_fields(found: dict[str, Any] | None, truth: dict[str, Any] | None) -> dict[str, Any]:
    if found is None:
        return {"recall": None, "recall_by_depth": {}}
    fields = {
        "recall": found["recall"],
        "recall_nll": found["nll"],
        "recall_queries": found["queries"],
        "recall_by_depth": found["by_depth"],
    }
    if truth:
        fields["recall_against"] = truth["recall"]
        fields["recall_nll_against"] = truth["nll"]
        fields["recall_by_depth_against"] = truth["by_depth"]
    return fields


def _add_sizes(
    rows: list[dict[str, Any]],
    judged: Sequence[Judged],
    manifests: list[Manifest],
    against: Path | None,
    plan: Plan,
) -> None:
    """Put what needs no compute before what was measured."""
    for index, (one, manifest) in enumerate(zip(judged, manifests, strict=False)):
        nbytes = weight_bytes(manifest)
        rows[index] = {
            "bundle": str(one.bundle),
            "against": str(against) if against else None,
            "model": manifest.name,
            "label": label(one, manifest),
            "weights": manifest.quantization.method,
            "kv": one.kv,
            "kv_layout": layout_name(manifest.kv),
            "ffn_skip": one.ffn_skip,
            "window": one.window,
            "contexts": list(plan.contexts),
            **rows[index],
            "weight_bytes": nbytes,
            "bytes_per_weight": nbytes / manifest.model.parameters,
            "kv_bytes_per_token": manifest.kv.nbytes_per_token,
        }
