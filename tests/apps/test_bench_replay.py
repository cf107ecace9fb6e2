"""The simulated target: it says what was recorded, and schedules on it go as they are counted."""

import time

import numpy as np
import pytest
from fakes import make_manifest
from rich.console import Console

from forerun.apps.bench import replay
from forerun.apps.bench import simulate as simulate_module
from forerun.apps.bench.replay import Recording, ReplayTarget, play
from forerun.apps.bench.replay_hits import REPLAYS, Guesses, study
from forerun.apps.bench.replay_run import CountingPolicy
from forerun.apps.bench.simulate import simulate, simulated_table
from forerun.errors import ForerunError, OptionError, UnsupportedError
from forerun.runtime.drafting import formulas
from forerun.runtime.drafting.accept import MatchWalk
from forerun.runtime.drafting.async_rounds import AsyncRounds
from forerun.runtime.drafting.ngram import NgramDrafter
from forerun.runtime.drafting.rounds import DraftRounds
from forerun.runtime.drafting.schedules import SCHEDULES
from forerun.runtime.drafting.tree import TokenTree
from forerun.runtime.prefix import PrefixCache

VOCAB = 50
RNG = np.random.default_rng(5)
RECORDINGS = [
    Recording(tuple(RNG.integers(0, VOCAB - 9, 6)), tuple(RNG.integers(0, VOCAB - 9, 40)))
    for _ in range(2)
]
MANIFEST = make_manifest(VOCAB)


class Scripted:
    """Knows the recordings and is wrong by the toss of a coin, the same at every call."""

    name, needs_features, proposes_trees = "scripted", False, False

    def __init__(self, alpha=0.7):
        self.alpha, self.ids = alpha, []

    def begin(self, ids, features=None):
        self.ids = [int(token) for token in ids]
        (self.text,) = [
            r.prompt + r.answer for r in RECORDINGS if r.prompt == tuple(self.ids[: len(r.prompt)])
        ]

    def next_tokens(self, ahead, count):
        at = len(self.ids) + len(ahead)
        right = self.text[at] if at < len(self.text) else 0
        wrong = [VOCAB - 1, VOCAB - 2, VOCAB - 3]
        lucky = np.random.default_rng([at, self.text[0]]).random() < self.alpha
        order = [right, *wrong] if lucky else [wrong[0], right, *wrong[1:]]
        sure = [0.6, 0.2, 0.1, 0.05] if lucky else [0.3, 0.29, 0.2, 0.1]
        return order[:count], sure[:count]

    def propose(self, budget, keep_going=None):
        tokens = []
        while len(tokens) < budget:
            tokens += self.next_tokens(tokens, 1)[0]
        return TokenTree.chain(tokens, [0.6] * budget, self.name)

    def observe(self, outcome):
        self.ids += outcome.new_tokens

    def rewind(self, length):
        del self.ids[length:]

    def close(self): ...


def test_it_says_what_was_recorded():
    recording = RECORDINGS[0]
    target = ReplayTarget(MANIFEST, 0.0)
    target.load(recording)
    logits = target.step(recording.prompt)
    assert logits.shape == (1, VOCAB)
    assert logits[0].argmax() == recording.answer[0]
    rows = target.step(recording.answer[:4], want="all")
    assert rows.argmax(axis=1).tolist() == list(recording.answer[1:5])
    target.arena.rewind(len(recording.prompt) + 1)
    assert target.step(recording.answer[1:2])[0].argmax() == recording.answer[2]
    assert target.steps == 2


def test_a_step_waits_for_its_rows_but_not_for_the_prompt(monkeypatch):
    waits = []
    monkeypatch.setattr(replay, "wait_until", lambda end: waits.append(end - time.perf_counter()))
    target = ReplayTarget(MANIFEST, 50.0, lambda rows: 1 + rows)
    target.load(RECORDINGS[0])
    target.step(RECORDINGS[0].prompt)
    assert waits == []
    target.step(RECORDINGS[0].answer[:3], want="all")
    assert waits == [pytest.approx(200.0, abs=10)]


def test_trees_and_empty_recordings_are_refused():
    with pytest.raises(OptionError, match="chains only"):
        ReplayTarget(MANIFEST, 0.0).step([1, 2], parents=[-1, -1])
    with pytest.raises(OptionError, match="at least one token"):
        Recording((), (1,))
    with pytest.raises(OptionError, match="of 9 tokens"):
        study(Scripted(), [Recording(RECORDINGS[0].prompt, RECORDINGS[0].answer[:1])])


