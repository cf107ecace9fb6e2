"""What overlapping would gain beside an accelerator: schedules timed on a simulated target.

The drafter is the true one and computes; the target is a `ReplayTarget`, which waits. What is
measured stands beside the formulas of `runtime.drafting.formulas`, in two ways: with acceptance
taken as independent from token to token, at the rate that was measured; and with the drafter's
recorded hits and misses in their true order, since they come in bursts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from forerun.apps.bench.replay import Recording, ReplayTarget, RowsCost, flat, play
from forerun.apps.bench.replay_hits import FIRSTS, REPLAYS, Study, study, time_drafts
from forerun.apps.bench.replay_run import CountingPolicy, Run
from forerun.runtime.drafting import formulas
from forerun.runtime.drafting.accept import MatchWalk
from forerun.runtime.drafting.async_rounds import AsyncRounds, check_ahead
from forerun.runtime.drafting.costs import StepCosts
from forerun.runtime.drafting.pace import MARGIN
from forerun.runtime.drafting.placement import DrafterPlace, TargetPlace, choose_placement
from forerun.runtime.drafting.rounds import DraftRounds
from forerun.runtime.drafting.schedules import SCHEDULES, find_schedule
from forerun.runtime.prefix import PrefixCache

if TYPE_CHECKING:
    from rich.table import Table

    from forerun.runtime.drafting.ahead import AheadDrafter
    from forerun.runtime.drafting.drafter import Drafter
    from forerun.runtime.manifest import Manifest

T_TARGET_MS = (5.0, 10.0, 30.0, 60.0)
MOST_TOKENS = 480
_MOST = 16
_PLAIN_TOKENS = 48
_DEPTH = 64
_TYPICAL = 4


@dataclass(frozen=True)
class SimulatedRow:
    """One schedule at one speed of the simulated target.

    Attributes:
        t_target_ms: time of the target's step.
        schedule: its name.
        speedup: plain time / time with this schedule, measured; so are alpha, c and s.
        formula: the same by the formula, at this alpha, c and s.
        replayed: the same by the recorded hits and misses, c and s.
        alpha: chance that a drafted token was right given that those before it were.
        c: time of a draft step, in plain steps.
        s: overhead of a round, in plain steps.
        gamma: tokens to draft in a round.
        tokens_per_round: measured.
        tokens_per_second: measured.
        chosen: whether this schedule is the best one by `replayed`, and better than none.
        chosen_by_rate: whether `placement` picks it, which knows the rate of hits alone.
    """

    t_target_ms: float
    schedule: str
    speedup: float
    formula: float
    replayed: float
    alpha: float
    c: float
    s: float
    gamma: int
    tokens_per_round: float
    tokens_per_second: float
    chosen: bool
    chosen_by_rate: bool


def simulate(
    manifest: Manifest,
    recordings: Sequence[Recording],
    drafter: Drafter,
    *,
    t_targets_ms: Sequence[float] = T_TARGET_MS,
    schedules: Sequence[str] = tuple(SCHEDULES),
    rows_cost: RowsCost = flat,
    most_tokens: int = MOST_TOKENS,
    progress: Callable[[str], None] = lambda stage: None,
) -> list[SimulatedRow]:
    """Time schedules against simulated targets of several speeds.

    Args:
        manifest: of the recorded model.
        recordings: its greedy answers by plain decoding.
        drafter: the true one, which must be able to run ahead; its threads must not spin.
        t_targets_ms: times of the target's step.
        schedules: names.
        rows_cost: r(n) of the simulated device.
        most_tokens: tokens that each schedule says at each speed, at most: waiting takes its time.
            Recordings beyond it are left out, and the last one is cut.
        progress: told what comes next.

    Raises:
        UnsupportedError: the drafter cannot run ahead.
        OptionError: a schedule is not known, or no recording is long enough.
    """
    for name in schedules:
        find_schedule(name)
    ahead = check_ahead(drafter)
    recordings = _limited(recordings, most_tokens)
    known = study(ahead, recordings)
    rows: list[SimulatedRow] = []
    for t_target in t_targets_ms:
        bench = _Bench(manifest, recordings, ahead, known, t_target / 1e3, rows_cost)
        found: list[SimulatedRow] = []
        for schedule in schedules:
            progress(f"simulated target of {t_target:g} ms, {schedule}")
            found.append(bench.row(schedule))
        best = max(found, key=lambda row: row.replayed)
        rows += [replace(row, chosen=row is best and best.replayed > 1) for row in found]
    return rows


def _limited(recordings: Sequence[Recording], most_tokens: int) -> list[Recording]:
    kept: list[Recording] = []
    for recording in recordings:
        if most_tokens <= 0:
            break
        kept.append(Recording(recording.prompt, recording.answer[:most_tokens]))
        most_tokens -= len(recording.answer)
    return kept


class _Bench:
    """All schedules at one speed of the target. Ratios are in units of a plain step."""

    def __init__(
        self,
        manifest: Manifest,
        recordings: Sequence[Recording],
        drafter: AheadDrafter,
        known: Study,
        seconds: float,
        rows_cost: RowsCost,
    ) -> None:
        self._target = ReplayTarget(manifest, seconds, rows_cost)
        self._cache = PrefixCache(self._target)
        self._recordings, self._drafter, self._known = recordings, drafter, known
        self._seconds, self._rows_cost = seconds, rows_cost
        self._plain = self._plain_seconds()
        self._cost = time_drafts(drafter, recordings, seconds)
        self._by_rate = self._choose()

    def row(self, schedule: str) -> SimulatedRow:
        """Run a schedule over all recordings."""
        run = self._run(schedule)
        c, s = run.step_seconds / self._plain, self._overhead(run)
        per_token = run.seconds / run.tokens
        return SimulatedRow(
            t_target_ms=self._seconds * 1e3,
            schedule=schedule,
            speedup=self._plain / per_token,
            formula=self._formula(run, c, s),
            replayed=self._replayed(run, c, s),
            alpha=run.alpha,
            c=c,
            s=s,
            gamma=run.gamma,
            tokens_per_round=run.tokens / run.counts.rounds,
            tokens_per_second=1 / per_token,
            chosen=False,
            chosen_by_rate=schedule == self._by_rate,
        )

    def _plain_seconds(self) -> float:
        """Seconds of a token of plain decoding."""
        longest = max(self._recordings, key=lambda recording: len(recording.answer))
        short = Recording(longest.prompt, longest.answer[: _PLAIN_TOKENS + 1])
        return play(self._target, self._cache, None, short) / (len(short.answer) - 1)

    def _choose(self) -> str:
        """What the cost model picks, knowing the drafter from its study alone."""
        rows = tuple(range(1, _MOST + 2))
        times = tuple(self._seconds * self._rows_cost(n) for n in rows)
        overhead = max(self._plain - times[0], 0.0)
        target = TargetPlace("simulated", 1, StepCosts(rows, (_DEPTH,), (times,), overhead))
        firsts = tuple(self._known.first(k) for k in range(1, FIRSTS + 1))
        place = DrafterPlace(
            self._drafter.name,
            "cpu",
            1,
            self._cost.steps(_TYPICAL) / _TYPICAL,
            firsts[0],
            firsts=firsts,
            runs_ahead=True,
        )
        return choose_placement([target], [place], depth=_DEPTH).schedule

    def _gamma(self, schedule: str) -> int:
        """The draft length that is best by the formula, of those that fit into a verification."""
        alpha = self._known.first(1)
        lengths = range(1, _MOST + 1)
        fits = max((n for n in lengths if self._draft(n) <= MARGIN * self._r(n)), default=1)
        if schedule == "serial":
            return max(lengths, key=lambda g: self._serial(alpha, g, self._draft(g) / g, 0.0))
        if schedule == "optimistic":
            lengths = range(1, max(fits, 2))
            return max(lengths, key=lambda g: self._optimistic(alpha, g, self._draft(g) / g, 0.0))
        return max(fits, 2)

    def _run(self, schedule: str) -> Run:
        gamma = self._gamma(schedule)
        policy = CountingPolicy(gamma)
        overlap = SCHEDULES[schedule].overlap
        drafter = self._drafter
        if overlap is None:
            rounds = DraftRounds(self._cache, drafter, policy, MatchWalk(), trees=False)
            run = Run(schedule, gamma, policy.counts)
        else:
            rounds = AsyncRounds(self._cache, drafter, policy, MatchWalk(), overlap, length=gamma)
            run = Run(schedule, gamma, policy.counts, rounds.ahead)
        for recording in self._recordings:
            warm = self._warm(recording)
            run.seconds += play(self._target, self._cache, rounds, recording, warm)
            run.tokens += len(recording.answer) - 1
        run.drafting = rounds.tally.draft_seconds
        return run

    def _warm(self, recording: Recording) -> Callable[[], None]:
        """Reading the prompt is no part of decoding, for the drafter as for the target."""

        def warm() -> None:
            self._drafter.begin(recording.prompt + recording.answer[:1], None)
            self._drafter.next_tokens((), 1)

        return warm

    def _overhead(self, run: Run) -> float:
        """Time of a round that belongs to neither drafting nor verifying."""
        ahead = run.ahead
        waits = run.drafting if run.schedule == "serial" else ahead.behind + ahead.redrafts
        return (run.seconds - run.counts.verify - waits) / run.counts.rounds / self._plain

    def _formula(self, run: Run, c: float, s: float) -> float:
        if run.schedule == "serial":
            return self._serial(run.alpha, run.gamma, c, s)
        if run.schedule == "optimistic":
            return self._optimistic(run.alpha, run.gamma, c, s)
        first = run.alpha if run.schedule == "pearl" else run.ahead.hits / max(run.ahead.tries, 1)
        r = self._r(run.length)
        return formulas.duo(run.alpha, first, run.length, run.steps * c, r, s)

    def _serial(self, alpha: float, gamma: int, c: float, s: float) -> float:
        return formulas.serial_chain(alpha, gamma, c, self._r(gamma + 1), s)

    def _optimistic(self, alpha: float, gamma: int, c: float, s: float) -> float:
        return formulas.optimistic(alpha, gamma, c, self._r(gamma + 1), s)

    def _replayed(self, run: Run, c: float, s: float) -> float:
        """The formula's times on the recorded hits and misses."""
        gamma = run.length if run.schedule == "pearl" else run.gamma
        more = run.schedule in ("serial", "optimistic")
        period = max(run.steps * c, self._r(gamma + more)) + s
        tokens = seconds = 0.0
        for guesses in self._known.guesses:
            found = REPLAYS[run.schedule](guesses, gamma)
            seconds += found.rounds * period + found.redrafts * gamma * c
            tokens += len(guesses.ranks)
        return tokens / seconds

    def _draft(self, steps: float) -> float:
        """Expected time of so many draft steps of a round, before any schedule has run."""
        return self._cost.steps(steps) / self._plain

    def _r(self, rows: int) -> float:
        return self._seconds * self._rows_cost(rows) / self._plain


def simulated_table(rows: Sequence[SimulatedRow]) -> Table:
    """A table of the rows, which says that it is a simulation."""
    from rich.table import Table

    table = Table(
        title="SIMULATION: the drafter computes, the target waits instead of computing; in "
        "brackets how far the measured speed-up is from the formula",
        title_justify="left",
    )
    table.add_column("target ms", justify="right")
    table.add_column("schedule", no_wrap=True)
    names = "tok/s", "speed-up", "formula", "in true order", "alpha", "c", "s", "gamma"
    for name in (*names, "tok/round", "best", "auto picks"):
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(
            f"{row.t_target_ms:g}",
            row.schedule,
            f"{row.tokens_per_second:.1f}",
            f"{row.speedup:.2f}x",
            _beside(row.speedup, row.formula),
            _beside(row.speedup, row.replayed),
            f"{row.alpha:.2f}",
            f"{row.c:.3f}",
            f"{row.s:.3f}",
            str(row.gamma),
            f"{row.tokens_per_round:.2f}",
            "yes" if row.chosen else "",
            "yes" if row.chosen_by_rate else "",
        )
    return table


def _beside(speedup: float, expected: float) -> str:
    return f"{expected:.2f}x ({speedup / expected - 1:+.1%})"
