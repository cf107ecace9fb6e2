"""From a bundle to a trained drafter: data, training, graph, folder."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from forerun.errors import BundleError, OptionError, UnsupportedError
from forerun.export.bundle import require_space
from forerun.export.graph import default_taps
from forerun.export.training.batches import Batches, DraftVocab, choose_vocab
from forerun.export.training.data import TokenStore
from forerun.export.training.identity import check_work, record_work, work_identity
from forerun.export.training.place import drafter_folder
from forerun.runtime.drafting.folder import KINDS
from forerun.runtime.manifest import load_manifest

if TYPE_CHECKING:
    from forerun.export.training.kinds import DrafterKind
    from forerun.export.training.loop import Trainer, TrainState
    from forerun.runtime.manifest import Manifest

    Progress = Callable[[str, int, int | None], None]

_VOCAB = 8192
# Small, since a training on few cores is short of steps rather than of precision.
_BATCH = 4
_VOCAB_NAME = "vocab.i32"
# Share of the time that may go into writing data; training needs the rest.
_DATA_SHARE = 0.45
_BYTES_PER_TOKEN = 6000
_LEAST_MINUTES = 0.5


@dataclass(frozen=True)
class TrainRequest:
    """What is to be trained.

    Attributes:
        kind: one of `KINDS`.
        bundle: folder of the target.
        out: folder of the drafter.
        work: folder of data and checkpoints; a training goes on from what is there.
        head_bundle: whose output head the target is taken to have; None is its own.
        tokens: answer tokens to train on.
        minutes: time for everything.
        seed: of prompts, sampling and the order of the data.
        command: for the card.
    """

    kind: str
    bundle: Path
    out: Path
    work: Path
    head_bundle: Path | None = None
    tokens: int = 1_000_000
    minutes: float = 240.0
    seed: int = 0
    command: str = ""


def train_drafter(request: TrainRequest, progress: Progress | None = None) -> dict[str, Any]:
    """Write data, train, export, measure.

    Args:
        request: what is to be trained.
        progress: called with (stage, done, total).

    Returns:
        `Scores.facts` of the trained drafter on the held-out answers.

    Raises:
        OptionError: an unknown kind, an output head of other sizes, a work folder of another
            training, or too little time.
        UnsupportedError: PyTorch is missing, or the target is of a kind that cannot be trained
            for.
    """
    require_torch()
    if request.kind not in KINDS:
        raise OptionError(f"--kind must be {' or '.join(KINDS)}, got {request.kind!r}")
    require_space(request.work, request.tokens * _BYTES_PER_TOKEN, "the training data")
    report = progress or (lambda stage, done, total: None)
    begin = time.monotonic()
    store, manifest = _data(request, begin, report)
    if sum(not a.held_out for a in store.answers) < _BATCH:
        raise OptionError("there was no time to write training data; give more --max-minutes")
    vocab = _vocab(request.work, store, manifest)
    left = request.minutes - (time.monotonic() - begin) / 60
    from forerun.export.training.kinds import DRAFTERS

    drafter = DRAFTERS[request.kind](request, manifest)
    batches = Batches(store, vocab, _BATCH, drafter.features)
    trainer = drafter.trainer(batches, max(left, _LEAST_MINUTES))
    state = trainer.run(_log(request, trainer, drafter, batches), _tick(trainer, report))
    scores = drafter.scores(trainer.module, batches).facts()
    facts = _training_facts(state, store, request)
    with drafter_folder(request.out) as folder:
        drafter.write(folder, trainer.module, vocab, scores, facts)
    return scores


def require_torch() -> None:
    """Refuse when PyTorch is missing.

    Raises:
        UnsupportedError: it is.
    """
    if importlib.util.find_spec("torch") is None:
        raise UnsupportedError(
            'training needs PyTorch, which is not installed: pip install "forerun[train]"'
        )


def _data(request: TrainRequest, begin: float, report: Progress) -> tuple[TokenStore, Manifest]:
    from forerun.export.training.target import TAP_FINAL, TorchTarget
    from forerun.export.training.write import Sampling, write_data

    manifest = load_manifest(request.bundle)
    _check_head(manifest, request.head_bundle)
    sampling = Sampling()
    identity = work_identity(request.bundle, request.head_bundle, request.seed, sampling)
    check_work(request.work, identity)
    folder = request.work / "data"
    taps = default_taps(manifest.model.layers)
    try:
        store = TokenStore(folder, len(taps) + 1, manifest.model.hidden)
    except BundleError:
        store = None
    if store is None or store.answer_tokens < request.tokens:
        target = TorchTarget(request.bundle, request.head_bundle, (*taps, TAP_FINAL))
        record_work(request.work, identity)
        store = write_data(
            target,
            request.bundle,
            folder,
            tokens=request.tokens,
            seed=request.seed,
            sampling=sampling,
            progress=lambda done, total: report("write answers", min(done, total), total),
            until=begin + 60 * _DATA_SHARE * request.minutes,
        )
    return store, manifest


def _check_head(manifest: Manifest, head_bundle: Path | None) -> None:
    """Refuse an output head that does not fit the target's last state or ids."""
    if head_bundle is None:
        return
    head = load_manifest(head_bundle)
    sizes = [(m.model.vocab, m.model.hidden) for m in (head, manifest)]
    if sizes[0] != sizes[1]:
        raise OptionError(
            f"the output head of {head.name} has {sizes[0][0]} ids and width {sizes[0][1]}, "
            f"{manifest.name} has {sizes[1][0]} and {sizes[1][1]}; give another --head-of"
        )


def _vocab(work: Path, store: TokenStore, manifest: Manifest) -> DraftVocab:
    """The draft vocabulary; fixed with the first training, since checkpoints depend on it."""
    path = work / _VOCAB_NAME
    if not path.exists():
        size = min(_VOCAB, manifest.model.vocab)
        vocab = choose_vocab(store, size, manifest.model.vocab, manifest.tokenizer.eos)
        vocab.ids.astype("<i4").tofile(path)
    return DraftVocab(np.fromfile(path, "<i4"), manifest.model.vocab)


def _tick(trainer: Trainer, report: Progress) -> Callable[[TrainState], None]:
    def tick(state: TrainState) -> None:
        report("train", int(1000 * state.share(trainer.options)), 1000)

    return tick


def _log(
    request: TrainRequest, trainer: Trainer, drafter: DrafterKind, batches: Batches
) -> Callable[[TrainState], None]:
    """Return what writes a line on the course of the training into the work folder."""
    path = request.work / f"{request.kind}.log"

    def log(state: TrainState) -> None:
        scores = drafter.scores(trainer.module, batches, every=5).total
        rates = " ".join(f"{rate:.3f}" for rate in scores.rates())
        with open(path, "a", encoding="utf-8") as stream:
            stream.write(
                f"{state.minutes:.1f} min, step {state.step}, pass {state.epoch}, "
                f"{state.tokens} tokens, loss {state.loss:.3f}, acceptance {rates}, "
                f"{scores.per_round():.3f} tokens per round\n"
            )

    return log


def _training_facts(
    state: TrainState, store: TokenStore, request: TrainRequest
) -> dict[str, float]:
    return {
        "answer_tokens": store.answer_tokens,
        "passes": round(state.tokens / max(store.answer_tokens, 1), 2),
        "steps": state.step,
        "minutes": round(state.minutes, 1),
        "loss": round(state.loss, 4),
        "seed": request.seed,
    }
