"""The kinds of drafters: how each is built, trained, measured and written."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch  # pyright: ignore[reportMissingImports]

from forerun.export.graph import FINAL_NORM, default_taps
from forerun.export.training.check import check_draft, check_head
from forerun.export.training.draft import draft_from_target, draft_loss, draft_scores
from forerun.export.training.draft_bundle import draft_weights, write_draft_bundle
from forerun.export.training.head import FeatureHead, HeadSizes, head_loss, head_scores
from forerun.export.training.loop import Trainer, TrainOptions
from forerun.export.training.pack import DrafterFacts, write_drafter_files
from forerun.export.training.to_onnx import write_head_graph
from forerun.export.training.weights import BundleWeights

if TYPE_CHECKING:
    from forerun.export.training.batches import Batches, DraftVocab
    from forerun.export.training.score import Scores
    from forerun.export.training.train import TrainRequest
    from forerun.runtime.manifest import Manifest

_STEPS = 3
_SAMPLE_ANSWERS = 64
_CAPACITY = 8192


class DrafterKind(Protocol):
    """What `train` needs to know of a kind."""

    @property
    def features(self) -> tuple[int, ...]:
        """Which states of the data it reads."""
        ...

    def trainer(self, batches: Batches, minutes: float) -> Trainer:
        """A trainer that has this much time, resumed from its checkpoint if there is one."""
        ...

    def scores(self, module: Any, batches: Batches, every: int = 1) -> Scores:
        """Acceptance on the held-out answers."""
        ...

    def write(
        self,
        folder: Path,
        module: Any,
        vocab: DraftVocab,
        scores: dict[str, Any],
        training: dict[str, float],
    ) -> None:
        """Write the drafter's folder."""
        ...


class _Kind:
    """What the kinds share."""

    kind = ""

    def __init__(self, request: TrainRequest, target: Manifest) -> None:
        self.request, self.target = request, target
        self.name = f"{target.name}-{self.kind}"
        self.taps = default_taps(target.model.layers)

    def _trainer(self, module: Any, loss: Any, batches: Batches, minutes: float) -> Trainer:
        folder = self.request.work / self.kind
        options = TrainOptions(minutes=minutes, seed=self.request.seed)
        trainer = Trainer(module, loss, batches, folder, options)
        # What was trained before counts, or the learning rate would begin anew.
        trainer.options = replace(options, minutes=trainer.state.minutes + minutes)
        return trainer

    def _facts(self, scores: dict[str, Any], training: dict[str, float]) -> DrafterFacts:
        return DrafterFacts(
            kind=self.kind,
            name=self.name,
            target=self.target,
            hidden=self.target.model.hidden,
            scores=scores,
            training=training,
            command=self.request.command,
        )


class HeadKind(_Kind):
    """A feature head."""

    kind = "head"

    @property
    def features(self) -> tuple[int, ...]:
        """All states but the last, which the target's graph does not put out."""
        return tuple(range(len(self.taps)))

    def trainer(self, batches: Batches, minutes: float) -> Trainer:
        """A trainer that begins with a head made from the target."""
        torch.manual_seed(self.request.seed)
        head = FeatureHead(HeadSizes(self.target.model.hidden, len(self.taps), len(batches.vocab)))
        weights = BundleWeights(self.request.bundle)
        rows = BundleWeights(self.request.head_bundle or self.request.bundle).head()
        head.initialise(
            weights.embedding()[batches.vocab.ids],
            rows[batches.vocab.ids],
            np.array(weights.array(FINAL_NORM)),
            self._sample(batches),
        )
        return self._trainer(head, lambda m, b: head_loss(m, b, _STEPS), batches, minutes)

    def _sample(self, batches: Batches) -> np.ndarray:
        states = batches.store.array("states")
        answers = [a for a in batches.store.answers if not a.held_out][:_SAMPLE_ANSWERS]
        parts = [slice(a.start + a.prompt, a.start + a.length) for a in answers]
        return np.concatenate([states[part][:, list(self.features)] for part in parts])

    def scores(self, module: FeatureHead, batches: Batches, every: int = 1) -> Scores:
        """Acceptance on the held-out answers."""
        return head_scores(module, batches, _STEPS, every)

    def write(
        self,
        folder: Path,
        module: FeatureHead,
        vocab: DraftVocab,
        scores: dict[str, Any],
        training: dict[str, float],
    ) -> None:
        """Write graph and folder."""
        form = write_head_graph(module, folder)
        facts = replace(
            self._facts(scores, training),
            taps=self.taps,
            graphs={"step": form},
            checks=(check_head(module, folder),),
        )
        write_drafter_files(folder, facts, vocab.ids)


class ModelKind(_Kind):
    """A draft model."""

    kind = "model"
    features = ()

    def trainer(self, batches: Batches, minutes: float) -> Trainer:
        """A trainer that begins with some of the target's layers."""
        count = self.target.model.layers
        # Two from its beginning and its last.
        chosen = tuple(sorted({0, min(1, count - 1), count - 1}))
        model = draft_from_target(
            self.request.bundle, self.request.head_bundle, batches.vocab, chosen
        )
        return self._trainer(model, draft_loss, batches, minutes)

    def scores(self, module: Any, batches: Batches, every: int = 1) -> Scores:
        """Acceptance on the held-out answers."""
        return draft_scores(module, batches, _STEPS, every)

    def write(
        self,
        folder: Path,
        module: Any,
        vocab: DraftVocab,
        scores: dict[str, Any],
        training: dict[str, float],
    ) -> None:
        """Write a bundle with the vocabulary beside it."""
        capacity = min(_CAPACITY, self.target.kv.capacity)
        source = draft_weights(module, self.target, self.request.bundle, capacity)
        manifest = write_draft_bundle(source, self.target, folder, self.name)
        manifest = check_draft(module, manifest, folder)
        facts = replace(self._facts(scores, training), checks=manifest.checks)
        write_drafter_files(folder, facts, vocab.ids, manifest)


DRAFTERS: dict[str, Callable[[TrainRequest, Manifest], DrafterKind]] = {
    kind.kind: kind for kind in (HeadKind, ModelKind)
}
