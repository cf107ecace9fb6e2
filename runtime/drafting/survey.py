"""Everything that is measured about a model on this machine, and what it says to run where."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from forerun.devices.bandwidth import contention, read_bandwidth
from forerun.devices.providers import find_provider
from forerun.devices.remember import Remembered
from forerun.devices.threads import default_threads, usable_cores
from forerun.errors import BundleError, DeviceError
from forerun.runtime.drafting.costs import (
    DEPTHS,
    Progress,
    StepCosts,
    costs_key,
    measure_costs,
    remember_costs,
    remembered_costs,
    target_costs,
)
from forerun.runtime.drafting.draft_costs import (
    DraftCosts,
    draft_costs_key,
    measure_drafter,
    remember_draft_costs,
    remembered_draft_costs,
)
from forerun.runtime.drafting.folder import folder_kind, load_info
from forerun.runtime.drafting.placement import (
    MOST_TOKENS,
    DrafterPlace,
    Placement,
    TargetPlace,
    choose_placement,
)
from forerun.runtime.drafting.registry import DRAFTERS, DrafterContext

if TYPE_CHECKING:
    from forerun.devices.request import DeviceRequest
    from forerun.runtime.manifest import Manifest

_CPU = "cpu"
# Drafters that are made of others cost and accept what those do.
_SINGLE = ("ngram", "recycle", "head", "model")
_GRAPHS = ("head", "model")
# Of the drafters, these run on other devices than the CPU too.
_ANYWHERE = ("model", "model+ngram")
# A device other than the CPU whose step takes longer than this is left out.
_SLOW_S = 1.0
# From here on it is measured with fewer rows: a driver in software compiles each for seconds.
_SLOWISH_S, _FEW_ROWS = 0.1, (1, 2, 4, 8)


class TooSlowError(DeviceError):
    """A step takes so long on a device that there is no point in measuring more."""

    def __init__(self, device: str, seconds: float) -> None:
        super().__init__(f"{device} is out, a step takes {seconds:.2g} s")


@dataclass(frozen=True)
class Habit:
    """How well a drafter does on mixed text, until a generation has shown it.

    Attributes:
        acceptance: chance that a drafted token is right given those before it.
        hits: share of the rounds in which it has something to say that is worth verifying.
    """

    acceptance: float
    hits: float = 1.0


HABITS: dict[str, Habit] = {
    "ngram": Habit(0.7, 0.25),
    "recycle": Habit(0.35),
    "head": Habit(0.6),
    "model": Habit(0.6),
}


@dataclass(frozen=True)
class Bandwidth:
    """Bytes per second that this machine reads.

    Attributes:
        alone: by one thread.
        together: by all of them.
        threads: how many.
    """

    alone: float
    together: float
    threads: int

    @property
    def kappa(self) -> float:
        """Share by which two models on the CPU slow each other down, as far as memory goes."""
        return contention(self.alone, self.together, self.threads)


def measured_bandwidth(fresh: bool = False) -> Bandwidth:
    """Read bandwidth of this machine, remembered from run to run."""
    threads, store = default_threads(), Remembered("bandwidth")
    known = None if fresh else store.read(str(threads))
    if isinstance(known, list) and len(known) == 2 and all(_is_rate(rate) for rate in known):
        return Bandwidth(known[0], known[1], threads)
    rates = [read_bandwidth(1), read_bandwidth(threads)]
    store.write(str(threads), rates)
    return Bandwidth(rates[0], rates[1], threads)


def measured_target(
    manifest: Manifest,
    folder: Path,
    device: str,
    threads: int,
    progress: Progress | None = None,
    depths: tuple[int, ...] = DEPTHS,
    fresh: bool = False,
    limit: float = math.inf,
) -> StepCosts:
    """Costs of a model's steps: remembered ones that are still true, else measured now.

    With a `limit` one step is timed before anything else is measured. What it took is remembered
    too if it was too long.

    Raises:
        TooSlowError: a step of one row takes longer than `limit` seconds.
        BundleError: the bundle has no form for the device.
        DeviceError: the device is not here, or cannot run the graph.
    """
    key, slow = costs_key(manifest, device, threads), Remembered("slow")
    known = None if fresh else remembered_costs(key)
    seconds: Any = None if fresh or known else slow.read(key)
    if _is_rate(seconds) and seconds > limit:
        raise TooSlowError(device, seconds)
    from forerun.runtime.open import open_runner

    runner: Any = open_runner(manifest, folder, device=device, threads=threads)
    try:
        if known is None and limit < math.inf:
            seconds = _step_seconds(runner)
            if seconds > limit:
                slow.write(key, seconds)
                raise TooSlowError(device, seconds)
            if seconds > _SLOWISH_S:
                known = measure_costs(runner, depths[:1], _FEW_ROWS, progress)
                remember_costs(key, known)
                return known
        return target_costs(runner, device, threads, progress, depths, fresh)
    finally:
        runner.close()


def measured_drafters(
    context: DrafterContext,
    target_key: str,
    progress: Progress | None = None,
    fresh: bool = False,
    limit: float = math.inf,
) -> list[DraftCosts]:
    """Costs of every single drafter that is here for a target, on the context's device.

    Drafters without a model are measured on the CPU only.

    Raises:
        DeviceError: one needs longer than `limit` seconds for a token.
    """
    found: list[DraftCosts] = []
    names = [name for name in _SINGLE if _fits(name, context)]
    for number, name in enumerate(names):
        row = DRAFTERS[name]
        folder = context.find(row.needs[0]) if row.needs else None
        key = draft_costs_key(f"{target_key}/{context.device}/{context.threads}", name, folder)
        costs = None if fresh else remembered_draft_costs(key)
        if costs is None:
            drafter = row.make(context)
            try:
                costs = measure_drafter(drafter, context.target_manifest, context.device, limit)
            finally:
                drafter.close()
            remember_draft_costs(key, costs)
            if progress:
                progress("drafters", number + 1, len(names))
        found.append(costs)
    return found


def place(
    manifest: Manifest,
    folder: Path,
    request: DeviceRequest,
    drafter: str = "auto",
    threads: int | None = None,
    progress: Progress | None = None,
    *,
    is_chosen: bool = False,
    schedule: str | None = None,
    drafted_on: str | None = None,
    whole: Manifest | None = None,
) -> Placement:
    """Choose where target and drafter run, from measurements.

    What is not remembered is measured, which takes a few seconds per device. Devices on which a
    step takes so long that they cannot win are left out at once, which the reason tells.

    Args:
        manifest: of the target.
        folder: of its bundle.
        request: which devices are allowed; None in it means any.
        drafter: name or folder of the only drafter to consider, ``auto`` for all, ``none`` for
            none.
        threads: of the target on the CPU; None takes what was measured to be best, and on the CPU
            perhaps one less, so that a drafter has one of its own.
        progress: as in `measure_costs`.
        is_chosen: the drafter will be used whatever is measured, and ``auto`` is the one of that
            name.
        schedule: the only one to consider; None for all.
        drafted_on: the only device of the target on which to draft; None for all.
        whole: manifest with all layouts of the KV cache, if `manifest` has one of them alone.

    Raises:
        DeviceError: the target can run on none of the allowed devices.
        UnsupportedError: nothing here can follow the schedule.
        BundleError: the bundle has no form for the one device that was asked for.
    """
    count = threads or _usual_threads(manifest, whole)
    out: dict[str, str] = {}
    targets = list(_target_places(manifest, folder, request, count, progress, out))
    found = _draft_places(manifest, folder, request, drafter, count, progress, out, is_chosen)
    drafters = list(found)
    on_cpu = any(t.device == _CPU for t in targets)
    shared = on_cpu and any(d.runs_ahead and d.device == _CPU for d in drafters)
    if threads is None and count > 1 and shared:
        fewer = measured_target(manifest, folder, _CPU, count - 1, progress)
        targets.append(TargetPlace(_CPU, count - 1, fewer))
    chosen = choose_placement(
        targets,
        drafters,
        measured_bandwidth().kappa if drafters else 0.0,
        cores=usable_cores(),
        is_chosen=is_chosen,
        schedule=schedule,
        drafted_on=drafted_on,
    )
    return dataclasses.replace(chosen, reason="; ".join([chosen.reason, *out.values()]))


def acceptance_of(name: str, context: DrafterContext) -> Habit:
    """How well a drafter does: as measured in its training, else as drafters of its kind do."""
    row = DRAFTERS[name]
    folder = context.find(row.needs[0]) if row.needs else None
    habit = HABITS[name]
    if folder is not None and (folder / "drafter.json").is_file():
        rate = load_info(folder).training.get("acceptance_1", habit.acceptance)
        return Habit(rate if 0 <= rate <= 1 else habit.acceptance, habit.hits)
    return habit


def _usual_threads(manifest: Manifest, whole: Manifest | None) -> int:
    """Threads that were measured to be best for a layout, else for the bundle's default."""
    from forerun.runtime.probe import best_threads

    found = best_threads(manifest) or (best_threads(whole) if whole else None)
    return found or default_threads()


