"""Overlapped schedules: the text never changes, and nothing that stops them leaves a trace."""

import random
import threading
import time

import pytest
from overlap import Doubtful, Slowed, in_step, plain, read, same_cache, speak
from tiny import tiny_bundle

from forerun.errors import DrafterError, OptionError, UnsupportedError
from forerun.runtime.drafting.accept import MatchWalk
from forerun.runtime.drafting.async_rounds import AsyncRounds, Overlap
from forerun.runtime.drafting.choice import Drafters
from forerun.runtime.drafting.fixed import FixedPolicy
from forerun.runtime.drafting.ngram import NgramDrafter
from forerun.runtime.drafting.schedules import SCHEDULES, find_schedule
from forerun.runtime.prefix import PrefixCache
from forerun.runtime.runner import Runner
from forerun.runtime.session import Session
from forerun.runtime.tokenizer import Tokenizer
from forerun.runtime.types import SamplingParams

PROMPT = list(b"a drafter runs ahead")
COUNT = 60
DRAWS = {"greedy": SamplingParams()} | {
    f"seed {seed}": SamplingParams(temperature=0.8, seed=seed) for seed in (1, 2, 3)
}
OVERLAPPED = [name for name, row in SCHEDULES.items() if row.overlap is not None]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return tiny_bundle("llama", tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def runners(bundle):
    """Target, draft model and a third one for fresh prefills, all with the same weights."""
    made = [Runner(*bundle, threads=1, spin=False) for _ in range(3)]
    yield made
    for runner in made:
        runner.close()


def make(schedule, cache, drafter, policy=None, **options):
    row = find_schedule(schedule)
    return row.make(cache, drafter, policy or FixedPolicy(4), MatchWalk(), **options)


@pytest.mark.parametrize("draw", DRAWS)
@pytest.mark.parametrize("wrong", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("schedule", ["serial", "pearl", "duo", "optimistic"])
def test_same_text_as_plain_decoding(runners, schedule, wrong, draw):
    target, small, _ = runners
    params = DRAWS[draw]
    expected = plain(target, PROMPT, params, COUNT)
    cache = PrefixCache(Slowed(target, 0.001))
    rounds = make(schedule, cache, Doubtful(small, wrong), params=params)
    assert speak(rounds, cache, PROMPT, params, COUNT) == expected
    if wrong == 1.0:
        assert rounds.tally.accepted == 0


def overlapped(target, small, schedule, wrong, length, params=None):
    """Rounds of a set length, whose target always waits for the drafter; and their cache."""
    slow = Slowed(target)
    cache = PrefixCache(slow)
    drafter = Doubtful(small, wrong)
    overlap = SCHEDULES[schedule].overlap
    policy = FixedPolicy(length)
    rounds = AsyncRounds(cache, drafter, policy, MatchWalk(), overlap, params=params, length=length)
    in_step(slow, rounds)
    return rounds, cache


@pytest.mark.parametrize("draw", DRAWS)
@pytest.mark.parametrize(
    ("schedule", "most"),
    [
        ("pearl", 1 + 15),  # one without a block, then four tokens in each
        ("optimistic", 12),  # five in each
    ],
)
def test_a_perfect_drafter_is_never_behind(runners, schedule, most, draw):
    target, small, _ = runners
    rounds, cache = overlapped(target, small, schedule, 0.0, 4, DRAWS[draw])
    assert len(speak(rounds, cache, PROMPT, DRAWS[draw], COUNT)) == COUNT
    assert len(rounds.tally.rounds) == most
    assert rounds.ahead.hits == rounds.ahead.tries


def test_every_schedule_is_tested():
    assert list(SCHEDULES) == ["serial", "pearl", "duo", "optimistic"]
    with pytest.raises(OptionError, match="serial, pearl, duo, optimistic"):
        find_schedule("eager")


@pytest.mark.parametrize("schedule", OVERLAPPED)
def test_both_sides_run_at_the_same_time(runners, schedule):
    """The drafter's next step starts while the target is inside its own."""
    target, small, _ = runners
    together = []
    slow = Slowed(target)
    drafting = threading.Event()
    drafter = Doubtful(Slowed(small))
    drafter._runner.before = drafting.set

    def wait_for_the_drafter():
        drafting.clear()
        together.append(drafting.wait(5))

    cache = PrefixCache(slow)
    read(cache, PROMPT)
    slow.before = wait_for_the_drafter
    cache.rewind(len(PROMPT) - 1)
    rounds = make(schedule, cache, drafter)
    try:
        said = rounds.round(PROMPT, lambda row, path: int(row.argmax()), 8)
    finally:
        rounds.finish(0)
    assert said
    assert together == [True]


def test_forks_save_a_draft_whose_first_token_is_wrong(runners):
    target, small, _ = runners
    counts = {}
    for schedule in ("pearl", "duo"):
        rounds, cache = overlapped(target, small, schedule, 0.4, 8)
        speak(rounds, cache, PROMPT, DRAWS["greedy"], COUNT)
        counts[schedule] = rounds.ahead
    assert counts["duo"].hits / counts["duo"].tries > counts["pearl"].hits / counts["pearl"].tries


def test_only_optimistic_drafts_while_the_target_waits(runners):
    target, small, _ = runners
    proposed = {}
    for schedule in ("pearl", "optimistic"):
        rounds, cache = overlapped(target, small, schedule, 1.0, 4)
        speak(rounds, cache, PROMPT, DRAWS["greedy"], 20)
        proposed[schedule] = rounds.tally.proposed
    assert proposed["pearl"] == 0
    assert proposed["optimistic"] > 20


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_no_budget_is_plain_decoding(runners, schedule):
    target, small, _ = runners
    cache = PrefixCache(target)
    drafter = Doubtful(small)
    rounds = make(schedule, cache, drafter, FixedPolicy(0))
    expected = plain(target, PROMPT, DRAWS["greedy"], 10)
    cache = PrefixCache(target)
    rounds = make(schedule, cache, drafter, FixedPolicy(0))
    assert speak(rounds, cache, PROMPT, DRAWS["greedy"], 10) == expected
    assert drafter.calls == 0


@pytest.mark.parametrize("schedule", OVERLAPPED)
def test_up_to_a_full_context(runners, schedule):
    """Blocks shrink to the room there is; the last row of the context is used."""
    target, small, _ = runners
    capacity = target.arena.capacity
    prompt = (PROMPT * 20)[: capacity - 12]
    expected = plain(target, prompt, DRAWS["greedy"], 13)
    cache = PrefixCache(target)
    rounds = make(schedule, cache, Doubtful(small), FixedPolicy(16))
    assert speak(rounds, cache, prompt, DRAWS["greedy"], 13) == expected
    assert len(cache.ids) == target.arena.length <= capacity


@pytest.mark.parametrize("schedule", OVERLAPPED)
def test_a_second_answer_and_a_restart(runners, schedule):
    target, small, _ = runners
    cache = PrefixCache(target)
    drafter = Doubtful(small, 0.2)
    first = speak(make(schedule, cache, drafter), cache, PROMPT, DRAWS["greedy"], 20)
    rounds = make(schedule, cache, drafter)
    longer = PROMPT + first + list(b" and")
    told = speak(rounds, cache, longer, DRAWS["greedy"], 20)
    rounds.restart(0)
    again = speak(rounds, cache, PROMPT, DRAWS["greedy"], 20)
    assert again == first
    assert told == plain(target, longer, DRAWS["greedy"], 20)


def stop_at(step, delay, flag, *runners):
    """Set the flag at one step of all that these runners take, or a little later."""
    left = [step]
    lock = threading.Lock()

    def count():
        with lock:
            left[0] -= 1
            fires = left[0] == 0
        if fires:
            threading.Timer(delay, flag.set).start() if delay else flag.set()

    for runner in runners:
        runner.before = count


def stopped(target, small, fresh, schedule, seed):
    """One answer that is stopped in a random state, and a check of both caches after it."""
    rng = random.Random(f"{schedule} {seed}")
    slow = Slowed(target, rng.choice([0.0, 0.002]))
    slow_small = Slowed(small, rng.choice([0.0, 0.0005, 0.004]))
    cache = PrefixCache(slow)
    drafter = Doubtful(slow_small, rng.choice([0, 0.2, 1]))
    flag = threading.Event()
    rounds = make(schedule, cache, drafter, cancelled=flag.is_set)
    stop_at(rng.randrange(1, 80), rng.choice([0, 0, 0.001]), flag, slow, slow_small)
    answer = speak(rounds, cache, PROMPT, DRAWS["greedy"], COUNT)
    assert cache.ids == (PROMPT + answer)[: len(cache.ids)]
    same_cache(target, cache.ids, fresh)
    # What it drafted last may still be there, under its own ids; never rows of other ids.
    assert drafter._ids == (PROMPT + answer)[: len(drafter._ids)]
    assert len(drafter._cached) <= len(PROMPT + answer)
    same_cache(small, drafter._cached, fresh)
    return answer


@pytest.mark.parametrize("schedule", OVERLAPPED)
def test_cancel_at_any_time_leaves_both_caches_right(runners, schedule):
    target, small, fresh = runners
    expected = plain(target, PROMPT, DRAWS["greedy"], COUNT)
    lengths = set()
    for seed in range(100):
        answer = stopped(target, small, fresh, schedule, seed)
        assert answer == expected[: len(answer)]
        lengths.add(len(answer))
    assert len(lengths) > 5
    assert not any(thread.name.startswith("drafter") for thread in threading.enumerate())


@pytest.mark.parametrize("schedule", OVERLAPPED)
@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("fail_at", [1, 2, 5])
def test_a_failing_target_passes_its_error_on(runners, schedule, fail_at, late):
    target, small, fresh = runners
    slow = Slowed(target, 0.001, fail_at, late)
    cache = PrefixCache(slow)
    drafter = Doubtful(small)
    rounds = make(schedule, cache, drafter)
    with pytest.raises(RuntimeError, match="went away"):
        speak(rounds, cache, PROMPT, DRAWS["greedy"], COUNT)
    same_cache(target, cache.ids, fresh)
    again = speak(make(schedule, cache, drafter), cache, PROMPT, DRAWS["greedy"], COUNT)
    assert again == plain(target, PROMPT, DRAWS["greedy"], COUNT)


@pytest.mark.parametrize("schedule", OVERLAPPED)
@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("fail_at", [0, 1, 7])
def test_a_failing_drafter_passes_its_error_on(runners, schedule, fail_at, late):
    target, small, fresh = runners
    cache = PrefixCache(target)
    drafter = Doubtful(Slowed(small, 0.0, fail_at, late))
    rounds = make(schedule, cache, drafter)
    with pytest.raises(DrafterError, match="went away"):
        speak(rounds, cache, PROMPT, DRAWS["greedy"], COUNT)
    same_cache(target, cache.ids, fresh)
    again = speak(make(schedule, cache, drafter), cache, PROMPT, DRAWS["greedy"], COUNT)
    assert again == plain(target, PROMPT, DRAWS["greedy"], COUNT)
    same_cache(small, drafter._cached, fresh)


def test_when_both_fail_the_target_s_error_counts(runners):
    target, small, _ = runners
    cache = PrefixCache(Slowed(target, 0.005, 1))
    drafter = Doubtful(Slowed(small, 0.0, 0))
    with pytest.raises(RuntimeError, match="went away"):
        speak(make("pearl", cache, drafter), cache, PROMPT, DRAWS["greedy"], COUNT)
    answer = speak(make("pearl", cache, drafter), cache, PROMPT, DRAWS["greedy"], 20)
    assert answer == plain(target, PROMPT, DRAWS["greedy"], 20)


def test_ids_outside_the_vocabulary_are_the_drafter_s_fault(runners):
    target, small, _ = runners
    # Slow enough that the drafter is asked while it verifies, whatever else the machine does.
    cache = PrefixCache(Slowed(target, 0.03))
    drafter = Doubtful(small)
    good = drafter.next_tokens
    drafter.next_tokens = lambda ahead, count: good(ahead, count) if not ahead else ([999], [1.0])
    with pytest.raises(DrafterError, match="ids go from 0"):
        speak(make("pearl", cache, drafter), cache, PROMPT, DRAWS["greedy"], COUNT)


def test_a_drafter_that_knows_nothing_leaves_plain_decoding(runners):
    target, small, _ = runners
    for schedule in OVERLAPPED:
        cache = PrefixCache(target)
        drafter = Doubtful(small)
        drafter.next_tokens = lambda ahead, count: ([], [])
        answer = speak(make(schedule, cache, drafter), cache, PROMPT, DRAWS["greedy"], 10)
        assert answer == plain(target, PROMPT, DRAWS["greedy"], 10)


class Watching(FixedPolicy):
    """Notes which time each block is said to have cost."""

    def prune(self, tree, draft_seconds, depth):
        SEEN.append((len(tree), draft_seconds))
        return tree


SEEN = []


@pytest.mark.parametrize("schedule", ["pearl", "optimistic"])
def test_the_policy_is_told_what_the_target_waited_for_a_block(schedule, runners):
    """A block that was drafted while the target waited costs time, one drafted beside it none."""
    target, small, _ = runners
    SEEN.clear()
    cache = PrefixCache(Slowed(target, 0.01))
    rounds = make(schedule, cache, Doubtful(small, 0.5), Watching(4))
    speak(rounds, cache, PROMPT, DRAWS["greedy"], COUNT)
    waited = [seconds for length, seconds in SEEN if length]
    assert waited and any(waited) == (schedule == "optimistic")
    assert all(seconds >= 0 for _, seconds in SEEN)


def test_finish_while_the_drafter_is_busy_waits_for_it(runners):
    """Another thread ends the rounds; the drafter is not inside a step afterwards."""
    target, small, _ = runners
    slow = Slowed(small, 0.02)
    cache = PrefixCache(Slowed(target, 0.03))
    drafter = Doubtful(slow)
    flag = threading.Event()
    rounds = make("pearl", cache, drafter, cancelled=flag.is_set)
    thread = threading.Thread(
        target=speak, args=(rounds, cache, PROMPT, DRAWS["greedy"], COUNT), daemon=True
    )
    thread.start()
    time.sleep(0.05)
    flag.set()
    thread.join(10)
    assert not thread.is_alive()
    steps = slow.steps
    time.sleep(0.05)
    assert slow.steps == steps


def test_the_drafter_must_be_able_to_run_ahead(runners):
    class Plain:
        name, needs_features, proposes_trees = "ngram", False, True

    cache = PrefixCache(runners[0])
    with pytest.raises(UnsupportedError, match="ngram cannot draft behind"):
        AsyncRounds(cache, Plain(), FixedPolicy(), MatchWalk(), Overlap())
    wants = Doubtful(runners[1])
    wants.needs_features = True
    with pytest.raises(UnsupportedError, match="serial"):
        AsyncRounds(cache, wants, FixedPolicy(), MatchWalk(), Overlap())


def session_of(bundle, target, schedule):
    drafters = Drafters(target.manifest, schedule=schedule)
    return Session(target, Tokenizer(*bundle), drafters=drafters)


@pytest.mark.parametrize("schedule", OVERLAPPED)
@pytest.mark.parametrize("draw", DRAWS)
def test_a_session_says_the_same(bundle, runners, schedule, draw):
    target, small, _ = runners
    session = session_of(bundle, target, schedule)
    options = {"max_tokens": 40, "sampling": DRAWS[draw], "stop_ids": ()}
    expected = [token for token, _ in session.generate_ids(PROMPT, **options)]
    drafter = Doubtful(small, 0.3)
    events = list(session.generate_ids(PROMPT, **options, drafter=drafter))
    assert [token for token, _ in events] == expected
    assert session.tokens == PROMPT + expected


@pytest.mark.parametrize("schedule", OVERLAPPED)
@pytest.mark.parametrize("ends", ["cancel", "close"])
def test_a_session_is_stopped_at_any_time(bundle, runners, schedule, ends):
    """By a cancel from another thread, or by its consumer; then it goes on as if nothing was."""
    target, small, fresh = runners
    session = session_of(bundle, Slowed(target, 0.001), schedule)
    drafter = Doubtful(Slowed(small, 0.0005), 0.2)
    expected = plain(target, PROMPT, DRAWS["greedy"], COUNT)
    for seed in range(15):
        rng = random.Random(f"{schedule} {ends} {seed}")
        source = session.generate_ids(PROMPT, max_tokens=COUNT, stop_ids=(), drafter=drafter)
        timer = threading.Timer(rng.uniform(0, 0.05), session.cancel)
        if ends == "cancel":
            timer.start()
            told = [token for token, _ in source]
            timer.join()
        else:
            told = [next(source)[0] for _ in range(rng.randrange(1, 30))]
            source.close()
        assert told == expected[: len(told)]
        assert not session.busy
        cached = session._cache.ids
        assert cached == session.tokens[: len(cached)]
        same_cache(target, cached, fresh)
        same_cache(small, drafter._cached, fresh)


def test_a_session_refuses_before_any_compute(bundle, runners):
    slow = Slowed(runners[0])
    session = session_of(bundle, slow, "pearl")
    with pytest.raises(UnsupportedError, match="serial"):
        session.generate_ids(PROMPT, drafter=NgramDrafter())
    assert slow.steps == 0
