import numpy as np
from training_data import HIDDEN, TAPS, VOCAB, fill_store

from forerun.export.training.batches import Batches, DraftVocab, choose_vocab


def test_the_vocabulary_is_what_the_target_finds_probable(store):
    mass = np.zeros(VOCAB)
    for a in store.answers:
        if not a.held_out:
            part = slice(a.start, a.start + a.length)
            ids, logps = store.array("top_ids")[part], store.array("top_logps")[part]
            np.add.at(mass, ids[ids >= 0], np.exp(logps[ids >= 0].astype(np.float32)))
    rare = int(np.argmin(mass))
    vocab = choose_vocab(store, 10, VOCAB, (rare,))
    assert len(vocab) == 10 and rare in vocab.ids
    assert list(vocab.ids) == sorted(vocab.ids)
    others = [i for i in vocab.ids if i != rare]
    assert set(others) == set(np.argsort(-mass)[:9])


def test_ids_outside_the_vocabulary_are_unknown():
    vocab = DraftVocab(np.array([3, 7, 9]), 12)
    assert vocab.unknown == 3
    assert list(vocab.to_draft[[3, 7, 9, 0, 11]]) == [0, 1, 2, 3, 3]


def test_a_batch_holds_the_answers_it_was_made_of(store):
    vocab = DraftVocab(np.arange(0, VOCAB, 2), VOCAB)
    batches = Batches(store, vocab, 4, taps=(0, 2), hard=0.5)
    chosen = store.answers[2:6]
    batch = batches.make(chosen)
    for row, answer in enumerate(chosen):
        part = slice(answer.start, answer.start + answer.length)
        n = answer.length
        assert np.array_equal(batch.ids[row, :n], vocab.to_draft[store.array("ids")[part]])
        states = store.array("states")[part]
        assert np.array_equal(batch.features[row, :n], states[:, [0, 2]])
        assert np.array_equal(batch.best[row, :n], store.array("top_ids")[part][:, 0])
        assert (batch.best[row, n:] == -1).all() and not batch.label_weights[row, n:].any()
    assert batch.features.shape[2:] == (2, HIDDEN)


def test_label_weights_mix_argmax_and_distribution(store):
    vocab = DraftVocab(np.arange(0, VOCAB, 2), VOCAB)
    answer = store.answers[3]
    batch = Batches(store, vocab, 1, hard=0.25).make([answer])
    column = answer.prompt
    place = answer.start + column
    top, logps = store.array("top_ids")[place], store.array("top_logps")[place]
    inside = top % 2 == 0
    if not inside[0]:
        assert not batch.label_weights[0, column].any()
    weights = batch.label_weights[0]
    used = weights.sum(-1) > 0
    assert np.allclose(weights[used].sum(-1), 1, atol=1e-6)
    column = int(np.nonzero(used)[0][0])
    place = answer.start + column
    top, logps = store.array("top_ids")[place], store.array("top_logps")[place]
    probs = np.exp(logps.astype(np.float32)) * (top % 2 == 0)
    expected = 0.75 * probs / probs.sum()
    expected[0] += 0.25
    assert np.allclose(weights[column], expected, atol=1e-6)


def test_drafts_begin_behind_the_prompt_and_end_before_the_last_token(store):
    batch = Batches(store, DraftVocab(np.arange(VOCAB), VOCAB), 3).make(store.answers[:3])
    rows, columns = batch.bases()
    for row, answer in enumerate(store.answers[:3]):
        assert list(columns[rows == row]) == list(range(answer.prompt - 1, answer.length - 1))
    assert batch.follows[rows, columns].all(), "the made-up answers are greedy"


def test_an_epoch_is_every_answer_once_in_an_order_of_its_own(tmp_path):
    store = fill_store(tmp_path / "d", answers=12)
    batches = Batches(store, DraftVocab(np.arange(VOCAB), VOCAB), 4, taps=tuple(range(TAPS)))
    seen = [batch.ids for batch in batches.epoch(0, 0)]
    again = [batch.ids for batch in batches.epoch(0, 0)]
    other = [batch.ids for batch in batches.epoch(0, 1)]
    assert len(seen) == 3 and all(map(np.array_equal, seen, again))
    assert not all(
        a.shape == b.shape and np.array_equal(a, b) for a, b in zip(seen, other, strict=True)
    )
    assert sum(len(batch.lengths) for _, batch in batches.held_out()) == 2