def test_a_schedule_that_changes_the_text_voids_the_simulation():
    class Wrong:
        def round(self, tokens, pick, room):
            return [(0, None)] * room

        def finish(self, length): ...

    target = ReplayTarget(MANIFEST, 0.0)
    with pytest.raises(ForerunError, match="void"):
        play(target, PrefixCache(target), Wrong(), RECORDINGS[0])


@pytest.mark.parametrize("schedule", REPLAYS)
@pytest.mark.parametrize("gamma", [2, 5])
def test_rounds_go_as_they_are_counted(monkeypatch, schedule, gamma):
    """What is drafted ahead and dropped, adopted or drafted anew, round by round."""
    drafter = Scripted()
    known = study(drafter, RECORDINGS)
    policy = CountingPolicy(gamma)
    target = ReplayTarget(MANIFEST, 0.0)
    cache = PrefixCache(target)
    overlap = SCHEDULES[schedule].overlap
    if overlap is None:
        rounds = DraftRounds(cache, drafter, policy, MatchWalk())
    else:
        rounds = AsyncRounds(cache, drafter, policy, MatchWalk(), overlap, length=gamma)
        # A target that is never faster than the drafter, however busy the machine is.
        monkeypatch.setattr(
            replay, "wait_until", lambda end: rounds._worker and rounds._worker._latest.wait()
        )
    for recording, guesses in zip(RECORDINGS, known.guesses, strict=True):
        before = policy.counts.rounds
        play(target, cache, rounds, recording)
        expected = REPLAYS[schedule](guesses, gamma)
        assert policy.counts.rounds - before == expected.rounds


@pytest.mark.parametrize(("alpha", "gamma"), [(0.5, 4), (0.8, 6)])
def test_independent_hits_give_the_formulas(alpha, gamma):
    wrong = np.random.default_rng(1).random(200_000) >= alpha
    right = Guesses(tuple(wrong.astype(int)), ())
    tokens = len(wrong)
    c, r = 0.1, 1.0
    serial = REPLAYS["serial"](right, gamma)
    assert tokens / (serial.rounds * (gamma * c + r)) == pytest.approx(
        formulas.serial_chain(alpha, gamma, c, r), rel=0.01
    )
    pearl = REPLAYS["pearl"](right, gamma)
    assert tokens / (pearl.rounds * r) == pytest.approx(
        formulas.pearl(alpha, gamma, c, r), rel=0.01
    )
    ahead = REPLAYS["optimistic"](right, gamma)
    seconds = ahead.rounds * r + ahead.redrafts * gamma * c
    assert tokens / seconds == pytest.approx(formulas.optimistic(alpha, gamma, c, r), rel=0.01)


def test_every_schedule_is_simulated_at_every_speed():
    rows = simulate(MANIFEST, RECORDINGS, Scripted(), t_targets_ms=(2.0, 4.0))
    assert [(row.t_target_ms, row.schedule) for row in rows] == [
        (t, name) for t in (2.0, 4.0) for name in ("serial", "pearl", "duo", "optimistic")
    ]
    assert all(row.speedup > 0 and row.formula > 0 and row.s > 0 for row in rows)
    assert all(1 <= row.tokens_per_round < row.gamma + 2 for row in rows)
    for choice in ("chosen", "chosen_by_rate"):
        assert sum(getattr(row, choice) for row in rows if row.t_target_ms == 2.0) == 1
    console = Console(record=True, width=180)
    console.print(simulated_table(rows))
    assert "SIMULATION" in console.export_text()


def test_no_more_is_said_than_asked_for():
    said = []
    limited = simulate_module._limited(RECORDINGS, 50)
    assert [len(recording.answer) for recording in limited] == [40, 10]
    rows = simulate(
        MANIFEST,
        RECORDINGS,
        Scripted(),
        t_targets_ms=(1.0,),
        schedules=("serial",),
        most_tokens=20,
        progress=said.append,
    )
    assert len(rows) == 1
    assert said == ["simulated target of 1 ms, serial"]


def test_only_drafters_that_run_ahead_and_known_schedules():
    with pytest.raises(UnsupportedError, match="ngram"):
        simulate(MANIFEST, RECORDINGS, NgramDrafter())
    with pytest.raises(OptionError, match="eager"):
        simulate(MANIFEST, RECORDINGS, Scripted(), schedules=("eager",))