def _target_places(
    manifest: Manifest,
    folder: Path,
    request: DeviceRequest,
    threads: int,
    progress: Progress | None,
    out: dict[str, str],
) -> Iterator[TargetPlace]:
    """The target where it can run; devices that cannot win are noted in `out`."""
    limit = _SLOW_S
    for device in _allowed(request.target, manifest):
        bound = math.inf if device == _CPU or request.target is not None else limit
        try:
            costs = measured_target(manifest, folder, device, threads, progress, limit=bound)
        except TooSlowError as error:
            out[device] = str(error)
            continue
        except DeviceError:
            if request.target is not None:
                raise
            out[device] = f"{device} is out, it cannot run the model"
            continue
        # A round gives so many tokens at most: nobody is faster by more than that.
        limit = min(limit, (MOST_TOKENS + 1) * costs.seconds[0][0])
        yield TargetPlace(device, threads, costs)


def _draft_places(
    manifest: Manifest,
    folder: Path,
    request: DeviceRequest,
    drafter: str,
    threads: int,
    progress: Progress | None,
    out: dict[str, str],
    is_chosen: bool,
) -> Iterator[DrafterPlace]:
    if drafter == "none":
        return
    own = None if drafter in DRAFTERS else Path(drafter).expanduser()
    kind = folder_kind(own) if own else None
    wanted = _SINGLE if drafter == "auto" else (kind,) if kind else tuple(drafter.split("+"))
    anywhere = kind == "model" or drafter in _ANYWHERE or not is_chosen
    for device in _allowed(request.draft, manifest):
        if (device in out and request.draft is None) or not (device == _CPU or anywhere):
            continue
        context = DrafterContext(manifest, folder, own, threads=1, device=device)
        limit = math.inf if device == _CPU or request.draft is not None else _SLOW_S
        key = costs_key(manifest, _CPU, threads)
        try:
            measured = measured_drafters(context, key, progress, limit=limit)
        except (DeviceError, BundleError):
            if request.draft is not None:
                raise
            continue
        for costs in measured:
            if costs.name in wanted:
                place = _draft_place(costs, acceptance_of(costs.name, context))
                is_part = is_chosen and own is None and costs.name != drafter
                # What is made of several takes turns with the target, and bears its own name.
                yield _part_of(drafter, place) if is_part else place


