"""The manifest: all that the runtime knows about a model, and the checks on a bundle's files.

A bundle is a folder with `manifest.json`, graphs, weights as ONNX external data, tokenizer files,
licence and model card. Files are hashed once after they were written; afterwards size and
modification time are trusted (`seal` and `Manifest.check_files`).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from forerun.errors import BundleError
from forerun.runtime.layouts import check_layouts
from forerun.runtime.manifest_checks import check_numbers
from forerun.runtime.strict import decode

FORMAT_VERSION = 1
MANIFEST_NAME = "manifest.json"
MAX_MANIFEST_BYTES = 4 << 20
_SEAL_NAME = ".verified.json"


@dataclass(frozen=True)
class TensorSpec:
    """One graph input or output: name, numpy dtype name, shape (ints, or names of free axes)."""

    name: str
    dtype: str
    shape: tuple[Any, ...]


@dataclass(frozen=True)
class KVLayout:
    """The KV cache of one stream: keys and values of `layers` layers.

    A dense one has a pair of arrays [1, heads, capacity, head_dim] a layer; those of a form of
    GEAR are told by `forerun.runtime.gear.layout.PartLayout`.

    Attributes:
        dtype: of the arrays; codes of 4 bits are packed two a byte, so `head_dim` is halved.
        bits: of a value.
        group: tokens that share scales, 0 for scales that are part of the graph.
        kind: ``dense``, which the attention operator reads itself, or a form of GEAR.
        rank: of the factors that a form of GEAR keeps of the rounding errors.
        outliers: share of the values that it keeps exactly.
        buffer: newest tokens that it keeps in float32.
        overhead: bytes a cached token takes beyond its codes.
    """

    layers: int
    heads: int
    head_dim: int
    capacity: int
    dtype: str = "float32"
    bits: int = 32
    group: int = 0
    kind: str = "dense"
    rank: int = 0
    outliers: float = 0.0
    buffer: int = 0
    overhead: int = 0

    @property
    def nbytes(self) -> int:
        """Bytes of all keys and values at full capacity."""
        return self.nbytes_per_token * self.capacity

    @property
    def nbytes_per_token(self) -> int:
        """Bytes one cached token takes."""
        codes = 2 * self.layers * self.heads * self.head_dim * self.bits // 8
        return codes + self.overhead


@dataclass(frozen=True)
class Lowering:
    """One form of the graph for one family of devices.

    Roles of inputs: `ids` int64 [1, S], `positions` int64 [1, S], `seqlens` int32 [1] (T - 1),
    `total` int32 [] (T), `rows` int64 [R] (rows that want logits), `past_key.N`, `past_value.N`,
    in lowerings for trees `bias` float32 [1, 1, S, T], and in those that can skip feed-forward
    blocks `ffn_flags`, `skip_tau` and `skip_run`, with the output `ffn_ran` (see
    `forerun.runtime.skipping.FfnGate`). Lowerings for a cache in GEAR's form, and for devices with
    static shapes, have others in the place of some of them. Roles of outputs: `logits` float32
    [1, R, V], `hidden` float32 [1, R, D] (optional), `present_key.N`, `present_value.N`, which
    are bound to the same memory as the inputs of the same number.
    """

    graph: str
    inputs: dict[str, TensorSpec]
    outputs: dict[str, TensorSpec]
    query_widths: tuple[int, ...] = ()


@dataclass(frozen=True)
class ModelSizes:
    """Sizes of the model; `context` is the longest sequence it was trained for."""

    vocab: int
    hidden: int
    layers: int
    context: int
    parameters: int


@dataclass(frozen=True)
class Source:
    """Where the weights came from, and under which terms."""

    origin: str
    licence: str
    sha256: str = ""


@dataclass(frozen=True)
class Quantization:
    """How the weights are stored, e.g. method ``int4`` with blocks of 32."""

    method: str = "none"
    bits: int = 32
    block: int = 0
    detail: str = ""


@dataclass(frozen=True)
class TokenizerInfo:
    """The tokenizer file, its hash, and the ids that begin and end texts."""

    file: str
    sha256: str
    bos: int | None = None
    eos: tuple[int, ...] = ()
    add_bos: bool = False
    chat_template: str | None = None


@dataclass(frozen=True)
class FileEntry:
    """Size and SHA-256 of one file of the bundle."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class SkipLevel:
    """Thresholds that skip about `ratio` of the feed-forward blocks, see `Skipping`."""

    ratio: float
    tau: float
    run: int


