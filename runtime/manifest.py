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
    """The KV cache of one stream: `layers` pairs of arrays [1, heads, capacity, head_dim]."""

    layers: int
    heads: int
    head_dim: int
    capacity: int
    dtype: str = "float32"
    bits: int = 32
    group: int = 0

    @property
    def nbytes(self) -> int:
        """Bytes of all keys and values at full capacity."""
        return 2 * self.layers * self.heads * self.head_dim * self.capacity * self.bits // 8

    @property
    def nbytes_per_token(self) -> int:
        """Bytes one cached token takes."""
        return self.nbytes // self.capacity


@dataclass(frozen=True)
class Lowering:
    """One form of the graph for one family of devices.

    Roles of inputs: `ids` int64 [1, S], `positions` int64 [1, S], `seqlens` int32 [1] (T - 1),
    `total` int32 [] (T), `rows` int64 [R] (rows that want logits), `past_key.N`, `past_value.N`,
    and in lowerings for trees `bias` float32 [1, 1, S, T]. Roles of outputs: `logits` float32
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
    kv, sizes = manifest.kv, manifest.model
    numbers = (kv.heads, kv.head_dim, kv.capacity, kv.layers, sizes.vocab, sizes.hidden)
    if min(*numbers, sizes.layers, sizes.context) < 1 or kv.layers > 4096 or kv.capacity > 1 << 24:
        raise BundleError("manifest: sizes must be positive and within reason")
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
