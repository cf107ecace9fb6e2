"""A runner for devices that need static shapes: fixed widths, padding, and masks for trees."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from forerun.devices.plugins import reason
from forerun.devices.session import SessionOptions, open_session
from forerun.errors import BundleError, DeviceError, ForerunError, OptionError
from forerun.runtime.arena import KVArena
from forerun.runtime.layouts import layout_on
from forerun.runtime.manifest import inside
from forerun.runtime.pieces import cut
from forerun.runtime.rows import MAX_ROWS, ancestors, check_ids, tree_depths, wanted_rows
from forerun.runtime.static_graph import StaticGraph

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from forerun.runtime.manifest import Lowering, Manifest

Want = Literal["last", "all", "none"]
_EMBED = "{}-embed"


class StaticRunner:
    """Runs the rows of a step through a bundle's static graph; a `Runner` to all who use it.

    A step runs in the narrowest width it fits, longer ones in pieces. A width is opened when it
    is first needed, since compiling it for an NPU takes long. Trees need no graph of their own,
    for every step has a mask. The embedding is looked up on the CPU.

    Args:
        manifest: of the bundle.
        folder: of the bundle.
        threads: of the sessions on the CPU; None takes one per core, up to eight.
        spin: let waiting threads spin; False when another session runs at the same time.
        device: a name of `forerun.devices.providers.PROVIDERS`; it works on the host's memory.
        lowering: which form of the graph to run.

    Raises:
        BundleError: the bundle lacks the lowering, or its graph cannot be loaded.
        DeviceError: the device is not here, or cannot run the whole graph.
        OptionError: `threads` is out of range, or no such device.
    """

    def __init__(
        self,
        manifest: Manifest,
        folder: Path,
        *,
        threads: int | None = None,
        spin: bool = True,
        device: str = "cpu",
        lowering: str = "npu",
    ) -> None:
        self.manifest = dataclasses.replace(manifest, kv=layout_on(manifest, lowering))
        self.device = device
        self._folder = folder
        self._form, table = _forms(manifest, lowering)
        self._options = SessionOptions(threads=threads, spin=spin, device=device)
        self.threads = self._options.resolved_threads()
        self.arena = KVArena(self.manifest.kv)
        on_cpu = SessionOptions(threads=threads, spin=spin)
        self._embedding: Any = open_session(inside(folder, table.graph), on_cpu)
        self._graphs: dict[int, StaticGraph] = {}
        self._spent = 0.0
        self._ids = table.inputs["ids"].name
        self._rows = {
            role: np.zeros((0, spec.shape[-1]), np.float32)
            for role, spec in self._form.outputs.items()
            if not role.startswith("present_")
        }
        self._graph(1)

    @property
    def widths(self) -> tuple[int, ...]:
        """Numbers of rows the device can run at once, increasing."""
        return self._form.query_widths

    @property
    def opened(self) -> tuple[int, ...]:
        """Those of `widths` that were needed so far."""
        return tuple(sorted(self._graphs))

    @property
    def session_time(self) -> float:
        """Seconds spent inside ONNX Runtime so far."""
        return self._spent + sum(graph.seconds for graph in self._graphs.values())

    def step(
        self,
        ids: Sequence[int] | np.ndarray,
        *,
        want: Want | Sequence[int] = "last",
        parents: Sequence[int] | None = None,
    ) -> np.ndarray:
        """Run rows behind the committed history; arguments and errors as of `Runner.step`.

        After a `DeviceError` the KV cache is empty, and the next step opens the device anew.

        Returns:
            float32 logits [R, V] of the wanted rows, valid until the next step.
        """
        ids = np.asarray(ids, np.int64)
        check_ids(ids, self.manifest.model.vocab, MAX_ROWS)
        rows = wanted_rows(want, len(ids))
        depths = np.arange(len(ids)) if parents is None else tree_depths(parents, len(ids))
        self.arena.make_room(len(ids))
        with self._guarded():
            self._run(ids, depths, ancestors(parents, len(ids)), rows)
        if parents is None:
            self.arena.length, self.arena.pending = self.arena.length + len(ids), 0
        else:
            self.arena.pending = len(ids)
        logits = self._rows["logits"]
        return logits[:0] if isinstance(want, str) and want == "none" else logits

    def hidden(self) -> np.ndarray:
        """Hidden states float32 [R, D] of the last step's wanted rows.

        Raises:
            OptionError: the bundle was exported without them.
        """
        if "hidden" not in self._rows:
            raise OptionError("the bundle has no hidden states; export it with --hidden-states")
        return self._rows["hidden"]

    def features(self) -> np.ndarray | None:
        """Tapped hidden states float32 [S, F] of all rows of the last step, None without taps."""
        return self._rows.get("features")

    def close(self) -> None:
        """Free the sessions."""
        self._close_graphs()
        self._embedding = None

    def _run(self, ids: np.ndarray, depths: np.ndarray, seen: np.ndarray, rows: np.ndarray) -> None:
        past = self.arena.length
        started = time.perf_counter()
        embeddings = self._embedding.run(None, {self._ids: ids[None]})[0][0]
        self._spent += time.perf_counter() - started
        every = np.arange(len(ids))
        kept = {role: every if role == "features" else rows for role in self._rows}
        for role, numbers in kept.items():
            width = self._form.outputs[role].shape[-1]
            self._rows[role] = np.empty((len(numbers), width), np.float32)
        for piece in cut(len(ids), self.arena.capacity - past, self.widths):
            graph = self._graph(piece.width)
            graph.run(embeddings, past + depths, piece, past, seen)
            for role, numbers in kept.items():
                here = (numbers >= piece.start) & (numbers < piece.stop)
                self._rows[role][here] = graph.outputs[role][numbers[here] - piece.start]

    @contextlib.contextmanager
    def _guarded(self) -> Iterator[None]:
        try:
            yield
        except ForerunError:
            raise
        except Exception as error:  # ONNX Runtime raises a class of its own for each status code
            if self.device == "cpu":
                raise
            # Nobody knows what a broken run left in the cache.
            self.arena.rewind(0)
            self._close_graphs()
            raise DeviceError(
                f"{self.device} failed in the middle of a step ({reason(error)}); "
                "try again, or use another device"
            ) from error

    def _close_graphs(self) -> None:
        self._spent = self.session_time
        for graph in self._graphs.values():
            graph.close()
        self._graphs.clear()

    def _graph(self, width: int) -> StaticGraph:
        if width not in self._graphs:
            self._graphs[width] = StaticGraph(
                self._form, self._folder, self._options, self.arena, width
            )
        return self._graphs[width]


def _forms(manifest: Manifest, lowering: str) -> tuple[Lowering, Lowering]:
    """The entries of the graph and of the embedding that feeds it."""
    forms, table = manifest.lowerings, _EMBED.format(lowering)
    if lowering not in forms or table not in forms:
        raise BundleError(
            f"the bundle has no lowering {lowering!r}, only {', '.join(forms)}; "
            "export the model again with --static"
        )
    widths = forms[lowering].query_widths
    if not widths or widths[0] != 1 or list(widths) != sorted(set(widths)):
        raise BundleError(f"manifest: query widths must increase from 1, got {list(widths)}")
    return forms[lowering], forms[table]
