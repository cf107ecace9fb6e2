"""What a drafter costs: measured on a text that repeats itself, so that every drafter speaks."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from forerun.devices.remember import Remembered
from forerun.errors import BundleError, DeviceError
from forerun.runtime.drafting.ahead import AheadDrafter
from forerun.runtime.drafting.drafter import Outcome
from forerun.runtime.drafting.folder import DRAFTER_NAME
from forerun.runtime.drafting.tree import TokenTree
from forerun.runtime.manifest import MANIFEST_NAME, Manifest, file_sha256
from forerun.runtime.strict import decode

if TYPE_CHECKING:
    from forerun.runtime.drafting.drafter import Drafter

_FEW, _MANY = 1, 5
_ROUNDS = 6
_PERIOD, _TEXT = 48, 160


@dataclass(frozen=True)
class DraftCosts:
    """Time a drafter takes.

    Attributes:
        name: of the drafter.
        device: where it ran.
        call_seconds: of a round beside its steps: taking note of the last one, looking up.
        step_seconds: of each drafted token.
        runs_ahead: whether it can draft behind its own unverified tokens.
    """

    name: str
    device: str
    call_seconds: float
    step_seconds: float
    runs_ahead: bool = False

    def seconds(self, tokens: int) -> float:
        """Time of a proposal of so many tokens."""
        return self.call_seconds + tokens * self.step_seconds


def measure_drafter(
    drafter: Drafter, target: Manifest, device: str = "cpu", limit: float = math.inf
) -> DraftCosts:
    """Time proposals of one and of five tokens; the drafter forgets the text afterwards.

    Args:
        drafter: any, that nothing else uses meanwhile.
        target: manifest of the model it drafts for.
        device: where it runs.
        limit: seconds of a proposal of one token; if it takes longer, no more is measured.

    Raises:
        DeviceError: it takes longer.
    """
    clock = _Rounds(drafter, target)
    if limit < math.inf:
        clock.round(_FEW)
        seconds, _ = clock.round(_FEW)
        if seconds > limit:
            raise DeviceError(f"the drafter {drafter.name} takes {seconds:.2g} s on {device}")
    times: dict[int, list[tuple[float, int]]] = {_FEW: [], _MANY: []}
    for number in range(_ROUNDS + 1):
        for budget, found in times.items():
            timed = clock.round(budget)
            if number:
                found.append(timed)
    drafter.rewind(0)
    few, many = (statistics.median(t for t, _ in times[budget]) for budget in (_FEW, _MANY))
    counts = [max(statistics.median_low(n for _, n in times[b]), 0) for b in (_FEW, _MANY)]
    steps = max(counts[1] - counts[0], 1)
    step = max((many - few) / steps, 0.0)
    call = max(few - counts[0] * step, 0.0)
    return DraftCosts(drafter.name, device, call, step, isinstance(drafter, AheadDrafter))


class _Rounds:
    """Plain rounds of a periodic text, in which a drafter is asked and told."""

    def __init__(self, drafter: Drafter, target: Manifest) -> None:
        rng = np.random.default_rng(0)
        self._drafter = drafter
        self._period = rng.integers(0, target.model.vocab, _PERIOD).tolist()
        self._logits = rng.standard_normal((1, target.model.vocab), np.float32)
        width = len(target.taps) * target.model.hidden
        self._features = rng.standard_normal((1, width), np.float32) if width else None
        self._length = min(_TEXT, max(target.kv.capacity // 2, 2))
        drafter.begin([self._id(at) for at in range(self._length)], self._features)

    def round(self, budget: int) -> tuple[float, int]:
        """Seconds of a round, and how many tokens were drafted in it."""
        anchor, new = self._id(self._length - 1), self._id(self._length)
        started = time.perf_counter()
        tree = self._drafter.propose(budget, lambda value: True)
        outcome = Outcome(TokenTree.EMPTY, (), (new,), (anchor,), self._logits, self._features)
        self._drafter.observe(outcome)
        self._length += 1
        return time.perf_counter() - started, len(tree)

    def _id(self, at: int) -> int:
        return self._period[at % _PERIOD]


def draft_costs_key(target_key: str, name: str, folder: Path | None) -> str:
    """What a drafter's measured costs belong to: target, drafter, and its trained files."""
    digest = ""
    for file in (DRAFTER_NAME, MANIFEST_NAME):
        if folder is not None and (folder / file).is_file():
            digest += file_sha256(folder / file)[:12]
    return f"{target_key}/{name}/{hashlib.sha256(digest.encode()).hexdigest()[:12]}"


def remembered_draft_costs(key: str) -> DraftCosts | None:
    """Costs measured before on this machine; None if there are none, or the file is damaged."""
    try:
        found = decode(DraftCosts, Remembered("draft-costs").read(key), "costs")
    except BundleError:
        return None
    usable = 0 <= found.call_seconds < 1e3 and 0 <= found.step_seconds < 1e3
    return found if usable else None


def remember_draft_costs(key: str, costs: DraftCosts) -> None:
    """Keep costs for later runs."""
    Remembered("draft-costs").write(key, dataclasses.asdict(costs))
