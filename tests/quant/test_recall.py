"""The recall test: where its pairs lie, and what counts as recalled."""

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import byte_tokenizer

from forerun.errors import OptionError
from forerun.quant.measure_divergence import Stream
from forerun.quant.recall import depths_within, recall, recall_text

FILLER = [250] * 5000
VOCAB = 258


class Reader:
    """Predicts the next id from what it has read, by looking for the last two ids before."""

    def __init__(self, reach=10**6, rewinds=True):
        self.reach, self.rewinds, self.ids, self.prefills, self.widths = reach, rewinds, [], 0, []
        self.arena = SimpleNamespace(rewind=self.rewind, most_rows=10**6)

    def rewind(self, length):
        if length and not self.rewinds:
            raise OptionError("this cache cannot be rewound")
        self.prefills += not length
        self.ids = self.ids[:length]

    def step(self, rows, *, want="last"):
        self.widths.append(len(rows))
        out = []
        for row in rows:
            self.ids.append(int(row))
            out.append(self.predict())
        return np.array(out if want == "all" else out[-1:], np.float32)

    def predict(self):
        logits = np.zeros(VOCAB, np.float32)
        text = self.ids[-self.reach :]
        for size in range(24, 1, -1):
            tail = text[-size:]
            for i in range(len(text) - size - 1, -1, -1):
                if text[i : i + size] == tail:
                    logits[text[i + size]] = 20
                    return logits
        return logits


def layout(depths=(256, 1024), pairs=4):
    return recall_text(byte_tokenizer(), FILLER, [], depths, pairs)


def test_pairs_lie_at_their_depths():
    text = layout()
    assert len(text.ids) == 1024
    assert sorted({q.depth for q in text.queries}) == [256, 1024]
    ids = text.ids.tolist()
    for query in text.queries:
        said = [*query.ask.tolist(), *query.answer.tolist()]
        places = [i for i in range(len(ids)) if ids[i : i + len(said)] == said]
        assert len(places) == 1, "each pair is said once"
        assert len(ids) - places[0] <= query.depth
        assert len(ids) - places[0] > (256 if query.depth == 1024 else 0)


def test_layout_is_the_same_every_time_and_answers_differ():
    a, b = layout(), layout()
    np.testing.assert_array_equal(a.ids, b.ids)
    assert len({q.answer.tobytes() for q in a.queries}) == len(a.queries) == 8
    assert len({q.ask.tobytes() for q in a.queries}) == 8


@settings(deadline=None, max_examples=25)
@given(
    depths=st.sets(st.integers(100, 4000), min_size=1, max_size=4),
    pairs=st.integers(1, 12),
)
def test_any_depths_give_a_text_of_the_largest(depths, pairs):
    text = recall_text(byte_tokenizer(), FILLER, [], tuple(depths), pairs)
    assert len(text.ids) == max(depths)
    assert 1 <= len(text.queries) <= pairs * len(depths)


def test_bos_stands_first_and_takes_no_place():
    text = recall_text(byte_tokenizer(), FILLER, [256], (512,), 4)
    assert text.ids[0] == 256 and len(text.ids) == 512


def test_too_many_pairs_are_refused():
    with pytest.raises(OptionError, match="at most 16 pairs"):
        recall_text(byte_tokenizer(), FILLER, [], (256, 512, 1024, 2048), 17)


@pytest.mark.parametrize(
    ("limit", "expected"),
    [(8192, (256, 1024, 2048, 4096)), (4096, (256, 1024, 2048)), (256, (192,)), (100, ())],
)
def test_depths_are_those_that_fit(limit, expected):
    assert depths_within(limit) == expected


def test_a_perfect_reader_recalls_all_and_a_short_sighted_one_only_what_is_near():
    text = layout()
    everything = recall(Stream(Reader()), text)
    assert everything["recall"] == 100 and everything["queries"] == 8
    assert everything["nll"] < 1e-3
    near = recall(Stream(Reader(reach=300)), text)
    assert near["by_depth"]["256"]["recall"] == 100
    assert near["by_depth"]["1024"]["recall"] == 0
    assert near["recall"] == 50 and near["nll"] > 1
    assert near["by_depth"]["1024"]["nll"] > near["by_depth"]["256"]["nll"]


def test_the_text_is_read_once_or_again_where_the_cache_cannot_go_back():
    text = layout(pairs=2)
    reader, forgetful = Reader(), Reader(rewinds=False)
    assert recall(Stream(reader), text) == recall(Stream(forgetful), text)
    assert (reader.prefills, forgetful.prefills) == (1, 1 + len(text.queries))


def test_questions_and_what_stands_before_are_read_row_by_row_where_only_that_counts():
    # What skips feed-forward blocks does so a few single rows behind a prompt, not before.
    text = layout(pairs=2)
    reader = Reader()
    found = recall(Stream(reader, rows_per_step=1), text)
    single = sum(32 + len(query.ask) + len(query.answer) - 1 for query in text.queries)
    assert reader.widths.count(1) == single
    assert found == recall(Stream(Reader()), text)