@dataclass(frozen=True)
class Skipping:
    """What calibration found about skipping feed-forward blocks (FFN-SkipLLM, Jaiswal 2024).

    Attributes:
        first: first layer whose block may be skipped.
        stop: the layer after the last such one.
        cosine: per layer, between the residual stream before and after its block, mean.
        order: layers from `first` to `stop`, in the order in which a static set grows.
        levels: of the adaptive rule: once a cosine reaches `tau`, the next `run` are skipped.
        warmup: tokens of an answer that run in full before.
        default: the ratio that is used when nothing is said; 0 skips nothing.
    """

    first: int
    stop: int
    cosine: tuple[float, ...]
    order: tuple[int, ...]
    levels: tuple[SkipLevel, ...]
    warmup: int = 0
    default: float = 0.0


@dataclass(frozen=True)
class Rotary:
    """How keys are rotated: channels i and i + head_dim / 2 of a head by position * frequency.

    Attributes:
        frequencies: the different lists there are, each of head_dim / 2 radians a position.
        layers: which of them each layer uses.
    """

    frequencies: tuple[tuple[float, ...], ...]
    layers: tuple[int, ...]


@dataclass(frozen=True)
class Check:
    """What the exporter or the quantizer measured before it let the bundle out."""

    against: str
    metric: str
    value: float
    bound: float


@dataclass(frozen=True)
class Manifest:
    """The contract between `export`, `quant` and `runtime`.

    Attributes:
        taps: numbers of layers whose output the graph gives as `features`.
        row_exact: row i of a chain step of several rows is bit-equal to a step of that row alone,
            on the CPU, so that verifying drafts cannot change the text.
        recipe: revision of how exporter and quantizer made it; 0 if none was recorded.
        kv_layouts: further layouts of the KV cache, for which there are lowerings ``cpu+NAME``.
        skipping: how feed-forward blocks can be skipped, if the graph can.
        rotary: the rotation of the keys, for caches that move them; None was not recorded.
    """

    format_version: int
    kind: str
    name: str
    source: Source
    model: ModelSizes
    kv: KVLayout
    lowerings: dict[str, Lowering]
    tokenizer: TokenizerInfo
    quantization: Quantization = Quantization()
    generation: dict[str, float] = field(default_factory=dict)
    taps: tuple[int, ...] = ()
    row_exact: bool = False
    recipe: int = 0
    kv_layouts: dict[str, KVLayout] = field(default_factory=dict)
    skipping: Skipping | None = None
    rotary: Rotary | None = None
    checks: tuple[Check, ...] = ()
    files: dict[str, FileEntry] = field(default_factory=dict)

    def to_json(self) -> str:
        """Return the text of `manifest.json`."""
        return json.dumps(dataclasses.asdict(self), indent=1) + "\n"

    def check_files(self, folder: Path, full: bool = False) -> None:
        """Compare every file with its size and hash.

        Args:
            folder: the bundle.
            full: hash again even if size and modification time are those of the last check.

        Raises:
            BundleError: a file is missing, has another size or another hash.
        """
        seal = {} if full else _read_seal(folder)
        changed = False
        for name, entry in self.files.items():
            path = inside(folder, name)
            try:
                stat = path.stat()
            except OSError:
                raise BundleError(f"{folder}: {name} is missing; pull or export it again") from None
            if stat.st_size != entry.bytes:
                raise BundleError(
                    f"{folder}: {name} has {stat.st_size} bytes instead of {entry.bytes}; "
                    "pull or export it again"
                )
            mark = [stat.st_size, stat.st_mtime_ns, entry.sha256]
            if seal.get(name) == mark:
                continue
            if file_sha256(path) != entry.sha256:
                raise BundleError(f"{folder}: {name} has another SHA-256; pull or export it again")
            seal[name], changed = mark, True
        if changed:
            _write_seal(folder, seal)


