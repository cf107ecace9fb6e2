import pytest

pytest.importorskip("torch")

import numpy as np
import torch
from training_data import HIDDEN, TAPS, VOCAB, fill_store

from forerun.export.training.batches import Batches, DraftVocab
from forerun.export.training.head import FeatureHead, HeadSizes, head_loss, head_scores
from forerun.export.training.loop import Trainer, TrainOptions, TrainState, schedule

SIZES = HeadSizes(HIDDEN, TAPS, VOCAB // 2, ffn=32)


def trainer(folder, data, **changes):
    torch.manual_seed(0)
    vocab = DraftVocab(np.arange(0, VOCAB, 2), VOCAB)
    batches = Batches(data, vocab, 4, taps=tuple(range(TAPS)))
    options = TrainOptions(steps=10, autocast=False, rate=3e-3)
    options = TrainOptions(**{**vars(options), **changes})

    def loss(module, batch):
        torch.manual_seed(int(batch.ids.sum()))
        return head_loss(module, batch, 3)

    return Trainer(FeatureHead(SIZES), loss, batches, folder, options)


def stop_after(steps):
    def tick(state):
        if state.step == steps:
            raise KeyboardInterrupt

    return tick


def test_a_resumed_training_is_an_uninterrupted_one(tmp_path, store):
    whole = trainer(tmp_path / "a", store)
    whole.run()
    first = trainer(tmp_path / "b", store, save_every=0.0)
    with pytest.raises(KeyboardInterrupt):
        first.run(tick=stop_after(6))
    second = trainer(tmp_path / "b", store)
    # Interrupted in step 6, before its checkpoint: that step is done again.
    assert second.state.step == 5
    second.run()
    assert second.state.step == whole.state.step == 10
    assert second.state.epoch == whole.state.epoch == 3
    for (name, a), (_, b) in zip(
        whole.module.named_parameters(), second.module.named_parameters(), strict=True
    ):
        assert torch.equal(a, b), name


def test_training_learns_what_is_in_the_data(tmp_path):
    data = fill_store(tmp_path / "data", answers=4)
    run = trainer(tmp_path / "w", data, steps=150)
    first = next(run.batches.epoch(0, 0))
    before = head_loss(run.module, first, 3).item()
    run.run()
    assert head_loss(run.module, first, 3).item() < 0.5 * before
    assert not (tmp_path / "w" / "checkpoint.part").exists()


def test_a_finished_training_is_not_gone_on_with(tmp_path, store):
    trainer(tmp_path / "a", store).run()
    again = trainer(tmp_path / "a", store)
    again.run(tick=stop_after(11))
    assert again.state.step == 10


def test_time_or_steps_end_a_training():
    state = TrainState(step=5, minutes=9.0)
    assert state.share(TrainOptions(steps=10)) == 0.5
    assert state.share(TrainOptions(minutes=10)) == 0.9
    assert state.share(TrainOptions(steps=2, minutes=100)) == 1.0
    rates = [schedule(x / 100) for x in range(101)]
    assert rates[0] < 0.1 and max(rates) > 0.95 and rates[-1] < 0.03


def test_scores_count_every_held_out_answer(tmp_path, store):
    run = trainer(tmp_path / "a", store)
    scores = head_scores(run.module, run.batches, 3)
    held = [a for a in store.answers if a.held_out]
    assert scores.total.tried[0] == sum(a.length - a.prompt for a in held)
    assert set(scores.by_category) == {a.category for a in held}
