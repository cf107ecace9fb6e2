"""Everything that is measured about a model on this machine, and what it says to run where."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
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
    reaches,
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
from forerun.runtime.drafting.folder import load_info
from forerun.runtime.drafting.placement import (
    DrafterPlace,
    Placement,
    TargetPlace,
    choose_placement,
)
from forerun.runtime.drafting.registry import DRAFTERS, DrafterContext

if TYPE_CHECKING:
    from pathlib import Path

    from forerun.devices.request import DeviceRequest
    from forerun.runtime.manifest import Manifest

_CPU = "cpu"
# Drafters that are made of others cost and accept what those do.
_SINGLE = ("ngram", "recycle", "head", "model")
_GRAPHS = ("head", "model")


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
) -> StepCosts:
    """Costs of a model's steps; it is opened only if they are not remembered.

    Raises:
        BundleError: the bundle has no form for the device.
        DeviceError: the device is not here, or cannot run the graph.
    """
    known = None if fresh else remembered_costs(costs_key(manifest, device, threads))
    if known is not None and reaches(known, depths, manifest.kv.capacity):
        return known
    from forerun.runtime.open import open_runner

    runner: Any = open_runner(manifest, folder, device=device, threads=threads)
    try:
        return target_costs(runner, device, threads, progress, depths, fresh)
    finally:
        runner.close()


def measured_drafters(
    context: DrafterContext, target_key: str, progress: Progress | None = None, fresh: bool = False
) -> list[DraftCosts]:
    """Costs of every single drafter that is here for a target, on the context's device.

    Drafters without a model are measured on the CPU only.
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
                costs = measure_drafter(drafter, context.target_manifest, context.device)
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
) -> Placement:
    """Choose where target and drafter run, from measurements.

    What is not remembered is measured, which takes a few seconds per device.

    Args:
        manifest: of the target.
        folder: of its bundle.
        request: which devices are allowed; None in it means any.
        drafter: name of the only drafter to consider, ``auto`` for all, ``none`` for none.
        threads: of the target on the CPU; None takes the default.
        progress: as in `measure_costs`.

    Raises:
        DeviceError: the target can run on none of the allowed devices.
        BundleError: the bundle has no form for the one device that was asked for.
    """
    count = threads or default_threads()
    drafters = list(_draft_places(manifest, folder, request, drafter, count, progress))
    splits = {count}
    if count > 1 and any(d.runs_ahead and d.device == _CPU for d in drafters):
        splits.add(count - 1)
    targets = list(_target_places(manifest, folder, request, sorted(splits), progress))
    kappa = measured_bandwidth().kappa if drafters else 0.0
    return choose_placement(targets, drafters, kappa, cores=usable_cores())


def acceptance_of(name: str, context: DrafterContext) -> Habit:
    """How well a drafter does: as measured in its training, else as drafters of its kind do."""
    row = DRAFTERS[name]
    folder = context.find(row.needs[0]) if row.needs else None
    habit = HABITS[name]
    if folder is not None and (folder / "drafter.json").is_file():
        rate = load_info(folder).training.get("acceptance_1", habit.acceptance)
        return Habit(rate if 0 <= rate <= 1 else habit.acceptance, habit.hits)
    return habit


def _target_places(
    manifest: Manifest,
    folder: Path,
    request: DeviceRequest,
    splits: list[int],
    progress: Progress | None,
) -> Iterator[TargetPlace]:
    for device in _allowed(request.target, manifest):
        for threads in splits if device == _CPU else splits[-1:]:
            try:
                costs = measured_target(manifest, folder, device, threads, progress)
            except DeviceError:
                if request.target is not None:
                    raise
                continue
            yield TargetPlace(device, threads, costs)


def _draft_places(
    manifest: Manifest,
    folder: Path,
    request: DeviceRequest,
    drafter: str,
    threads: int,
    progress: Progress | None,
) -> Iterator[DrafterPlace]:
    if drafter == "none":
        return
    wanted = _SINGLE if drafter == "auto" else tuple(drafter.split("+"))
    for device in _allowed(request.draft, manifest):
        context = DrafterContext(manifest, folder, threads=1, device=device)
        try:
            measured = measured_drafters(context, costs_key(manifest, _CPU, threads), progress)
        except (DeviceError, BundleError):
            if request.draft is not None:
                raise
            continue
        for costs in measured:
            if costs.name in wanted:
                yield _draft_place(costs, acceptance_of(costs.name, context))


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


def _is_rate(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value < math.inf