def load_manifest(folder: Path) -> Manifest:
    """Read and check `manifest.json`; file contents are checked by `Manifest.check_files`.

    Raises:
        BundleError: there is none, it is not valid, or it is of another version.
    """
    path = Path(folder) / MANIFEST_NAME
    try:
        if path.stat().st_size > MAX_MANIFEST_BYTES:
            raise BundleError(f"{path} is over {MAX_MANIFEST_BYTES >> 20} MiB; not a manifest")
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError:
        raise BundleError(f"{folder} is not a bundle: it has no {MANIFEST_NAME}") from None
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{path} is not valid JSON ({error})") from None
    version = data.get("format_version") if isinstance(data, dict) else None
    if version != FORMAT_VERSION:
        raise BundleError(
            f"{path} has format version {version!r}, this forerun reads {FORMAT_VERSION}; "
            "export the model again"
        )
    manifest = decode(Manifest, data)
    _check_consistent(manifest, Path(folder))
    return manifest


def inside(folder: Path, name: str) -> Path:
    """Return `folder/name`, refusing names that leave the folder.

    Raises:
        BundleError: the name is absolute, holds ``..`` or leads outside through a link.
    """
    pure = PurePosixPath(name)
    if not name or pure.is_absolute() or ".." in pure.parts or "\\" in name or ":" in name:
        raise BundleError(f"the path {name!r} leaves the bundle; only files inside it are allowed")
    path = Path(folder) / name
    if not path.resolve().is_relative_to(Path(folder).resolve()):
        raise BundleError(f"the path {name!r} leaves the bundle through a link")
    return path


def file_sha256(path: Path) -> str:
    """SHA-256 of a file as 64 hex digits."""
    with open(path, "rb") as stream:
        digest = hashlib.sha256()
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def seal(folder: Path, manifest: Manifest) -> Manifest:
    """Hash every file of a finished folder, write `manifest.json`, return the complete manifest."""
    names = sorted(
        str(p.relative_to(folder).as_posix())
        for p in folder.rglob("*")
        if p.is_file() and p.name not in (MANIFEST_NAME, _SEAL_NAME)
    )
    files = {n: FileEntry((folder / n).stat().st_size, file_sha256(folder / n)) for n in names}
    manifest = dataclasses.replace(manifest, files=files)
    (folder / MANIFEST_NAME).write_text(manifest.to_json(), encoding="utf-8")
    marks = {}
    for name, entry in files.items():
        stat = (folder / name).stat()
        marks[name] = [stat.st_size, stat.st_mtime_ns, entry.sha256]
    _write_seal(folder, marks)
    return manifest


def _check_consistent(manifest: Manifest, folder: Path) -> None:
    check_numbers(manifest)
    if not manifest.lowerings:
        raise BundleError("manifest: no lowering is listed, so nothing can run")
    wanted = [manifest.tokenizer.file, *(low.graph for low in manifest.lowerings.values())]
    if manifest.tokenizer.chat_template:
        wanted.append(manifest.tokenizer.chat_template)
    for name in wanted:
        inside(folder, name)
        if name not in manifest.files:
            raise BundleError(f"manifest: {name} is used but not listed under files")
    for name in manifest.files:
        inside(folder, name)
    check_layouts(manifest)


def _read_seal(folder: Path) -> dict[str, list[Any]]:
    try:
        data = json.loads((folder / _SEAL_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return data if isinstance(data, dict) else {}


def _write_seal(folder: Path, marks: dict[str, list[Any]]) -> None:
    temporary = folder / f"{_SEAL_NAME}.{os.getpid()}"
    try:
        temporary.write_text(json.dumps(marks), encoding="utf-8")
        temporary.replace(folder / _SEAL_NAME)
    except OSError:
        # A read-only folder can still be used; it is then hashed at every load.
        temporary.unlink(missing_ok=True)
