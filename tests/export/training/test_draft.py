import pytest

pytest.importorskip("torch")

import numpy as np
import torch
from training_data import VOCAB

from forerun.export.training.batches import Batches, DraftVocab
from forerun.export.training.check import check_draft
from forerun.export.training.draft import (
    DraftModel,
    DraftSizes,
    draft_from_target,
    draft_loss,
    draft_scores,
)
from forerun.export.training.draft_bundle import draft_weights, write_draft_bundle
from forerun.export.training.target import TAP_FINAL, TorchTarget


@torch.inference_mode()
def test_a_draft_of_all_layers_and_ids_is_the_target(target_bundle):
    vocab = DraftVocab(np.arange(258), 258)
    draft = draft_from_target(target_bundle.folder, None, vocab, (0, 1, 2))
    target = TorchTarget(target_bundle.folder, taps=(TAP_FINAL,), dtype=torch.float32)
    ids = torch.randint(0, 256, (1, 30))
    states = target.forward(ids, 0, torch.tensor([0]), target.cache(1, 30))[:, :, 0]
    assert torch.allclose(draft.logits(draft(ids)), target.logits(states), atol=1e-3)


def test_the_bundle_computes_what_torch_does(target_bundle, tmp_path):
    vocab = DraftVocab(np.arange(0, 258, 2), 258)
    draft = draft_from_target(target_bundle.folder, None, vocab, (0, 2))
    source = draft_weights(draft, target_bundle.manifest, target_bundle.folder, 128)
    manifest = write_draft_bundle(source, target_bundle.manifest, tmp_path, "tiny-draft")
    manifest = check_draft(draft, manifest, tmp_path)
    assert [c.metric for c in manifest.checks] == ["max_abs_error", "relative_rms_error"]
    assert manifest.model.vocab == len(vocab) + 1 and manifest.kv.capacity == 128
    assert manifest.tokenizer.sha256 == target_bundle.manifest.tokenizer.sha256


@pytest.fixture
def batches(store):
    return Batches(store, DraftVocab(np.arange(24), VOCAB), 4)


@pytest.fixture
def draft():
    torch.manual_seed(0)
    return DraftModel(DraftSizes(25, 32, 2, 2, 1, 16, 48, 1e4, 1e-5))


def test_the_draft_learns(draft, batches):
    batch = next(batches.epoch(0, 0))
    optimizer = torch.optim.AdamW(draft.parameters(), lr=1e-2)
    losses = []
    for _ in range(40):
        loss = draft_loss(draft, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.4 * losses[0]


def test_acceptance_is_agreement_further_on(draft, batches, store):
    scores = draft_scores(draft, batches, 3)
    held = [a for a in store.answers if a.held_out]
    batch = batches.make(held)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        best = draft.logits(draft(torch.from_numpy(batch.ids))).argmax(-1).numpy()
    right = batches.vocab.ids[best] == batch.best
    expected = sum(right[i, a.prompt : a.length].sum() for i, a in enumerate(held))
    assert scores.total.accepted[0] == expected
    assert scores.total.tried[0] == sum(a.length - a.prompt for a in held)


def test_later_tokens_are_not_seen(draft):
    ids = torch.randint(0, 24, (1, 12))
    other = ids.clone()
    other[0, 8:] = (other[0, 8:] + 1) % 24
    assert torch.allclose(draft(ids)[0, :8], draft(other)[0, :8], atol=1e-5)
