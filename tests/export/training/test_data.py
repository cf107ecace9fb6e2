import json

import numpy as np
import pytest
from training_data import HIDDEN, TAPS, fill_store, make_entry

from forerun.errors import BundleError
from forerun.export.training.data import TokenStore


def test_what_was_appended_is_read(tmp_path):
    rng = np.random.default_rng(1)
    entries = [make_entry(rng, length=n) for n in (9, 12)]
    store = TokenStore(tmp_path / "d", TAPS + 1, HIDDEN)
    store.append(entries)
    again = TokenStore(tmp_path / "d")
    assert again.answers == store.answers and again.tokens == 21
    assert again.answer_tokens == 21 - 2 * 4
    second = again.answers[1]
    part = slice(second.start, second.start + second.length)
    for name, value in entries[1][0].items():
        stored = again.array(name)[part]
        assert np.array_equal(stored, value.astype(stored.dtype)), name


def test_an_interrupted_batch_leaves_no_trace(tmp_path):
    store = fill_store(tmp_path / "d", 3)
    whole = fill_store(tmp_path / "e", 3)
    for name in ("ids", "states"):
        with open(tmp_path / "d" / name, "ab") as stream:
            stream.write(b"x" * 1000)
    with open(tmp_path / "d" / "index.jsonl", "a") as stream:
        stream.write('[{"start": 0')
    store = TokenStore(tmp_path / "d")
    assert store.answers == whole.answers
    more = [make_entry(np.random.default_rng(7))]
    store.append(more)
    whole.append(more)
    again = TokenStore(tmp_path / "d")
    for name in ("ids", "states", "top_ids", "top_logps"):
        assert np.array_equal(again.array(name), whole.array(name)), name
    assert again.answers == whole.answers


def test_a_reader_sees_what_a_writer_appends(tmp_path):
    writer = fill_store(tmp_path / "d", 3)
    reader = TokenStore(tmp_path / "d")
    writer.append([make_entry(np.random.default_rng(2))])
    reader.refresh()
    assert reader.answers == writer.answers and len(reader.array("ids")) == writer.tokens


def test_no_data_and_other_data_are_refused(tmp_path):
    with pytest.raises(BundleError, match="no training data"):
        TokenStore(tmp_path / "d")
    TokenStore(tmp_path / "d", 2, 8)
    with pytest.raises(BundleError, match="another model"):
        TokenStore(tmp_path / "d", 3, 8)
    assert json.loads((tmp_path / "d" / "meta.json").read_text())["hidden"] == 8
