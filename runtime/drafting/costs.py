"""What a step of n rows costs: measured once, kept, and corrected by every round that runs."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from forerun.devices.remember import Remembered
from forerun.errors import BundleError, OptionError
from forerun.runtime.strict import decode

if TYPE_CHECKING:
    from pathlib import Path

    from forerun.runtime.manifest import Manifest

ROWS = (1, 2, 3, 4, 6, 8, 12, 16)
DEPTHS = (64, 512)
DEEP = (64, 512, 1900)
_REPEATS, _MOST_REPEATS = 3, 7
_ALIKE = 1.15
# A remembered table is taken for true if a step is timed within this factor of it, in this time.
_DRIFT, _CHECK_S = 1.6, 0.05
# Steps of very small models scatter by more than that, and it does not matter.
_ALIKE_S = 0.0004
_BUDGET_S = 2.0
_ROUND_S = 1e-4

Progress = Callable[[str, int, "int | None"], None]


class Measurable(Protocol):
    """What a target must have so that its steps can be timed; `Runner` is one."""

    manifest: Manifest
    arena: Any

    def step(self, ids: Any, *, want: Any = "last") -> np.ndarray:
        """Run rows; as `Runner.step`."""
        ...


@dataclass(frozen=True)
class StepCosts:
    """T(n): seconds of a target step of n rows behind a number of cached tokens.

    Attributes:
        rows: numbers of rows that were measured, increasing.
        depths: cached tokens at which they were, increasing.
        seconds: one line per depth, one entry per number of rows.
        overhead: seconds a round takes beside its step: choosing tokens, bookkeeping.

    Raises:
        OptionError: the table is empty, not increasing, of another shape, or a time is not
            positive.
    """

    rows: tuple[int, ...]
    depths: tuple[int, ...]
    seconds: tuple[tuple[float, ...], ...]
    overhead: float = _ROUND_S

    def __post_init__(self) -> None:
        shape = len(self.seconds) == len(self.depths) and all(
            len(line) == len(self.rows) for line in self.seconds
        )
        times = [t for line in self.seconds for t in line]
        rising = _rising(self.rows) and _rising(self.depths)
        if not (shape and times and rising and self.rows[0] == 1 and self.depths[0] >= 0):
            raise OptionError(
                "step costs need increasing rows from 1 on, increasing depths and a time for "
                f"each pair, got rows {self.rows} and depths {self.depths}"
            )
        if not all(math.isfinite(t) and t > 0 for t in (*times, self.overhead + 1e-12)):
            raise OptionError("step costs must be positive, finite seconds")

    def step(self, n: int, depth: int) -> float:
        """Seconds of a step of `n` rows behind `depth` tokens.

        Linear between what was measured, and beyond it as steep as at its end; never less than
        half the shallowest time.
        """
        column = [_line(self.rows, line, n) for line in self.seconds]
        return max(_line(self.depths, column, depth), 0.5 * column[0])

    def curve(self, depth: int, most: int) -> list[float]:
        """`step` of 0 to `most` rows; entry 0 is 0."""
        return [0.0, *(self.step(n, depth) for n in range(1, most + 1))]


class LiveCosts:
    """Step costs that follow what the rounds really take.

    Each observed round moves the estimate for its number of rows by a few percent of the error,
    and the others by less the further they are, so that one bad measurement heals and one hiccup
    of the machine does not count. No estimate leaves a third to three times the measured table.

    Args:
        table: as measured.
        most: largest number of rows.
    """

    _GAIN = 0.1
    _DEPTH_STEP = 64

    def __init__(self, table: StepCosts, most: int = 17) -> None:
        self.table = table
        self.most = most
        self._factors = [1.0] * (most + 1)
        self._bases: dict[int, list[float]] = {}
        self._curves: dict[int, list[float]] = {}
        # How far an error reaches: entry `most` + gap, for rows that are `gap` from those that ran.
        gaps = range(-most, most + 1)
        self._reach = [self._GAIN * max(0.25, 1 - abs(gap) / 4) for gap in gaps]

    def curve(self, depth: int) -> list[float]:
        """Seconds of a whole round of n rows, at index n; entry 0 is 0. Do not change it."""
        key = depth // self._DEPTH_STEP
        curve = self._curves.get(key)
        if curve is None:
            base = self._bases.get(key)
            if base is None:
                base = self.table.curve(key * self._DEPTH_STEP, self.most)
                self._bases[key] = base
            extra = self.table.overhead
            curve = [b * f + extra for b, f in zip(base, self._factors, strict=True)]
            curve[0] = 0.0
            self._curves[key] = curve
        return curve

    def step(self, n: int, depth: int) -> float:
        """Seconds of a whole round of `n` rows, 1 to `most`."""
        return self.curve(depth)[n]

    def observe(self, n: int, depth: int, seconds: float) -> None:
        """Correct the estimates by a step that took `seconds`; unusable times are left out."""
        if not 1 <= n <= self.most or not 0 < seconds < math.inf:
            return
        error = seconds / (self.curve(depth)[n] - self.table.overhead) - 1
        error = -0.5 if error < -0.5 else 0.5 if error > 0.5 else error
        reach = self._reach[self.most - n : 2 * self.most - n + 1]
        self._factors = [
            1 / 3 if moved < 1 / 3 else 3.0 if moved > 3 else moved
            for moved in [f * (1 + error * r) for f, r in zip(self._factors, reach, strict=True)]
        ]
        self._curves.clear()


def measure_costs(
    runner: Measurable,
    depths: tuple[int, ...] = DEPTHS,
    rows: tuple[int, ...] = ROWS,
    progress: Progress | None = None,
    budget: float = _BUDGET_S,
) -> StepCosts:
    """Time steps of each number of rows at each depth; the arena is empty again afterwards.

    The KV cache holds zeros meanwhile, which take as long to read as any text. Depths that do not
    fit are left out, and so are those for which `budget` leaves no time; the first is always done.
    Each step is timed three times by turns, up to seven times if the machine is otherwise busy.

    Args:
        runner: target with an empty KV cache.
        depths: cached tokens, increasing.
        rows: numbers of rows, increasing from 1 on.
        progress: called with ("measure", done, total).
        budget: seconds, of which each depth has its share; a pass that was begun is ended.

    Raises:
        OptionError: the KV cache is not empty, or too small for a single depth.
    """
    arena = runner.arena
    if arena.length:
        raise OptionError(f"step costs are measured on an empty KV cache; it holds {arena.length}")
    rows = tuple(n for n in rows if n < arena.capacity)
    fitting = [d for d in depths if d + rows[-1] <= arena.capacity]
    fitting = fitting or [max(arena.capacity - rows[-1], 0)]
    started, lines, total = time.perf_counter(), [], len(fitting) * _REPEATS
    try:
        for number, depth in enumerate(fitting):
            if number and time.perf_counter() - started > budget:
                break
            arena.pretend(depth)
            deadline = started + budget * (number + 1) / len(fitting)
            passes: list[list[float]] = []
            for times in _passes(runner, rows, depth, deadline):
                passes.append(times)
                if progress:
                    progress("measure", number * _REPEATS + min(len(passes), _REPEATS), total)
            lines.append(_not_falling([_typical(t) for t in zip(*passes, strict=True)]))
    finally:
        arena.rewind(0)
    if progress:
        progress("measure", total, total)
    overhead = _ROUND_S + _argmax_seconds(runner.manifest.model.vocab)
    return StepCosts(rows, tuple(fitting[: len(lines)]), tuple(lines), overhead)


def costs_key(manifest: Manifest, device: str, threads: int) -> str:
    """What measured costs belong to: files and KV cache, device, threads, ONNX Runtime."""
    import onnxruntime as ort

    files = "".join(f"{name}:{entry.sha256};" for name, entry in sorted(manifest.files.items()))
    form = manifest.lowerings.get("cpu")
    # Of several layouts of the cache the same files hold the graphs, and of several lengths too.
    files += f"{form.graph if form else ''};{manifest.kv.capacity}"
    digest = hashlib.sha256(files.encode()).hexdigest()[:24]
    return f"{manifest.name}/{digest}/{device}/{threads} threads/onnxruntime {ort.__version__}"


def remembered_costs(key: str, folder: Path | None = None) -> StepCosts | None:
    """Costs measured before on this machine; None if there are none, or the file is damaged."""
    try:
        return decode(StepCosts, Remembered("costs", folder).read(key), "costs")
    except (BundleError, OptionError, OverflowError):
        return None


def remember_costs(key: str, costs: StepCosts, folder: Path | None = None) -> None:
    """Keep costs for later runs."""
    Remembered("costs", folder).write(key, dataclasses.asdict(costs))


def reaches(costs: StepCosts, depths: tuple[int, ...], capacity: int) -> bool:
    """Whether costs are as deep as these depths would be measured.

    At the default depths any costs are: where the deeper ones are missing, there was no time.
    """
    wanted = [depth for depth in depths if depth + ROWS[-1] <= capacity]
    return depths == DEPTHS or not wanted or costs.depths[-1] >= wanted[-1]


def target_costs(
    runner: Measurable,
    device: str,
    threads: int | None = None,
    progress: Progress | None = None,
    depths: tuple[int, ...] = DEPTHS,
    fresh: bool = False,
) -> StepCosts:
    """Costs of a loaded target: remembered ones if they reach as deep, else measured now.

    Args:
        runner: target; its KV cache must be empty if it comes to measuring.
        device: where it runs.
        threads: of its session; None takes what the runner says.
        progress: as in `measure_costs`.
        depths: as in `measure_costs`.
        fresh: measure in any case.

    Raises:
        OptionError: as `measure_costs`.
    """
    key = costs_key(runner.manifest, device, threads or getattr(runner, "threads", 0))
    known = None if fresh else remembered_costs(key)
    # A slow device was measured with fewer rows, and is again.
    rows = known.rows if known else ROWS
    if known is not None and not runner.arena.length and not _still_true(runner, known):
        known = None
    if known is None or not reaches(known, depths, runner.arena.capacity):
        budget = _BUDGET_S if depths == DEPTHS else math.inf
        known = measure_costs(runner, depths, rows, progress=progress, budget=budget)
        remember_costs(key, known)
    return known


def _still_true(runner: Measurable, known: StepCosts) -> bool:
    """Whether single-row steps take about as long as remembered.

    A table that was measured while the machine was busy would mislead every later run.
    """
    depth, best = known.depths[0], math.inf
    try:
        runner.arena.pretend(depth)
        deadline = time.perf_counter() + _CHECK_S
        while best == math.inf or time.perf_counter() < deadline:
            best = min(best, _timed(runner, 1, depth))
    finally:
        runner.arena.rewind(0)
    table = known.step(1, depth)
    return abs(best - table) < _ALIKE_S or 1 / _DRIFT < best / table < _DRIFT


def _passes(
    runner: Measurable, rows: tuple[int, ...], depth: int, deadline: float
) -> Iterator[list[float]]:
    """Time each number of rows by turns, three times, and more if the times do not agree.

    Late passes are left out, but for the second: a single one could be disturbed.
    """
    passes: list[list[float]] = []
    while len(passes) < _MOST_REPEATS:
        passes.append([_timed(runner, n, depth) for n in rows])
        yield passes[-1]
        late = time.perf_counter() > deadline
        if len(passes) >= (2 if late else _REPEATS) and (late or _agree(passes)):
            return


def _timed(runner: Measurable, n: int, depth: int) -> float:
    runner.arena.rewind(depth)
    started = time.perf_counter()
    runner.step([0] * n, want="all")
    return time.perf_counter() - started


def _typical(times: Sequence[float]) -> float:
    """The second smallest of three or more, the smaller of two.

    That is the median of three, and of more still one without a disturbance.
    """
    return sorted(times)[1 if len(times) > 2 else 0]


def _agree(passes: list[list[float]]) -> bool:
    """Whether the two smallest times of every number of rows are alike."""
    pairs = [sorted(times)[:2] for times in zip(*passes, strict=True)]
    return all(pair[-1] <= _ALIKE * pair[0] for pair in pairs)


def _argmax_seconds(vocab: int) -> float:
    row = np.zeros(vocab, np.float32)
    started = time.perf_counter()
    for _ in range(4):
        row.argmax()
    return (time.perf_counter() - started) / 4


def _not_falling(times: list[float]) -> tuple[float, ...]:
    """The nearest sequence that never falls (pool adjacent violators): more rows cost no less."""
    pools: list[list[float]] = []
    for value in times:
        pools.append([value, 1.0])
        while len(pools) > 1 and pools[-2][0] > pools[-1][0]:
            (high, m), (low, n) = pools[-2], pools.pop()
            pools[-1] = [(high * m + low * n) / (m + n), m + n]
    return tuple(mean for mean, count in pools for _ in range(int(count)))


def _rising(numbers: tuple[int, ...]) -> bool:
    return bool(numbers) and all(a < b for a, b in itertools.pairwise(numbers))


def _line(at: tuple[int, ...], values: Any, x: float) -> float:
    """Piecewise linear; level before the first point, as steep as at the end after the last."""
    if len(at) == 1 or x <= at[0]:
        return values[0]
    right = next((i for i, edge in enumerate(at) if edge >= x), len(at) - 1)
    left = right - 1
    share = (x - at[left]) / (at[right] - at[left])
    return values[left] + share * (values[right] - values[left])
