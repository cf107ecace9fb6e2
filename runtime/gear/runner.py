"""A runner whose KV cache is in GEAR's form."""

from __future__ import annotations

from typing import TYPE_CHECKING

from forerun.errors import OptionError
from forerun.runtime.gear.graph import GearGraph
from forerun.runtime.gear.store import MAX_PENDING, GearArena
from forerun.runtime.rows import tree_bias, tree_depths
from forerun.runtime.runner import Runner

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np

    from forerun.devices.providers import Provider
    from forerun.runtime.arena import Rows
    from forerun.runtime.bound import BoundGraph


class GearRunner(Runner):
    """`Runner` for a cache in GEAR's form; one graph runs chains and trees.

    Args: those of `Runner`; the device must be the CPU.

    Raises:
        BundleError: the bundle's layout is no form of GEAR, it lacks the lowering, or its graph
            cannot be loaded.
        OptionError: `threads` is out of range, the device is not the CPU, or the graph cannot
            skip.
    """

    arena: GearArena

    def _new_arena(self, provider: Provider) -> Rows:
        if provider.name != "cpu":
            raise OptionError(f"a KV cache in GEAR's form needs the cpu, got {provider.name}")
        return GearArena(self.manifest.kv)

    def _open(self, lowering: str) -> BoundGraph:
        self._require(lowering)
        form = self.manifest.lowerings[lowering]
        return GearGraph(form, self._folder, self._options, self.arena, self.manifest.model)

    def _run_tree(self, ids: np.ndarray, rows: np.ndarray, parents: Sequence[int]) -> np.ndarray:
        if len(ids) > MAX_PENDING:
            raise OptionError(f"a tree may have {MAX_PENDING} rows, got {len(ids)}")
        past = self.arena.length
        positions = past + tree_depths(parents, len(ids))
        # The graph is that of chains, which may have skipped blocks in the last step.
        if self._chain.gate is not None:
            self._chain.gate.set(None)
        self.arena.make_room(len(ids))
        with self.arena.guarded():
            logits = self._chain.run(ids, positions, rows, past, tree_bias(parents, past))
        self.arena.pending = len(ids)
        self._singles.end()
        return logits
