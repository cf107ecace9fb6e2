from dataclasses import replace

import pytest

pytest.importorskip("torch")

import numpy as np
import onnxruntime
import torch
from torch.nn import functional
from training_data import HIDDEN, TAPS, VOCAB

from forerun.errors import ExportMismatch
from forerun.export.training.batches import Batches, DraftVocab
from forerun.export.training.check import check_head
from forerun.export.training.head import FeatureHead, HeadSizes, head_loss, head_steps
from forerun.export.training.labels import label_loss
from forerun.export.training.to_onnx import STEP_GRAPH, HeadBits, write_head_graph

SIZES = HeadSizes(HIDDEN, TAPS, 24, ffn=64, blocks=2)


@pytest.fixture
def head():
    torch.manual_seed(0)
    return FeatureHead(SIZES)


@pytest.fixture
def batch(store):
    vocab = DraftVocab(np.arange(24), VOCAB)
    return Batches(store, vocab, 4, taps=tuple(range(TAPS))).make(store.answers[:4])


@pytest.mark.parametrize("bits", [HeadBits(32, 32, 32), HeadBits(8, 8, 4), HeadBits(4, 4, 4)])
def test_the_graph_computes_what_torch_does(head, tmp_path, bits):
    write_head_graph(head, tmp_path, bits)
    check = check_head(head, tmp_path, bits)
    assert check.value < (1e-5 if bits.head == 32 else 0.05)


def test_a_graph_of_another_head_is_noticed(head, tmp_path):
    write_head_graph(head, tmp_path)
    with pytest.raises(ExportMismatch):
        check_head(FeatureHead(SIZES), tmp_path)


def test_rows_of_the_graph_do_not_depend_on_each_other(head, tmp_path):
    form = write_head_graph(head, tmp_path)
    session = onnxruntime.InferenceSession(str(tmp_path / STEP_GRAPH))
    assert {i.name for i in session.get_inputs()} == {s.name for s in form.inputs.values()}
    rng = np.random.default_rng(0)
    feeds = {
        "features": np.zeros((5, TAPS * HIDDEN), np.float32),
        "state": rng.standard_normal((5, HIDDEN)).astype(np.float32),
        "ids": rng.integers(0, 25, (5, 2)),
    }
    names = [form.outputs[role].name for role in ("logits", "state")]
    together = session.run(names, feeds)
    for row in range(5):
        alone = session.run(names, {k: v[row : row + 1] for k, v in feeds.items()})
        for a, b in zip(together, alone, strict=True):
            assert np.allclose(a[row], b[0], atol=1e-5)


def test_unrolled_steps_are_single_steps_in_a_row(head, batch):
    rows, columns = batch.bases()
    outputs = head_steps(head, batch, 3)
    pick = 7
    b, t = rows[pick], columns[pick]
    state = head.fused(torch.from_numpy(batch.features[b, t]))[None]
    for step, out in enumerate(outputs, 1):
        if not out.valid[pick]:
            continue
        ids = torch.from_numpy(batch.ids[b, [t + step, t + step - 1]])
        state = head.step(state, ids[:1], ids[1:])
        assert torch.allclose(state[0], out.state[pick], atol=1e-5)
        assert int(out.columns[pick]) == t + step


def test_the_loss_is_cross_entropy_with_its_gradient():
    torch.manual_seed(1)
    states = torch.randn(6, HIDDEN, requires_grad=True)
    head = torch.randn(24, HIDDEN, requires_grad=True)
    batch = made_labels()
    places = torch.tensor([0, 0, 0, 1, 1, 1]), torch.tensor([0, 1, 2, 0, 1, 2])
    loss = label_loss(states, head, batch, places)
    loss.backward()
    fused = states.grad.clone(), head.grad.clone()
    states.grad = head.grad = None
    weights = torch.from_numpy(batch.label_weights)[places]
    target = torch.zeros(6, 24).scatter_add_(1, torch.from_numpy(batch.label_ids)[places], weights)
    logps = functional.log_softmax(states @ head.T, -1)
    plain = -(target * logps).sum() / (weights.sum(-1) > 0).sum()
    plain.backward()
    assert torch.allclose(loss, plain, atol=1e-5)
    assert torch.allclose(fused[0], states.grad, atol=1e-5)
    assert torch.allclose(fused[1], head.grad, atol=1e-5)


def made_labels():
    rng = np.random.default_rng(0)
    weights = rng.random((2, 3, 8)).astype(np.float32)
    weights /= weights.sum(-1, keepdims=True)
    weights[1, 2] = 0
    ids = np.argsort(rng.random((2, 3, 24)))[..., :8]

    class Labels:
        label_ids, label_weights = ids, weights

    return Labels()


def test_attention_sees_verified_tokens_of_its_window_only(batch):
    torch.manual_seed(0)
    head = FeatureHead(replace(SIZES, window=2))
    rows, columns = batch.bases()
    pick = int(np.argmax(columns))
    place = rows[pick], columns[pick]
    before = head_steps(head, batch, 1)[0].state[pick].detach()
    for back, same in ((3, True), (1, False)):
        features = batch.features.copy()
        features[place[0], place[1] - back] += 1
        moved = head_steps(head, replace(batch, features=features), 1)[0].state[pick]
        assert torch.equal(before, moved) == same


def test_a_start_from_the_target_keeps_its_rows(head, batch):
    rng = np.random.default_rng(0)
    embedding, rows = (rng.standard_normal((24, HIDDEN)).astype(np.float32) for _ in range(2))
    sample = batch.features.reshape(-1, TAPS, HIDDEN)
    head.initialise(embedding, rows, np.ones(HIDDEN, np.float32), sample)
    assert np.allclose(head.head.detach().numpy(), rows)
    scale = head.embedding.weight[:-1].numpy() / embedding
    assert np.allclose(scale, scale[0, 0], rtol=1e-4)
    assert head_loss(head, batch, 3).isfinite()
