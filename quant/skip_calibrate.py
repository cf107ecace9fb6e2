"""Finding out which feed-forward blocks a model can spare: the calibration of skipping.

What counts is decoding: a prefix is read in full, and only the rows behind it skip. A fixed set of
blocks gives the same rows whether they run one by one or together, so sets are judged in one step
of many rows; the adaptive rule decides once for all rows of a step, so its levels are judged row
by row.
"""

from __future__ import annotations

import dataclasses
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx
from onnx import helper, numpy_helper

from forerun.devices.session import SessionOptions
from forerun.errors import OptionError
from forerun.quant.measure_divergence import kl_rows, log_softmax
from forerun.quant.skip_graph import find_blocks, skipping_lowering, with_skipping
from forerun.runtime.arena import KVArena
from forerun.runtime.bound import BoundGraph
from forerun.runtime.manifest import SkipLevel, Skipping, TensorSpec
from forerun.runtime.skipping import Skip

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from forerun.runtime.manifest import Lowering, Manifest

    Progress = Callable[[str, int, int | None], None]

RATIOS = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5)
# Nats of mean KL divergence to the same model without skipping.
KL_LIMIT = 0.05
WARMUP = 4
# A layer whose block alone costs more than this many times the median is outside the band.
_COLD = 4.0
_PREFIX, _ROWS = 160, 32
_SET_PIECES, _LEVEL_PIECES = 5, 4
_CANDIDATES = 4
_TRIES = 4
_CLOSE = 0.01
_SIDE = "skip-calibration.onnx"


@dataclass(frozen=True)
class Probe:
    """Part of a text: what is read in full, and the rows that skip.

    Attributes:
        prefix: int64 [P].
        rows: int64 [R].
    """

    prefix: np.ndarray
    rows: np.ndarray


def check_skippable(folder: Path, manifest: Manifest) -> None:
    """Refuse a bundle that `add_skipping` could do nothing with.

    Raises:
        OptionError: the model has too few layers.
        UnsupportedError: the graph is not made of blocks as `export` writes them.
    """
    if manifest.model.layers < 3:
        raise OptionError(
            f"a model of {manifest.model.layers} layers has no block between its first and last, "
            "so nothing can be skipped; it takes 3 layers"
        )
    path = folder / manifest.lowerings["cpu"].graph
    find_blocks(onnx.load(str(path), load_external_data=False).graph)


def add_skipping(
    folder: Path,
    manifest: Manifest,
    pieces: Sequence[np.ndarray],
    *,
    kl_limit: float = KL_LIMIT,
    report: Progress | None = None,
) -> Manifest:
    """Let a bundle's CPU graph skip feed-forward blocks, as calibrated on text.

    The graph for trees and those of other KV layouts are to be derived from it afterwards.

    Args:
        folder: of the bundle; its graph of the lowering ``cpu`` is replaced.
        manifest: of the bundle.
        pieces: token ids, each int64 [T], for calibration.
        kl_limit: largest mean KL divergence that the default ratio may cost, nats.
        report: called with (stage, done, total).

    Returns:
        The manifest with `skipping`, and the new inputs and outputs of that lowering.

    Raises:
        OptionError: the text is too short, or the model has too few layers.
        UnsupportedError: the graph is not made of blocks as `export` writes them.
    """
    report = report or (lambda stage, done, total: None)
    chain, layers = manifest.lowerings["cpu"], manifest.model.layers
    check_skippable(folder, manifest)
    probes = _probes(pieces)
    cosine = _profile(folder, manifest, probes, report)
    band, order = _order(folder, manifest, probes[:_SET_PIECES], report)
    with_skipping(folder, chain.graph, band)
    form = skipping_lowering(chain, layers)
    with closing(Judge(folder, manifest, form, probes[:_LEVEL_PIECES])) as judge:
        levels = judge.levels(cosine, band, report)
    default = max((level.ratio for level, kl in levels if kl <= kl_limit), default=0.0)
    means = tuple(float(value) for value in cosine.mean(axis=0))
    chosen = tuple(level for level, _ in levels)
    found = Skipping(*band, means, tuple(order), chosen, WARMUP, default)
    lowerings = manifest.lowerings | {"cpu": form}
    return dataclasses.replace(manifest, skipping=found, lowerings=lowerings)


def _order(
    folder: Path, manifest: Manifest, probes: Sequence[Probe], report: Progress
) -> tuple[tuple[int, int], list[int]]:
    """The band, and its layers in the order in which a static set grows."""
    chain, layers = manifest.lowerings["cpu"], manifest.model.layers
    side = folder / _SIDE
    try:
        side.write_bytes((folder / chain.graph).read_bytes())
        with_skipping(folder, _SIDE)
        wide = dataclasses.replace(skipping_lowering(chain, layers), graph=_SIDE)
        with closing(Judge(folder, manifest, wide, probes)) as judge:
            harm = judge.single(range(1, layers - 1), report)
            band = find_band(harm)
            return band, judge.grow({layer: harm[layer] for layer in range(*band)}, report)
    finally:
        side.unlink(missing_ok=True)


