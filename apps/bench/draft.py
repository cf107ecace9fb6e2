"""`forerun bench draft`: every drafter against plain decoding, on the same prompts by turns."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from forerun.apps.bench import machine
from forerun.apps.bench.draft_prompts import load_prompts
from forerun.apps.bench.draft_report import print_report
from forerun.apps.bench.draft_rows import make_overall, make_rows, pairs_of
from forerun.apps.bench.draft_ties import Comparison, compare
from forerun.apps.bench.draft_turns import PLAIN, Plan, measure, settings_for
from forerun.apps.cli.interrupt import cancel_on_interrupt
from forerun.errors import ContextLimitError, ForerunError, OptionError, UserError
from forerun.runtime.types import SamplingParams

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from forerun.apps.bench.draft_engine import TextEngine
    from forerun.apps.bench.draft_rows import Pair
    from forerun.apps.bench.draft_turns import Sample
    from forerun.runtime.manifest import Manifest

_BUSY_LOAD = 0.5
# Replayed in their true order, hits and misses leave a few percent to the clock and to the threads.
_UNDISTURBED = 0.1
_SIMULATED_DRAFTER = "model"


@dataclass(frozen=True)
class Options:
    """What is measured, and how.

    Attributes:
        model: name of a pulled model, or a bundle.
        drafters: names from the registry; none given means all that can be opened.
        categories: kinds of prompts; none given means all.
        limit: most prompts of each category.
        max_tokens: most tokens of an answer.
        temperatures: 0 is greedy.
        seeds: how many, at each temperature above 0.
        repeat: repetitions of everything.
        threads: of the computation.
        peers: measure the peers' speculation too.
        simulate: run the schedules against a simulated accelerator too.

    Raises:
        OptionError: a number is out of range, there is no temperature, or a simulation is asked
            for without the greedy answers that it replays.
    """

    model: str = "smollm2-135m"
    drafters: tuple[str, ...] = ()
    categories: tuple[str, ...] = ()
    limit: int | None = None
    max_tokens: int = 128
    temperatures: tuple[float, ...] = (0.0, 0.8)
    seeds: int = 1
    repeat: int = 3
    threads: int = 2
    peers: bool = False
    simulate: bool = False

    def __post_init__(self) -> None:
        for name, lowest in {"max_tokens": 2, "seeds": 1, "repeat": 1, "threads": 1}.items():
            if getattr(self, name) < lowest:
                raise OptionError(f"{name} is {getattr(self, name)}; it must be at least {lowest}")
        if not self.temperatures or not all(0 <= value <= 100 for value in self.temperatures):
            raise OptionError(
                f"temperatures are {list(self.temperatures)}; give at least one, from 0 to 100"
            )
        if self.simulate and 0 not in self.temperatures:
            raise OptionError(
                "--simulate replays greedy answers; add 0 to --temperatures, e.g. 0,0.8"
            )


def run(
    options: Options,
    json_path: Path | None = None,
    plot_path: Path | None = None,
    progress: Callable[[str, int, int | None], None] = lambda stage, done, total: None,
) -> dict[str, Any]:
    """Measure, print tables to stdout, and return what was measured.

    Ctrl-C ends the measurement; what is complete by then is reported, and `complete` is False.

    Args:
        options: what to measure.
        json_path: file that takes the returned object.
        plot_path: SVG file that takes a bar chart.
        progress: told how many answers are made.

    Raises:
        UserError: an option is wrong, the bundle is not there or damaged, or a drafter that was
            asked for cannot be used with it.
    """
    prompts = load_prompts(options.categories, options.limit)
    about = machine.describe()
    started = time.monotonic()
    engine = _open(options)
    try:
        with cancel_on_interrupt(engine.cancel) as interrupt:
            result = _measured(engine, options, prompts, progress, lambda: interrupt.fired)
    finally:
        engine.close()
    busy = about["load_before"]
    if busy is not None and busy > _BUSY_LOAD:
        result["warnings"].append(f"the machine was busy before the start (load {busy})")
    result = {"machine": about, **result, "seconds": round(time.monotonic() - started, 1)}
    if json_path is not None:
        json_path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if plot_path is not None:
        from forerun.apps.bench.draft_plot import write_plot

        write_plot(result, plot_path)
    print_report(result)
    return result


def _open(options: Options) -> TextEngine:
    from forerun.apps.bench.draft_engine import TextEngine
    from forerun.runtime.load import load

    return TextEngine(lambda: load(options.model, threads=options.threads))


def _measured(
    engine: TextEngine,
    options: Options,
    prompts: list[Any],
    progress: Callable[[str, int, int | None], None],
    stopped: Callable[[], bool],
) -> dict[str, Any]:
    _check_room(engine, prompts, options.max_tokens)
    drafters, left_out = _usable(engine, options.drafters)
    settings = settings_for(options.temperatures, options.seeds)
    plan = Plan(tuple(prompts), drafters, settings, options.repeat, options.max_tokens)
    samples = measure(engine, plan, progress, stopped)
    pairs = pairs_of(samples)
    comparisons = _compared(engine, pairs)
    result: dict[str, Any] = {
        "model": engine.model,
        "weights": engine.weights,
        "row_exact": engine.row_exact,
        "threads": options.threads,
        "prompts": len(prompts),
        "max_tokens": options.max_tokens,
        "repeat": options.repeat,
        "seeds": options.seeds,
        "rows": make_rows(pairs, comparisons),
        "overall": make_overall(pairs, comparisons),
        "simulated": [],
        "peers": None,
        "left_out": left_out,
        "warnings": [],
    }
    if options.simulate and not stopped():
        _add_simulation(result, engine, options, samples)
    if options.peers and not stopped():
        _add_peers(result, engine, options, prompts, progress, stopped)
    return {**result, "complete": not stopped()}


def _check_room(engine: TextEngine, prompts: Sequence[Any], max_tokens: int) -> None:
    longest = max(len(engine.ids(prompt.text)) for prompt in prompts)
    if longest + max_tokens > engine.capacity:
        raise ContextLimitError(
            f"the longest prompt has {longest} tokens and answers up to {max_tokens}, the context "
            f"holds {engine.capacity}; give a smaller --max-tokens"
        )


def _usable(engine: TextEngine, wanted: Sequence[str]) -> tuple[tuple[str, ...], dict[str, str]]:
    """Drafters that this model can be run with, and why the others cannot.

    Raises:
        UserError: one that was asked for cannot.
    """
    if PLAIN in wanted:
        raise OptionError(f"plain decoding ({PLAIN}) is always measured; name other drafters")
    usable, left_out = [], {}
    for name in dict.fromkeys(wanted) or [name for name in _known_drafters() if name != PLAIN]:
        try:
            engine.answer(name, engine.ids("Hello"), SamplingParams(), 1)
            usable.append(name)
        except UserError as error:
            if wanted:
                raise
            left_out[name] = str(error)
    return tuple(usable), left_out


def _known_drafters() -> list[str]:
    from forerun.runtime.drafting.registry import DRAFTERS

    return list(DRAFTERS)


def _compared(engine: TextEngine, pairs: Sequence[Pair]) -> dict[tuple[object, ...], Comparison]:
    """`Pair.key` to how the drafted text compares with the plain one."""
    found = {}
    for pair in pairs:
        sample = pair.drafted
        params = SamplingParams(temperature=sample.temperature, seed=sample.seed)
        prompt = engine.ids(sample.prompt.text)
        found[pair.key] = compare(engine, prompt, params, pair.plain.answer, sample.answer)
    return found


def _add_simulation(
    result: dict[str, Any], engine: TextEngine, options: Options, samples: Sequence[Sample]
) -> None:
    """Time the schedules against a target that replays the plain greedy answers."""
    plain = [s for s in samples if s.drafter == PLAIN and s.temperature == 0 and s.repeat == 0]
    answers = [(engine.ids(sample.prompt.text), sample.answer.tokens) for sample in plain]
    try:
        result["simulated"] = simulated(engine.manifest, options, answers)
    except UserError as error:
        result["left_out"]["simulation"] = str(error)
        return
    off = max(abs(row["speedup"] / row["replayed"] - 1) for row in result["simulated"])
    if off > _UNDISTURBED:
        result["warnings"].append(
            f"the simulation is up to {off:.0%} off its own times in true order, so something else "
            "ran meanwhile; measure again on an idle machine"
        )


def simulated(
    manifest: Manifest, options: Options, answers: Sequence[tuple[Sequence[int], Sequence[int]]]
) -> list[dict[str, Any]]:
    """Rows of `simulate.SimulatedRow`, with the draft model as the drafter.

    Args:
        manifest: of the model that gave the answers.
        options: of the benchmark; the model counts here.
        answers: prompts and what plain greedy decoding made of them, as ids.

    Raises:
        UserError: there is no draft model here, or no answer is long enough.
    """
    from forerun.apps.bench.replay import Recording
    from forerun.apps.bench.simulate import simulate
    from forerun.devices.home import find_bundle
    from forerun.runtime.drafting.registry import DrafterContext, open_drafter

    folder = find_bundle(options.model)
    # One core drafts; the other is left to the clock of the simulated device.
    drafter = open_drafter(_SIMULATED_DRAFTER, DrafterContext(manifest, folder, threads=1))
    recordings = [Recording(tuple(prompt), tuple(answer)) for prompt, answer in answers]
    try:
        rows = simulate(manifest, recordings, drafter, progress=say)
        return [
            {k: round(v, 4) if isinstance(v, float) else v for k, v in asdict(row).items()}
            for row in rows
        ]
    finally:
        drafter.close()


def _add_peers(
    result: dict[str, Any],
    engine: TextEngine,
    options: Options,
    prompts: Sequence[Any],
    progress: Callable[[str, int, int | None], None],
    stopped: Callable[[], bool],
) -> None:
    from forerun.apps.bench.draft_peers import Task, measure_peers

    drafter = result["overall"]["drafter"]
    tasks = [Task(prompt.category, tuple(engine.ids(prompt.text))) for prompt in prompts]
    try:
        found = measure_peers(drafter, tasks, sorted(engine.eos), options, progress, stopped, say)
    except ForerunError as error:
        result["left_out"]["peers"] = str(error)
        return
    result["left_out"] |= found.pop("left_out")
    result["warnings"] += found.pop("warnings")
    result["peers"] = found


def say(text: str) -> None:
    """Print one line for the person at the terminal, on stderr."""
    print(text, file=sys.stderr, flush=True)
