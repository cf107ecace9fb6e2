"""One model on one device with its own KV cache: `step` runs rows, and that is all."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np

from forerun.devices.session import SessionOptions
from forerun.errors import BundleError, OptionError
from forerun.runtime.arena import KVArena
from forerun.runtime.bound import MAX_ROWS, BoundGraph
from forerun.runtime.rows import tree_bias, tree_depths

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from forerun.runtime.manifest import Manifest

Want = Literal["last", "all", "none"]
_TREE = "{}-tree"


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
        lowering: which form of the graph to run.

    Raises:
        BundleError: the bundle lacks the lowering, or its graph cannot be loaded.
        OptionError: `threads` is out of range.
    """

    def __init__(
        self,
        manifest: Manifest,
        folder: Path,
        *,
        threads: int | None = None,
        spin: bool = True,
        lowering: str = "cpu",
    ) -> None:
        self.manifest = manifest
        self.arena = KVArena(manifest.kv)
        self._folder = folder
        self._lowering = lowering
        self._options = SessionOptions(threads=threads, spin=spin)
        self.threads = self._options.resolved_threads()
        self._chain = self._open(lowering)
        self._tree: BoundGraph | None = None
        self._last = self._chain

    @property
    def session_time(self) -> float:
        """Seconds spent inside ONNX Runtime so far."""
        return self._chain.seconds + (self._tree.seconds if self._tree else 0.0)

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
        """
        ids = np.asarray(ids, np.int64)
        self._check(ids)
        rows = _wanted(want, len(ids))
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

    def close(self) -> None:
        """Free the sessions."""
        self._chain.close()
        if self._tree:
            self._tree.close()

    def _open(self, lowering: str) -> BoundGraph:
        forms = self.manifest.lowerings
        if lowering not in forms:
            raise BundleError(
                f"the bundle has no lowering {lowering!r}, only {', '.join(forms)}; "
                "models with a sliding window have none for trees"
            )
        return BoundGraph(
            forms[lowering], self._folder, self._options, self.arena, self.manifest.model
        )

    def _run_chain(self, ids: np.ndarray, rows: np.ndarray) -> np.ndarray:
        past = self.arena.length
        logits = self._chain.run(ids, past, rows, past)
        self._last = self._chain
        self.arena.length, self.arena.pending = past + len(ids), 0
        return logits

    def _run_tree(self, ids: np.ndarray, rows: np.ndarray, parents: Sequence[int]) -> np.ndarray:
        past = self.arena.length
        positions = past + tree_depths(parents, len(ids))
        if self._tree is None:
            self._tree = self._open(_TREE.format(self._lowering))
        logits = self._tree.run(ids, positions, rows, past, tree_bias(parents, past))
        self._last = self._tree
        self.arena.pending = len(ids)
        return logits

    def _check(self, ids: np.ndarray) -> None:
        if ids.ndim != 1 or not 1 <= len(ids) <= MAX_ROWS:
            raise OptionError(f"a step takes 1 to {MAX_ROWS} rows, got shape {ids.shape}")
        vocab = self.manifest.model.vocab
        low, high = (ids[0], ids[0]) if len(ids) == 1 else (ids.min(), ids.max())
        if low < 0 or high >= vocab:
            raise OptionError(f"token ids must be in 0..{vocab - 1}, got {low}..{high}")
        self.arena.check_room(len(ids))


def _wanted(want: Want | Sequence[int], count: int) -> np.ndarray:
    """Numbers of the rows whose logits are computed; at least one, since graphs need one."""
    if isinstance(want, str):
        return np.arange(count) if want == "all" else np.array([count - 1])
    rows = np.asarray(want, np.int64)
    if rows.ndim != 1 or not rows.size or rows.min() < 0 or rows.max() >= count:
        raise OptionError(f"wanted rows must be among the {count} rows, got {want!r}")
    return rows