def find_band(harm: dict[int, float]) -> tuple[int, int]:
    """The layers (first, stop) around the least harmful one that all cost little.

    Args:
        harm: per layer, what skipping its block alone costs.
    """
    limit = _COLD * float(np.median(list(harm.values())))
    first = stop = min(harm, key=lambda layer: harm[layer])
    while harm.get(first - 1, np.inf) <= limit:
        first -= 1
    while harm.get(stop + 1, np.inf) <= limit:
        stop += 1
    return first, stop + 1


def simulate(cosine: np.ndarray, band: tuple[int, int], tau: float, run: int) -> float:
    """Share of all blocks that the adaptive rule would skip at given cosines.

    Args:
        cosine: float32 [rows, layers], measured without skipping.
        band: layers (first, stop).
        tau: threshold.
        run: blocks to skip behind a hit.
    """
    rows, layers = cosine.shape
    until, skipped = np.zeros(rows, np.int64), 0
    for layer in range(*band):
        runs = until <= layer
        skipped += int((~runs).sum())
        hit = runs & (cosine[:, layer] >= tau)
        until[hit] = layer + 1 + run
    return skipped / (rows * layers)


class Judge:
    """Runs text with blocks skipped and compares with the same graph without.

    Args:
        folder: of the bundle.
        manifest: of the bundle.
        form: a lowering whose graph can skip.
        probes: the text.
    """

    def __init__(
        self, folder: Path, manifest: Manifest, form: Lowering, probes: Sequence[Probe]
    ) -> None:
        self._layers = manifest.model.layers
        self._arena = KVArena(manifest.kv)
        self._graph = BoundGraph(form, folder, SessionOptions(), self._arena, manifest.model)
        assert self._graph.gate is not None
        self._gate, self._probes = self._graph.gate, probes
        self._prefixes: list[dict[str, np.ndarray]] = []
        self._reference = [self._together(number, None) for number in range(len(probes))]

    def close(self) -> None:
        """Free the session."""
        self._graph.close()

    def cost_of_set(self, layers: Sequence[int]) -> float:
        """Mean KL divergence, nats, when always the same layers' blocks are skipped."""
        flags = np.ones(self._layers, bool)
        flags[list(layers)] = False
        skip = Skip(flags)
        costs = [
            kl_rows(self._together(number, skip), reference).mean()
            for number, reference in enumerate(self._reference)
        ]
        return float(np.mean(costs))

    def single(self, layers: range, report: Progress) -> dict[int, float]:
        """What each layer's block costs when only that one is skipped."""
        harm = {}
        for done, layer in enumerate(layers):
            harm[layer] = self.cost_of_set([layer])
            report("try skipping", done + 1, len(layers))
        return harm

    def grow(self, harm: dict[int, float], report: Progress) -> list[int]:
        """Layers in the order in which a set grows that stays as harmless as possible.

        Each time, the layers that cost least alone are tried together with those chosen before;
        from half of all layers on, the rest follows by what it costs alone.
        """
        left = sorted(harm, key=lambda layer: harm[layer])
        chosen: list[int] = []
        rounds = min(len(left), self._layers // 2)
        while len(chosen) < rounds:
            tried = left[:_CANDIDATES]
            costs = {layer: self.cost_of_set([*chosen, layer]) for layer in tried}
            best = min(costs, key=lambda layer: costs[layer])
            left.remove(best)
            chosen.append(best)
            report("order", len(chosen), rounds)
        return chosen + left

    def levels(
        self, cosine: np.ndarray, band: tuple[int, int], report: Progress
    ) -> list[tuple[SkipLevel, float]]:
        """Thresholds of the adaptive rule, with the mean KL divergence of each, nats.

        Ratios that the band cannot give are left out.
        """
        found = []
        for done, ratio in enumerate(RATIOS):
            run = _shortest_run(band, self._layers, ratio)
            if run:
                tau, cost = self._tune(cosine, band, ratio, run)
                found.append((SkipLevel(ratio, tau, run), cost))
            report("levels", done + 1, len(RATIOS))
        return found

    def adaptive(self, tau: float, run: int) -> tuple[float, float]:
        """Share of all blocks skipped, and mean KL divergence, row by row."""
        skip = Skip(np.ones(self._layers, bool), tau, run)
        ran, rows, costs = 0, 0, []
        for number, reference in enumerate(self._reference):
            probe = self._read(number)
            self._gate.set(skip)
            for i, token in enumerate(probe.rows):
                past = len(probe.prefix) + i
                logits = self._graph.run(np.array([token]), past, np.array([0]), past)
                costs.append(kl_rows(log_softmax(logits), reference[i : i + 1]).mean())
                ran += int(self._gate.ran)
                rows += 1
        return 1 - ran / (rows * self._layers), float(np.mean(costs))

    def _tune(
        self, cosine: np.ndarray, band: tuple[int, int], ratio: float, run: int
    ) -> tuple[float, float]:
        """A threshold that skips `ratio`, and what it costs.

        The cosines move once blocks are skipped, so the wish of the simulation is corrected by
        what really ran.
        """
        wish, best = ratio, (np.inf, 1.0, 0.0)
        for _ in range(_TRIES):
            tau = _threshold(cosine, band, wish, run)
            got, cost = self.adaptive(tau, run)
            best = min(best, (abs(got - ratio), tau, cost))
            if best[0] <= _CLOSE:
                break
            wish = min(max(wish + ratio - got, 0.0), 1.0)
        return best[1], best[2]

    def _read(self, number: int) -> Probe:
        """Bring the cache to the end of a probe's prefix, which is computed only once."""
        probe, count = self._probes[number], len(self._probes[number].prefix)
        if number < len(self._prefixes):
            for role, rows in self._prefixes[number].items():
                self._arena.arrays[role][:, :, :count] = rows
            return probe
        self._gate.set(None)
        self._graph.run(probe.prefix, 0, np.array([count - 1]), 0)
        arrays = self._arena.arrays.items()
        self._prefixes.append({role: array[:, :, :count].copy() for role, array in arrays})
        return probe

    def _together(self, number: int, skip: Skip | None) -> np.ndarray:
        """Log-probabilities float32 [R, V] of a probe's rows, run in one step."""
        probe = self._read(number)
        self._gate.set(skip)
        past, rows = len(probe.prefix), np.arange(len(probe.rows))
        return log_softmax(self._graph.run(probe.rows, past, rows, past))


def _probes(pieces: Sequence[np.ndarray]) -> list[Probe]:
    probes = []
    for piece in pieces:
        rows = min(_ROWS, len(piece) // 4)
        prefix = min(_PREFIX, len(piece) - rows)
        if rows:
            probes.append(Probe(piece[:prefix], piece[prefix : prefix + rows]))
    if not probes:
        raise OptionError("the text for calibrating what to skip is too short: it needs 4 tokens")
    return probes


def _shortest_run(band: tuple[int, int], layers: int, ratio: float) -> int:
    """The least run that skips `ratio` of all blocks if every check hits; 0 if none does."""
    width = band[1] - band[0]
    for run in range(1, width):
        if width - -(-width // (run + 1)) >= ratio * layers:
            return run
    return 0


def _threshold(cosine: np.ndarray, band: tuple[int, int], ratio: float, run: int) -> float:
    """The threshold at which the simulated rule skips a ratio."""
    low, high = -1.0, 1.0
    for _ in range(20):
        middle = (low + high) / 2
        if simulate(cosine, band, middle, run) > ratio:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def _profile(
    folder: Path, manifest: Manifest, probes: Sequence[Probe], report: Progress
) -> np.ndarray:
    """Cosines float32 [rows, layers] of the residual stream before and after each block."""
    chain, side = manifest.lowerings["cpu"], folder / _SIDE
    layers = manifest.model.layers
    arena, taken = KVArena(manifest.kv), []
    try:
        side.write_bytes(_profile_graph(folder / chain.graph))
        outputs = chain.outputs | {"features": TensorSpec("cosines", "float32", (1, "S", layers))}
        form = dataclasses.replace(chain, graph=_SIDE, outputs=outputs)
        graph = BoundGraph(form, folder, SessionOptions(), arena, manifest.model)
        for done, probe in enumerate(probes):
            ids = np.concatenate([probe.prefix, probe.rows])
            # The last layer computes only rows that are asked for.
            graph.run(ids, 0, np.arange(len(ids)), 0)
            taken.append(graph.features[len(probe.prefix) :].copy())  # pyright: ignore
            report("cosines", done + 1, len(probes))
        graph.close()
    finally:
        side.unlink(missing_ok=True)
    return np.concatenate(taken)


def _profile_graph(path: Path) -> bytes:
    """The graph with one more output: the cosine at each block, float32 [1, S, layers]."""
    model = onnx.load(str(path), load_external_data=False)
    graph, found = model.graph, []
    graph.initializer.append(numpy_helper.from_array(np.array([-1], np.int64), "profile.axis"))
    after = [n for n in graph.node if n.op_type == "SkipSimplifiedLayerNormalization"][1::2]
    for layer, block in enumerate(find_blocks(graph)):
        pair = (block.stream, after[layer].output[3])
        graph.node.extend(_cosine(*pair, f"profile.{layer}"))
        found.append(f"profile.{layer}")
    graph.node.append(helper.make_node("Concat", found, ["cosines"], axis=-1))
    graph.output.append(helper.make_tensor_value_info("cosines", 1, [1, None, len(found)]))
    return model.SerializeToString()


def _cosine(a: str, b: str, name: str) -> list[onnx.NodeProto]:
    """Nodes of the cosine [1, S, 1] of two streams [1, S, D]."""
    add = helper.make_node
    return [
        add("LpNormalization", [a], [f"{name}.a"], axis=-1, p=2),
        add("LpNormalization", [b], [f"{name}.b"], axis=-1, p=2),
        add("Mul", [f"{name}.a", f"{name}.b"], [f"{name}.ab"]),
        add("ReduceSum", [f"{name}.ab", "profile.axis"], [name], keepdims=1),
    ]
