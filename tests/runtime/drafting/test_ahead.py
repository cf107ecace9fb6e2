"""How blocks are drafted behind unverified text, on what thread, and how long they are."""

import threading

import pytest

from forerun.errors import BusyError
from forerun.runtime.drafting.ahead import AheadDrafter, BlockDraft, Branch, branch_count
from forerun.runtime.drafting.pace import Pace
from forerun.runtime.drafting.worker import Worker


class Table:
    """A drafter that looks its answers up: what it was asked for stays in `asked`."""

    name, needs_features, proposes_trees = "table", False, False

    def __init__(self, firsts, second=0.9, end=99):
        self.firsts, self.second, self.end = firsts, second, end
        self.asked = []

    def next_tokens(self, ahead, count):
        self.asked.append(tuple(ahead))
        if len(ahead) == 1:
            tokens = [10, 20, 30, 40][: len(self.firsts)]
            return tokens[:count], self.firsts[:count]
        if len(ahead) > self.end:
            return [], []
        return [ahead[-1] + 1], [self.second]

    def begin(self, ids, features): ...
    def propose(self, budget, keep_going=None): ...
    def observe(self, outcome): ...
    def rewind(self, length): ...
    def close(self): ...


def always(value):
    return True


def test_a_chain_takes_one_step_per_token():
    drafter = Table([0.5, 0.3])
    assert isinstance(drafter, AheadDrafter)
    draft = BlockDraft(drafter, [7], always)
    draft.chain(4)
    assert draft.branches == [Branch((10, 11, 12, 13), (0.5, 0.9, 0.9, 0.9))]
    assert draft.steps == 4
    assert drafter.asked == [(7,), (7, 10), (7, 10, 11), (7, 10, 11, 12)]


def test_a_clear_first_token_gets_the_whole_budget():
    draft = BlockDraft(Table([0.9, 0.05, 0.03]), [7], always)
    draft.forked(8)
    assert [branch.tokens for branch in draft.branches] == [(10, 11, 12, 13, 14, 15, 16, 17)]


def test_a_doubtful_one_shares_it_and_the_best_comes_last():
    drafter = Table([0.3, 0.28, 0.29, 0.1])
    draft = BlockDraft(drafter, [7], always)
    draft.forked(9)
    tokens = [branch.tokens for branch in draft.branches]
    assert tokens == [(10, 11, 12), (20, 21, 22), (30, 31, 32)]
    assert drafter.asked[-1] == (7, 10, 11)
    assert draft.steps == 1 + 3 * 2


@pytest.mark.parametrize(
    ("firsts", "second", "count"),
    [
        ([0.5, 0.4, 0.3], 0.9, 1),  # .45: neither
        ([0.5, 0.46, 0.44], 0.9, 2),  # the second one, and no further
        ([0.5, 0.44, 0.46], 0.9, 1),  # stops at the first that fails
        ([0.4, 0.3, 0.25, 0.2], 0.4, 4),
    ],
)
def test_duo_s_rule(firsts, second, count):
    branches = [Branch((n,), (q,)) for n, q in enumerate(firsts)]
    branches[0] = Branch((0, 1), (firsts[0], second))
    assert branch_count(branches, 8) == count
    assert branch_count(branches, 1) == 1


def test_drafts_end_when_told_and_where_nothing_comes():
    steps = iter([True, False])
    draft = BlockDraft(Table([0.5]), [7], lambda value: next(steps))
    draft.chain(8)
    assert draft.branches[0].tokens == (10, 11)
    draft = BlockDraft(Table([0.5], end=3), [7], always)
    draft.chain(8)
    assert draft.branches[0].tokens == (10, 11, 12)
    draft = BlockDraft(Table([]), [7], always)
    draft.forked(8)
    assert draft.branches == []


def test_drafts_are_told_the_value_so_far():
    values = []
    draft = BlockDraft(Table([0.5], second=0.5), [7], lambda value: not values.append(value))
    draft.chain(4)
    assert values == [0.5, 0.25, 0.125]


def test_the_pace_is_the_number_of_steps_that_fit():
    pace = Pace()
    assert pace.length() == 2
    pace.note(1.0, 50.0, 2)  # the first round reads the prompt and does not count
    assert pace.length() == 2
    for _ in range(5):
        pace.note(1.0, 0.8, 4)
    assert pace.length() == 4
    pace.note(9.0, 0.8, 4)
    assert pace.length() == 4
    for _ in range(20):
        pace.note(1.0, 6.0, 2)
    assert pace.length() == 2


def test_a_worker_runs_on_its_own_thread_and_passes_errors_on():
    worker = Worker("drafter test")
    try:
        assert worker.submit(threading.get_ident).result() != threading.get_ident()
        with pytest.raises(ZeroDivisionError):
            worker.submit(lambda: 1 // 0).result()
        assert worker.submit(lambda: 5).result() == 5
    finally:
        worker.close()
    with pytest.raises(BusyError, match="drafter test"):
        worker.submit(lambda: 1)


def test_a_worker_never_holds_two_calls():
    worker = Worker("drafter test")
    go = threading.Event()
    job = worker.submit(go.wait)
    with pytest.raises(BusyError):
        worker.submit(lambda: 1)
    assert not job.done
    go.set()
    worker.close()
    assert job.done


def test_a_worker_that_is_dropped_ends_its_thread():
    worker = Worker("dropped drafter")
    worker.submit(lambda: 1).result()
    (thread,) = (t for t in threading.enumerate() if t.name == "dropped drafter")
    del worker
    thread.join(5)
    assert not thread.is_alive()
