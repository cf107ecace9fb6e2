"""Which drafter a generation gets: names to drafters, opened once for a loaded model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from forerun.errors import OptionError, UnsupportedError
from forerun.runtime.drafting.accept import ACCEPT_RULES
from forerun.runtime.drafting.async_rounds import check_ahead
from forerun.runtime.drafting.drafter import Drafter
from forerun.runtime.drafting.fixed import DraftPolicy, FixedPolicy
from forerun.runtime.drafting.plan import DraftPlan, PlainCosts, check_name
from forerun.runtime.drafting.schedules import SCHEDULES

if TYPE_CHECKING:
    from pathlib import Path

    from forerun.runtime.manifest import Manifest
    from forerun.runtime.prefix import PrefixCache

AnyDrafter: TypeAlias = str | Drafter

NO_DRAFTER = "none"
# What `load` and the commands draft with unless they are told otherwise: see `default_drafter`.
DEFAULT_DRAFTER = "default"

OpenDrafter = Callable[[str], Drafter]
MakePolicy = Callable[[Drafter], DraftPolicy]


@dataclass(frozen=True)
class Means:
    """What a model gives its drafters: how much to draft, and what that saves.

    Attributes:
        policy: makes the policy for a drafter.
        costs: of the model's steps, None if they were not measured.
    """

    policy: MakePolicy = lambda drafter: FixedPolicy()
    costs: PlainCosts | None = None


class Drafters:
    """The drafters of one loaded model. Each is opened when it is first asked for, and kept.

    Args:
        manifest: of the model.
        open_drafter: opens one by name; None offers no names.
        default: what a generation drafts with if it does not say.
        schedule: name of the schedule of all of them.
        trees: whether drafts may be trees; None allows them where they can be run and cannot
            change the text: on a row-exact bundle only chains are as exact as plain decoding.
        device: where drafters that are opened by name run.
        means: called once, when the first drafter is asked for.
        refusal: why nothing may be drafted at all; empty if it may.

    Raises:
        OptionError: there is no such schedule.
    """

    def __init__(
        self,
        manifest: Manifest,
        open_drafter: OpenDrafter | None = None,
        *,
        default: AnyDrafter = NO_DRAFTER,
        schedule: str = "serial",
        trees: bool | None = None,
        device: str = "cpu",
        means: Callable[[], Means] = Means,
        refusal: str = "",
    ) -> None:
        check_name("schedule", schedule, SCHEDULES)
        self._manifest, self._open = manifest, open_drafter
        self._default = default_drafter(manifest) if default == DEFAULT_DRAFTER else default
        self._schedule = schedule
        self._trees = trees_allowed(manifest) if trees is None else trees
        self._device, self._make_means = device, means
        self._refusal = refusal
        self._means: Means | None = None
        self._opened: dict[str, Drafter] = {}
        self._policies: dict[int, tuple[Drafter, DraftPolicy]] = {}

    def plan(self, drafter: AnyDrafter | None = None, accept: str = "match") -> DraftPlan | None:
        """How a generation drafts; None if it does not.

        Args:
            drafter: a name, a drafter, or None for the default.
            accept: name of the accept rule.

        Raises:
            OptionError: the drafter or the rule is not known, or a rule is given without a drafter.
            UnsupportedError: the drafter does not fit the model, or cannot follow the schedule.
        """
        check_name("accept", accept, ACCEPT_RULES)
        chosen = self._default if drafter in (None, DEFAULT_DRAFTER) else drafter
        if chosen == NO_DRAFTER:
            if accept != "match":
                raise OptionError(
                    f"accept {accept!r} needs a drafter; name one, or leave it at 'match'"
                )
            return None
        if self._refusal:
            raise OptionError(self._refusal)
        found = self._named(chosen) if isinstance(chosen, str) else chosen
        if found.needs_features and not self._manifest.taps:
            raise UnsupportedError(
                f"the drafter {found.name} reads hidden states that {self._manifest.name} does not "
                "give; pull or export the model again, or take another drafter"
            )
        if SCHEDULES[self._schedule].overlap is not None:
            check_ahead(found)
        means = self._known_means()
        return DraftPlan(
            found,
            self._policy_of(found, means),
            accept,
            self._schedule,
            trees=self._trees,
            device=self._device if isinstance(chosen, str) else "cpu",
            costs=means.costs,
        )

    def close(self) -> None:
        """Close the drafters that were opened by name."""
        for drafter in self._opened.values():
            drafter.close()
        self._opened.clear()
        self._policies.clear()

    def _known_means(self) -> Means:
        if self._means is None:
            self._means = self._make_means()
        return self._means

    def _policy_of(self, drafter: Drafter, means: Means) -> DraftPolicy:
        """The same one for every generation: it learns from one answer for the next."""
        if id(drafter) not in self._policies:
            # The drafter is kept too, so that no other one gets its identity.
            self._policies[id(drafter)] = drafter, means.policy(drafter)
        return self._policies[id(drafter)][1]

    def _named(self, name: str) -> Drafter:
        if name not in self._opened:
            if self._open is None:
                raise OptionError(
                    f"drafter {name!r} cannot be opened by name here; give a Drafter, or load the "
                    "model with forerun.load"
                )
            self._opened[name] = self._open(name)
        return self._opened[name]


def trees_allowed(manifest: Manifest, lowering: str = "cpu") -> bool:
    """Whether a model can verify trees without giving up that its rows are exact.

    Args:
        manifest: of the model.
        lowering: the form of its graph that runs; only on the CPU are rows exact.
    """
    is_exact = manifest.row_exact and lowering == "cpu"
    return f"{lowering}-tree" in manifest.lowerings and not is_exact


def default_drafter(manifest: Manifest, device: str = "cpu") -> str:
    """``auto`` where drafting cannot change a bit of the text, else ``none``.

    Args:
        manifest: of the model; what it promises about rows holds for the CPU only.
        device: where the model runs.
    """
    return "auto" if manifest.row_exact and device == "cpu" else NO_DRAFTER


def named_drafters(
    manifest: Manifest,
    folder: Path,
    threads: int | None = None,
    device: str = "cpu",
    runner: object = None,
) -> OpenDrafter:
    """What opens drafters by name for the model of a bundle.

    Args:
        manifest: of the bundle.
        folder: of the bundle; trained drafters lie beside it.
        threads: of a drafter's session.
        device: where it runs.
        runner: the model's own, for drafters that run on it.
    """
    from forerun.runtime.drafting.registry import DrafterContext, open_drafter

    context = DrafterContext(manifest, folder, threads=threads, device=device, runner=runner)
    return lambda name: open_drafter(name, context)


def measured_means(cache: PrefixCache, device: str, threads: int, policy: str) -> Means:
    """Means from the costs of the model's steps, which are measured once per machine.

    Args:
        cache: of the model; what it holds is forgotten if it comes to measuring.
        device: where the model runs.
        threads: of its session.
        policy: one of `policy.POLICIES`.

    Raises:
        BusyError: a generation is running on the model.
        OptionError: there is no such policy.
    """
    from forerun.runtime.drafting.costs import target_costs
    from forerun.runtime.drafting.policy import policy_maker

    runner: Any = cache.runner
    with cache.reserved():
        cache.rewind(0)
        costs = target_costs(runner, device, threads)
    return Means(policy_maker(costs, policy), costs)
