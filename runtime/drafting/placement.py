"""Which device runs what, and who waits for whom: chosen from measured costs, with the reason."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from forerun.devices.threads import usable_cores
from forerun.errors import DeviceError, UnsupportedError
from forerun.runtime.drafting import formulas
from forerun.runtime.drafting.costs import StepCosts

PLAIN = "plain"
# Drafted tokens of a round, at most.
MOST_TOKENS = 16
_MOST_BRANCHES = 4
_MARGIN = 1.03
_DEPTH = 512


@dataclass(frozen=True)
class TargetPlace:
    """The target on one device.

    Attributes:
        device: its name.
        threads: of its session.
        costs: of its steps there.
    """

    device: str
    threads: int
    costs: StepCosts


@dataclass(frozen=True)
class DrafterPlace:
    """A drafter on one device.

    Attributes:
        name: of the drafter.
        device: where it runs.
        threads: of its session; 0 without one.
        step_seconds: time of one draft step; of the whole proposal if `one_call`.
        acceptance: chance that a drafted token is right given those before it.
        hits: share of the rounds in which it proposes something.
        firsts: chance that the target's token is among its best 1, 2, ... first tokens; empty if
            that is unknown.
        one_call: whether a proposal takes one call however long it is.
        runs_ahead: whether it can draft behind its own unverified tokens, which overlapping needs.
    """

    name: str
    device: str
    threads: int
    step_seconds: float
    acceptance: float
    hits: float = 1.0
    firsts: tuple[float, ...] = ()
    one_call: bool = False
    runs_ahead: bool = False

    def first(self, branches: int) -> float:
        """Chance that one of so many first tokens is right."""
        if not self.firsts:
            return self.acceptance
        return self.firsts[min(branches, len(self.firsts)) - 1]


@dataclass(frozen=True)
class Placement:
    """A choice and its reason.

    Attributes:
        target: device of the target.
        drafter: name of the drafter, ``none`` for plain decoding.
        draft: device of the drafter, None without one.
        schedule: ``plain``, ``serial``, ``pearl``, ``duo`` or ``optimistic``.
        threads: of the target's session.
        draft_threads: of the drafter's session, 0 without one.
        tokens: drafted tokens of a round that the estimate is made for.
        seconds_per_token: expected time of a token.
        speedup: over plain decoding on the same target device.
        reason: two lines for the person at the terminal.
    """

    target: str
    drafter: str
    draft: str | None
    schedule: str
    threads: int
    draft_threads: int
    tokens: int
    seconds_per_token: float
    speedup: float
    reason: str = ""

    @property
    def overlaps(self) -> bool:
        """Whether drafter and target run at the same time."""
        return self.schedule not in (PLAIN, "serial")


@dataclass(frozen=True)
class _Case:
    """One target with one drafter, times in plain steps."""

    target: TargetPlace
    drafter: DrafterPlace
    depth: int
    kappa: float

    @property
    def plain(self) -> float:
        return self.target.costs.step(1, self.depth) + self.target.costs.overhead

    def r(self, gamma: int) -> float:
        return self.target.costs.step(gamma + 1, self.depth) / self.plain

    @property
    def c(self) -> float:
        return self.drafter.step_seconds / self.plain

    @property
    def s(self) -> float:
        return self.target.costs.overhead / self.plain


def _serial(case: _Case, gamma: int) -> float:
    d = case.drafter
    c = case.c / gamma if d.one_call else case.c
    # The overhead is a plain step's too, so it belongs to the verifying step, not to the round.
    return formulas.with_misses(d.hits, d.acceptance, gamma, case.r(gamma) + case.s, c)


def _pearl(case: _Case, gamma: int) -> float:
    r = formulas.shared_memory(case.r(gamma), case.kappa)
    c = formulas.shared_memory(case.c, case.kappa)
    return formulas.pearl(case.drafter.acceptance, gamma, c, r, case.s)


def _duo(case: _Case, gamma: int) -> float:
    d = case.drafter
    # With one branch it is PEARL, and what more of them add is not known without their chances.
    best = 0.0 if d.firsts else _pearl(case, gamma)
    for branches in range(2, min(len(d.firsts), _MOST_BRANCHES, gamma // 2) + 1):
        length = gamma // branches
        r = formulas.shared_memory(case.r(length), case.kappa)
        draft = formulas.shared_memory(length * branches * case.c, case.kappa)
        speed = formulas.duo(d.acceptance, d.first(branches), length, draft, r, case.s)
        best = max(best, speed)
    return best


def _optimistic(case: _Case, gamma: int) -> float:
    r = formulas.shared_memory(case.r(gamma), case.kappa)
    c = formulas.shared_memory(case.c, case.kappa)
    return formulas.optimistic(case.drafter.acceptance, gamma, c, r, case.s)


ESTIMATES: dict[str, Callable[[_Case, int], float]] = {
    "serial": _serial,
    "pearl": _pearl,
    "duo": _duo,
    "optimistic": _optimistic,
}


def choose_placement(
    targets: Sequence[TargetPlace],
    drafters: Sequence[DrafterPlace],
    kappa: float = 0.0,
    depth: int = _DEPTH,
    cores: int | None = None,
    *,
    is_chosen: bool = False,
    schedule: str | None = None,
    drafted_on: str | None = None,
) -> Placement:
    """The fastest way to run, by the formulas for the expected time of a token.

    Args:
        targets: where the target can run.
        drafters: where each drafter can run, drafters without a model too.
        kappa: share by which target and drafter slow each other down if both run on the CPU at
            the same time; other pairs of devices do not.
        depth: cached tokens to choose for.
        cores: for both on the CPU at the same time, which need threads of their own; None takes
            those of this process.
        is_chosen: one of these drafters will be used even if plain decoding is faster.
        schedule: the only one to consider; None for all.
        drafted_on: the only device of the target on which to draft; None for all.

    Raises:
        DeviceError: there is no device for the target.
        UnsupportedError: none of the drafters can follow the schedule that was asked for here.
    """
    cores = usable_cores() if cores is None else cores
    if not targets:
        raise DeviceError("no device here can run this model; `forerun devices` lists what is here")
    found = [p for target in targets for p in _options(target, drafters, kappa, depth, cores)]
    found = [p for p in found if p.draft is None or drafted_on in (None, p.target)]
    if schedule is not None:
        found = _following(schedule, found, drafters)
    allowed = [p for p in found if p.draft is not None] if is_chosen else found
    best = min(allowed or found, key=lambda p: p.seconds_per_token)
    # What is simpler wins unless the other is clearly faster: plain, then serial.
    for simpler in (PLAIN, "serial"):
        rivals = [p for p in allowed if p.schedule == simpler]
        rival = min(rivals, key=lambda p: p.seconds_per_token, default=best)
        if rival.seconds_per_token <= _MARGIN * best.seconds_per_token:
            best = rival
            break
    return _explained(best, found)


def _following(
    schedule: str, found: Sequence[Placement], drafters: Sequence[DrafterPlace]
) -> list[Placement]:
    """What follows a schedule that was asked for, and plain decoding."""
    followed = [p for p in found if p.schedule in (PLAIN, schedule)]
    if drafters and not any(p.schedule == schedule for p in followed):
        raise UnsupportedError(
            f"the schedule {schedule} needs a draft model and a device or core of its own for it; "
            "take serial, or name such a drafter and a device for it"
        )
    return followed


def _options(
    target: TargetPlace, drafters: Sequence[DrafterPlace], kappa: float, depth: int, cores: int
) -> Iterator[Placement]:
    plain = target.costs.step(1, depth) + target.costs.overhead
    yield Placement(target.device, "none", None, PLAIN, target.threads, 0, 0, plain, 1.0)
    for drafter in drafters:
        shared = target.device == drafter.device == "cpu"
        case = _Case(target, drafter, depth, kappa if shared else 0.0)
        for schedule, estimate in ESTIMATES.items():
            if schedule != "serial" and not _may_overlap(target, drafter, cores):
                continue
            speed, tokens = max((estimate(case, n), n) for n in range(1, MOST_TOKENS + 1))
            if speed > 0:
                yield Placement(
                    target.device,
                    drafter.name,
                    drafter.device,
                    schedule,
                    target.threads,
                    drafter.threads,
                    tokens,
                    plain / speed,
                    speed,
                )


def _may_overlap(target: TargetPlace, drafter: DrafterPlace, cores: int) -> bool:
    """One device can run both at once only if it is the CPU, with cores for both."""
    if not drafter.runs_ahead:
        return False
    if target.device != drafter.device:
        return True
    return target.device == "cpu" and target.threads + drafter.threads <= cores


def _explained(best: Placement, found: Sequence[Placement]) -> Placement:
    rate = 1 / best.seconds_per_token
    plain = min(p.seconds_per_token for p in found if p.schedule == PLAIN)
    threads = f"{best.threads} thread{'s' if best.threads > 1 else ''}"
    where = f"target on {best.target} ({threads})"
    if best.draft is None:
        first = f"{where}, no drafter: {rate:.1f} tokens/s"
    else:
        first = (
            f"{where}, drafter {best.drafter} on {best.draft}, {best.schedule}, "
            f"about {best.tokens} tokens a round: {rate:.1f} tokens/s expected, "
            f"{plain / best.seconds_per_token:.2f} times plain decoding"
        )
    others = [p for p in found if _kind(p) != _kind(best)]
    if not others:
        return dataclasses.replace(best, reason=f"{first}\nnothing else can run here")
    rival = min(others, key=lambda p: p.seconds_per_token)
    is_faster = rival.seconds_per_token * _MARGIN < best.seconds_per_token
    word = "faster would be" if is_faster else "next best"
    second = f"{word}: {_told(rival)} at {1 / rival.seconds_per_token:.1f} tokens/s"
    return dataclasses.replace(best, reason=f"{first}\n{second}")


def _kind(placement: Placement) -> tuple[str, str, str | None, str]:
    return placement.target, placement.drafter, placement.draft, placement.schedule


def _told(placement: Placement) -> str:
    if placement.draft is None:
        return f"plain decoding on {placement.target}"
    return (
        f"{placement.drafter} on {placement.draft} with the target on {placement.target}, "
        f"{placement.schedule}"
    )
