"""One model on one device with its own KV cache: `step` runs rows, and that is all."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Literal

import numpy as np

from forerun.devices.providers import find_provider
from forerun.devices.session import SessionOptions
from forerun.errors import BundleError, OptionError
from forerun.runtime.arena import KVArena, Rows
from forerun.runtime.bound import BoundGraph
from forerun.runtime.device_arena import DeviceArena
from forerun.runtime.layouts import layout_on
from forerun.runtime.rows import MAX_ROWS, check_ids, tree_bias, tree_depths, wanted_rows
from forerun.runtime.skipping import Singles

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from forerun.devices.providers import Provider
    from forerun.runtime.manifest import Manifest
    from forerun.runtime.skipping import SkipRule

Want = Literal["last", "all", "none"]
_TREE = "{}-tree"
_EXPORT_AGAIN = "export it again, or pull it with --force"
_WHY_ABSENT = {"-tree": "models with a sliding window have none for trees"}


class Runner:
    """Runs the rows of a step through a bundle's graph.

    Prefill, decoding and the verification of chains and trees are the same call. Trees need a
    graph with a mask, which costs a tenth of the speed, so it is opened when the first tree comes;
    it shares weights file and KV cache with the other.

    Args:
        manifest: of the bundle.
        folder: of the bundle.
        threads: of the session; None takes one per core, up to eight.
        spin: let waiting threads spin; False when another session runs at the same time.
        lowering: which form of the graph to run; None takes the device's.
        device: a name of `forerun.devices.providers.PROVIDERS`. The KV cache lies in its memory,
            and only ids and the wanted rows' logits cross.
        skipping: which feed-forward blocks single-row steps leave out; None runs all of them.
        arena: the KV cache, e.g. `forerun.runtime.window.open_window`'s; None makes one.

    Raises:
        BundleError: the bundle lacks the lowering, or its graph cannot be loaded.
        DeviceError: the device is not here, cannot run the whole graph, or lacks memory.
        OptionError: `threads` is out of range, the device is unknown, or the graph cannot skip.
    """

    def __init__(
        self,
        manifest: Manifest,
        folder: Path,
        *,
        threads: int | None = None,
        spin: bool = True,
        lowering: str | None = None,
        device: str = "cpu",
        skipping: SkipRule | None = None,
        arena: Rows | None = None,
    ) -> None:
        row = find_provider(device)
        self._lowering = lowering or row.form
        # Forms for other devices have a KV cache of their own, whatever the bundle's default is.
        self.manifest = replace(manifest, kv=layout_on(manifest, self._lowering))
        self.device, self._folder = device, folder
        self._options = SessionOptions(threads=threads, spin=spin, device=device)
        self.threads = self._options.resolved_threads()
        self._require(self._lowering)
        self.arena: Rows = self._new_arena(row) if arena is None else arena
        self._spent = 0.0
        self._epoch = self.arena.epoch
        self._chain = self._open(self._lowering)
        self._tree: BoundGraph | None = None
        self._last = self._chain
        self._singles = Singles(manifest.model.layers)
        self.skipping = skipping

    @property
    def skipping(self) -> SkipRule | None:
        """Which feed-forward blocks steps of a single row leave out; other steps run them all."""
        return self._skipping

    @skipping.setter
    def skipping(self, rule: SkipRule | None) -> None:
        if rule is not None and not self.can_skip:
            raise OptionError(
                f"the form {self._lowering!r} of {self.manifest.name} cannot skip feed-forward "
                "blocks; quantize its float32 bundle with --skipping and run it on the cpu"
            )
        self._skipping = rule

    @property
    def can_skip(self) -> bool:
        """Whether steps can leave feed-forward blocks out."""
        return self._chain.gate is not None

    @property
    def ffn_counts(self) -> tuple[int, int]:
        """Feed-forward blocks that single-row steps ran so far, and how many there were."""
        return self._singles.ran, self._singles.possible

    @property
    def ffn_share(self) -> float:
        """The first of `ffn_counts` by the second; 1 before the first such step."""
        ran, possible = self.ffn_counts
        return ran / possible if possible else 1.0

    @property
    def session_time(self) -> float:
        """Seconds spent inside ONNX Runtime so far."""
        return self._spent + self._chain.seconds + (self._tree.seconds if self._tree else 0.0)

    def step(
        self,
        ids: Sequence[int] | np.ndarray,
        *,
        want: Want | Sequence[int] = "last",
        parents: Sequence[int] | None = None,
    ) -> np.ndarray:
        """Run rows behind the committed history.

        Args:
            ids: token ids of the rows.
            want: which rows' logits to compute: the last one, all, none, or row numbers.
            parents: without it the rows are a chain and are committed. With it they are a tree:
                parents[i] is the row before row i, or -1 for the history; the rows stay pending
                until `arena.commit` picks those to keep.

        Returns:
            float32 logits [R, V] of the wanted rows, a view that is valid until the next step.

        Raises:
            ContextLimitError: the rows do not fit into the KV cache; nothing was run.
            OptionError: no rows, too many rows, ids outside the vocabulary, or parents that are
                no tree; nothing was run.
            BundleError: the bundle has no graph for trees.
            DeviceError: the device failed; the KV cache is empty now, and a later step opens the
                device anew.
        """
        ids = np.asarray(ids, np.int64)
        check_ids(ids, self.manifest.model.vocab, MAX_ROWS)
        rows = wanted_rows(want, len(ids))
        if self._epoch != self.arena.epoch:
            self._reopen()
        if parents is None:
            logits = self._run_chain(ids, rows)
        else:
            logits = self._run_tree(ids, rows, parents)
        return logits[:0] if isinstance(want, str) and want == "none" else logits

    def hidden(self) -> np.ndarray:
        """Hidden states float32 [R, D] of the last step's wanted rows.

        Raises:
            OptionError: the bundle was exported without them.
        """
        hidden = self._last.hidden
        if hidden is None:
            raise OptionError("the bundle has no hidden states; export it with --hidden-states")
        return hidden

    def features(self) -> np.ndarray | None:
        """Tapped hidden states float32 [S, F] of all rows of the last step, None without taps.

        A view that is valid until the next step.
        """
        return self._last.features

    def close(self) -> None:
        """Free the sessions."""
        self._chain.close()
        if self._tree:
            self._tree.close()

    def _new_arena(self, provider: Provider) -> Rows:
        if provider.memory == "device":
            return DeviceArena(self.manifest, self._folder, self._options, self._lowering)
        return KVArena(self.manifest.kv)

    def _require(self, lowering: str) -> None:
        forms = self.manifest.lowerings
        if lowering not in forms:
            raise BundleError(
                f"the bundle has no lowering {lowering!r}, only {', '.join(forms)}; "
                f"{_WHY_ABSENT.get(lowering.removeprefix(self._lowering), _EXPORT_AGAIN)}"
            )

    def _open(self, lowering: str) -> BoundGraph:
        self._require(lowering)
        form = self.manifest.lowerings[lowering]
        return BoundGraph(form, self._folder, self._options, self.arena, self.manifest.model)

    def _reopen(self) -> None:
        """Open the graphs again on new memory, after the device failed."""
        self._spent = self.session_time
        self._chain.seconds = 0.0
        if self._tree:
            self._tree.close()
            self._tree = None
        self._chain.close()
        self._chain = self._last = self._open(self._lowering)
        self._epoch = self.arena.epoch

    def _run_chain(self, ids: np.ndarray, rows: np.ndarray) -> np.ndarray:
        arena, gate, count = self.arena, self._chain.gate, len(ids)
        if gate is not None:
            steps = self._singles.before(arena.length)
            rule = self._skipping if count == 1 else None
            gate.set(rule.choose(steps) if rule else None)
        arena.make_room(count)
        with arena.guarded():
            logits = self._chain.run(ids, arena.position, rows, arena.used)
        self._last = self._chain
        arena.length, arena.pending = arena.length + count, 0
        self._singles.note(count, arena.length, gate)
        return logits

    def _run_tree(self, ids: np.ndarray, rows: np.ndarray, parents: Sequence[int]) -> np.ndarray:
        depths = tree_depths(parents, len(ids))
        if self._tree is None:
            self._tree = self._open(_TREE.format(self._lowering))
        if not self.arena.used:
            # ONNX Runtime takes the rows of a first prompt to stand one behind the other.
            raise OptionError(
                "a tree needs history before it, and the KV cache is empty; "
                "run its first row as a chain"
            )
        self.arena.make_room(len(ids))
        past, positions = self.arena.used, self.arena.position + depths
        with self.arena.guarded():
            logits = self._tree.run(ids, positions, rows, past, tree_bias(parents, past))
        self._last = self._tree
        self.arena.pending = len(ids)
        self._singles.end()
        return logits