def _part_of(name: str, place: DrafterPlace) -> DrafterPlace:
    return dataclasses.replace(place, name=name, runs_ahead=False)


def _draft_place(costs: DraftCosts, habit: Habit) -> DrafterPlace:
    has_graph = costs.name in _GRAPHS
    return DrafterPlace(
        costs.name,
        costs.device,
        1 if has_graph else 0,
        costs.step_seconds if has_graph else costs.seconds(4),
        habit.acceptance,
        habit.hits,
        one_call=not has_graph,
        runs_ahead=costs.runs_ahead and has_graph,
    )


def _fits(name: str, context: DrafterContext) -> bool:
    if any(context.obstacle(kind) is not None for kind in DRAFTERS[name].needs):
        return False
    return context.device == _CPU or name == "model"


def _allowed(device: str | None, manifest: Manifest) -> list[str]:
    """One device, or all that are here and that the model has a form for."""
    if device is not None:
        return [find_provider(device).name]
    from forerun.runtime.open import devices_for

    return devices_for(manifest)


def _step_seconds(runner: Any) -> float:
    """Seconds of a step of one row, behind one that warms up."""
    seconds = 0.0
    for _ in range(2):
        started = time.perf_counter()
        runner.step([0])
        seconds = time.perf_counter() - started
    runner.arena.rewind(0)
    return seconds


def _is_rate(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value < math.inf
