"""The training loop: resumable, limited by steps or by time."""

from __future__ import annotations

import itertools
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch  # pyright: ignore[reportMissingImports]
from torch import nn  # pyright: ignore[reportMissingImports]

from forerun.export.training.batches import Batch, Batches

CHECKPOINT_NAME = "checkpoint.pt"
_WARMUP = 0.03
_FINAL_RATE = 0.02


@dataclass(frozen=True)
class TrainOptions:
    """Settings of a training.

    Attributes:
        steps: optimizer steps; None leaves the end to `minutes`.
        minutes: time spent in training, over all runs that share a checkpoint.
        rate: highest learning rate; a cosine leads down from it.
        seed: of the order of the data.
        save_every: seconds between checkpoints.
        report_every: seconds between reports.
        autocast: compute in bfloat16.
    """

    steps: int | None = None
    minutes: float | None = None
    rate: float = 1.5e-3
    seed: int = 0
    save_every: float = 60.0
    report_every: float = 120.0
    autocast: bool = True


@dataclass
class TrainState:
    """How far a training has come.

    Attributes:
        step: optimizer steps done.
        epoch: passes over the data begun, less one.
        batch: batches of this pass done.
        minutes: time spent.
        tokens: answer tokens seen, repeated ones included.
        loss: running mean.
    """

    step: int = 0
    epoch: int = 0
    batch: int = 0
    minutes: float = 0.0
    tokens: int = 0
    loss: float = 0.0

    def share(self, options: TrainOptions) -> float:
        """Share of the training that is done, 0 to 1."""
        by_steps = self.step / options.steps if options.steps else 0.0
        by_time = self.minutes / options.minutes if options.minutes else 0.0
        return min(1.0, max(by_steps, by_time))


class Trainer:
    """Trains a module until its time or its steps are used up.

    Args:
        module: the drafter.
        loss: of a module and a batch.
        batches: the data.
        folder: of the checkpoint, which is loaded if there is one.
        options: settings.
    """

    def __init__(
        self,
        module: Any,
        loss: Callable[[Any, Batch], torch.Tensor],
        batches: Batches,
        folder: Path,
        options: TrainOptions,
    ) -> None:
        self.module, self.loss, self.batches = module, loss, batches
        self.path, self.options = Path(folder) / CHECKPOINT_NAME, options
        self.state = TrainState()
        trained = [p for p in module.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            trained, lr=options.rate, betas=(0.9, 0.95), weight_decay=0.01, fused=True
        )
        if self.path.exists():
            self._load()

    def run(
        self,
        report: Callable[[TrainState], None] = lambda state: None,
        tick: Callable[[TrainState], None] = lambda state: None,
    ) -> TrainState:
        """Train to the end.

        Args:
            report: called every `report_every` seconds of training, e.g. to evaluate.
            tick: called after every step.
        """
        self.module.train()
        saved = reported = last = time.monotonic()
        for batch in self._stream():
            self._step(batch)
            now = time.monotonic()
            self.state.minutes += (now - last) / 60
            last = now
            tick(self.state)
            done = self.state.share(self.options) >= 1.0
            if done or now - saved > self.options.save_every:
                self.save()
                saved = now
            if done or now - reported > self.options.report_every:
                self.module.eval()
                report(self.state)
                self.module.train()
                reported = last = time.monotonic()
            if done:
                break
        self.module.eval()
        return self.state

    def save(self) -> None:
        """Write the checkpoint; an interrupted write leaves the old one."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        facts = {
            "module": self.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "state": vars(self.state),
        }
        partial = self.path.with_suffix(".part")
        torch.save(facts, partial)
        os.replace(partial, self.path)

    def _load(self) -> None:
        facts = torch.load(self.path, weights_only=True)
        self.module.load_state_dict(facts["module"])
        self.optimizer.load_state_dict(facts["optimizer"])
        self.state = TrainState(**facts["state"])

    def _stream(self):
        """Batches from where the state says, without end; the state follows them."""
        if self.state.share(self.options) >= 1.0:
            return
        while True:
            epoch = self.batches.epoch(self.options.seed, self.state.epoch)
            empty = True
            for batch in itertools.islice(epoch, self.state.batch, None):
                empty = False
                self.state.batch += 1
                yield batch
            if empty and self.state.batch == 0:
                return
            self.state.epoch, self.state.batch = self.state.epoch + 1, 0

    def _step(self, batch: Batch) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = self.options.rate * schedule(self.state.share(self.options))
        with torch.autocast("cpu", torch.bfloat16, enabled=self.options.autocast):
            loss = self.loss(self.module, batch)
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.module.parameters(), 1.0)
        self.optimizer.step()
        value, state = loss.item(), self.state
        state.loss = value if state.step == 0 else 0.98 * state.loss + 0.02 * value
        state.step += 1
        state.tokens += len(batch.bases()[0])


def schedule(share: float) -> float:
    """Factor on the learning rate: a short linear rise, then a cosine."""
    cosine = 0.5 * (1 + math.cos(math.pi * share))
    return min(1.0, (share + 1e-3) / _WARMUP) * (_FINAL_RATE + (1 - _FINAL_RATE) * cosine)
