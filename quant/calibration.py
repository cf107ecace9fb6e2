"""What a model computes on built-in text: moments of inputs, KV caches, logits."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx
import onnxruntime as ort

from forerun.devices.threads import default_threads
from forerun.quant.corpus import corpus_pieces
from forerun.runtime.arena import KVArena

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator

    from forerun.runtime.manifest import Manifest

_CONTEXT = 512
_TOKENS = 4096
_PRODUCTS = ("MatMul", "FusedMatMul")
_FOLDER_KEY = "session.model_external_initializers_file_folder_path"


def input_moments(
    model: onnx.ModelProto,
    manifest: Manifest,
    bundle: Path,
    pieces: list[np.ndarray],
    progress: Callable[[str, int, int | None], None] | None = None,
    only: Collection[str] | None = None,
) -> dict[str, np.ndarray]:
    """Run text through the model and sum up x x^T of the inputs x of matrix products.

    Args:
        model: the float32 graph, its external weights not loaded; it is not changed.
        manifest: of the bundle.
        bundle: where the weights are.
        pieces: token ids, each int64 [T], read from an empty cache.
        progress: called with (stage, done, total).
        only: names of the weights that matter; None for all.

    Returns:
        Name of the weight to float32 [K, K]; weights that no product reads are left out.
    """
    initializers = {t.name for t in model.graph.initializer if only is None or t.name in only}
    watched = {
        node.input[1]: node.input[0]
        for node in model.graph.node
        if node.op_type in _PRODUCTS and node.input[1] in initializers
    }
    names = sorted(set(watched.values()))
    if not names:
        return {}
    session = _open(model, names, bundle)
    arena = KVArena(manifest.kv)
    moments: dict[str, np.ndarray] = {}
    for done, ids in enumerate(pieces):
        values = _run(session, arena, manifest, ids, names)
        for name, x in zip(names, values, strict=True):
            rows = x.reshape(-1, x.shape[-1])
            moments[name] = moments.get(name, 0) + rows.T @ rows
        if progress:
            progress("calibrate", done + 1, len(pieces))
    return {weight: moments[name] for weight, name in watched.items()}


def read_caches(
    model: onnx.ModelProto,
    manifest: Manifest,
    bundle: Path,
    pieces: list[np.ndarray],
    progress: Callable[[str, int, int | None], None] | None = None,
) -> Iterator[dict[str, np.ndarray]]:
    """Run text through the model and give what each piece leaves in the KV cache.

    Args:
        model: a graph with a float32 KV cache, its external weights not loaded; it is not changed.
        manifest: of the bundle.
        bundle: where the weights are.
        pieces: token ids, each int64 [T], read from an empty cache.
        progress: called with (stage, done, total).

    Yields:
        ``key.N`` and ``value.N`` to float32 [heads, T, head_dim], rotated; valid until the next.
    """
    arena = KVArena(manifest.kv)
    session = _open(model, [], bundle)
    for done, ids in enumerate(pieces):
        _run(session, arena, manifest, ids, ["logits"])
        yield {role: array[0, :, : len(ids)] for role, array in arena.arrays.items()}
        if progress:
            progress("calibrate KV", done + 1, len(pieces))


def read_logits(
    model: onnx.ModelProto,
    manifest: Manifest,
    bundle: Path,
    pieces: list[np.ndarray],
    replaced: dict[str, np.ndarray] | None = None,
) -> Iterator[np.ndarray]:
    """Run text through the model with some of its weights replaced.

    Args:
        model: a graph with a float32 KV cache, its external weights not loaded; it is not changed.
        manifest: of the bundle.
        bundle: where the weights are.
        pieces: token ids, each int64 [T], read from an empty cache.
        replaced: name of an initializer in the weights file to its new value.

    Yields:
        Logits float32 [T, V].
    """
    values = {
        name: ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(value, np.float32))
        for name, value in (replaced or {}).items()
    }
    session = _open(model, [], bundle, values)
    arena = KVArena(manifest.kv)
    for ids in pieces:
        yield _run(session, arena, manifest, ids, ["logits"])[0][0]


def _open(
    model: onnx.ModelProto,
    names: list[str],
    bundle: Path,
    replaced: dict[str, ort.OrtValue] | None = None,
) -> ort.InferenceSession:
    watched = onnx.ModelProto()
    watched.CopyFrom(model)
    for name in names:
        watched.graph.output.append(onnx.ValueInfoProto(name=name))
    options = ort.SessionOptions()
    options.intra_op_num_threads = default_threads()
    options.log_severity_level = 3
    options.add_session_config_entry(_FOLDER_KEY, str(bundle.resolve()))
    if replaced:
        options.add_external_initializers(list(replaced), list(replaced.values()))
    return ort.InferenceSession(
        watched.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def _run(
    session: ort.InferenceSession,
    arena: KVArena,
    manifest: Manifest,
    ids: np.ndarray,
    names: list[str],
) -> list[np.ndarray]:
    form, count = manifest.lowerings["cpu"], len(ids)
    binding = session.io_binding()
    for role, array in arena.arrays.items():
        value = ort.OrtValue.ortvalue_from_numpy(array)
        binding.bind_ortvalue_input(form.inputs[f"past_{role}"].name, value)
        binding.bind_ortvalue_output(form.outputs[f"present_{role}"].name, value)
    feeds = {
        "ids": ids[None],
        "positions": np.arange(count, dtype=np.int64)[None],
        "seqlens": np.array([count - 1], np.int32),
        "total": np.array(count, np.int32),
        # Every row, since the last layer computes only the rows that are asked for.
        "rows": np.arange(count, dtype=np.int64),
    }
    # A graph that can skip feed-forward blocks skips none.
    rest = {
        "ffn_flags": np.ones(manifest.model.layers, bool),
        "skip_tau": np.array(2, np.float32),
        "skip_run": np.array(0, np.int32),
    }
    feeds |= {role: value for role, value in rest.items() if role in form.inputs}
    for role, value in feeds.items():
        binding.bind_cpu_input(form.inputs[role].name, value)
    for name in names:
        binding.bind_output(name)
    session.run_with_iobinding(binding)
    outputs = binding.get_outputs()
    return [value.numpy() for value in outputs[-len(names) :]]


def calibration_pieces(manifest: Manifest, bundle: Path) -> list[np.ndarray]:
    """Pieces of the built-in text from its end; the measurements read it from its beginning."""
    context = min(_CONTEXT, manifest.kv.capacity)
    return corpus_pieces(manifest, bundle, context, _TOKENS, from_end=True)
