"""Folders of drafters: `drafter.json`, read strictly and compared with the target.

A drafter that was trained for a target lies beside its bundles, in ``models/NAME/drafters/KIND``.
A draft model is a bundle of its own in that folder, to which `drafter.json` adds for which target
it was made and which of the target's ids its own ids are.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from forerun.errors import BundleError, UnsupportedError
from forerun.runtime.drafting.vocab import VocabMap, identity
from forerun.runtime.manifest import (
    MANIFEST_NAME,
    MAX_MANIFEST_BYTES,
    Check,
    FileEntry,
    Lowering,
    Source,
    file_sha256,
    inside,
    load_manifest,
)
from forerun.runtime.strict import decode

if TYPE_CHECKING:
    from forerun.runtime.manifest import Manifest

DRAFTER_NAME = "drafter.json"
FORMAT_VERSION = 1
KINDS = ("head", "model")


@dataclass(frozen=True)
class TargetInfo:
    """The model a drafter was made for.

    Attributes:
        name: of the model.
        tokenizer_sha256: of its tokenizer file.
        vocab: number of its ids.
        hidden: width of its hidden states.
        taps: layers whose output the drafter reads; none for a draft model.
    """

    name: str
    tokenizer_sha256: str
    vocab: int
    hidden: int
    taps: tuple[int, ...] = ()


@dataclass(frozen=True)
class VocabInfo:
    """The drafter's ids.

    Attributes:
        file: int32, little-endian: the target's id of each of the drafter's.
        size: how many there are.
        unknown: the drafter's id for all other tokens, at most `size`.
    """

    file: str
    size: int
    unknown: int


@dataclass(frozen=True)
class DrafterInfo:
    """What `drafter.json` says.

    Attributes:
        kind: one of `KINDS`.
        graphs: the head's graphs by name, each with its roles; a draft model's stand in its
            manifest.
        training: how it came about, in numbers.
    """

    format_version: int
    kind: str
    name: str
    target: TargetInfo
    vocab: VocabInfo | None = None
    source: Source | None = None
    graphs: dict[str, Lowering] = field(default_factory=dict)
    training: dict[str, float] = field(default_factory=dict)
    checks: tuple[Check, ...] = ()
    files: dict[str, FileEntry] = field(default_factory=dict)


def load_info(folder: Path) -> DrafterInfo:
    """Read and check `drafter.json`; what it lists is checked by `check_files`.

    Raises:
        BundleError: there is none, it is not valid, or it is of another version.
    """
    path = Path(folder) / DRAFTER_NAME
    data = _read_json(path)
    version = data.get("format_version") if isinstance(data, dict) else None
    if version != FORMAT_VERSION:
        raise BundleError(
            f"{path} has format version {version!r}, this forerun reads {FORMAT_VERSION}; "
            "train or pull the drafter again"
        )
    info = decode(DrafterInfo, data, "drafter")
    _check_consistent(info, Path(folder))
    return info


def check_files(info: DrafterInfo, folder: Path) -> None:
    """Compare every file with its size and hash.

    Raises:
        BundleError: one is missing or has another size or hash.
    """
    for name, entry in info.files.items():
        path = inside(folder, name)
        try:
            size = path.stat().st_size
        except OSError:
            raise BundleError(f"{folder}: {name} is missing; train or pull it again") from None
        if size != entry.bytes:
            raise BundleError(
                f"{folder}: {name} has {size} bytes instead of {entry.bytes}; "
                "train or pull it again"
            )
        if file_sha256(path) != entry.sha256:
            raise BundleError(f"{folder}: {name} has another SHA-256; train or pull it again")


def check_target(info: DrafterInfo, target: Manifest) -> None:
    """Refuse a drafter that was made for another model.

    Raises:
        UnsupportedError: tokenizer, vocabulary, width or taps differ; names the difference.
    """
    made = info.target
    pairs = [
        ("tokenizer", made.tokenizer_sha256[:12], target.tokenizer.sha256[:12]),
        ("vocabulary", made.vocab, target.model.vocab),
    ]
    if info.kind == "head":
        pairs.append(("width", made.hidden, target.model.hidden))
    for what, has, wanted in pairs:
        if has != wanted:
            raise UnsupportedError(
                f"the drafter {info.name} was made for {made.name}, whose {what} is {has}; "
                f"{target.name} has {wanted}: take a drafter that was trained for it"
            )
    if info.kind == "head" and made.taps != target.taps:
        given = ", ".join(map(str, target.taps)) or "none"
        raise UnsupportedError(
            f"the drafter {info.name} reads the hidden states of layers "
            f"{', '.join(map(str, made.taps))}, this bundle of {target.name} gives {given}; "
            "export or pull the model again"
        )


def read_vocab(info: DrafterInfo, folder: Path) -> VocabMap:
    """The drafter's ids.

    Raises:
        BundleError: the file does not hold what `drafter.json` says, or ids that are not there.
    """
    if info.vocab is None:
        return identity(info.target.vocab)
    ids = np.fromfile(inside(folder, info.vocab.file), "<i4")
    return VocabMap(ids, info.target.vocab, info.vocab.unknown)


def load_draft_model(folder: Path, target: Manifest) -> tuple[Manifest, VocabMap]:
    """Check the bundle of a draft model against the target.

    Args:
        folder: any text bundle with the target's tokenizer, or one with a `drafter.json` that
            maps its ids.
        target: the model that will confirm.

    Raises:
        BundleError: bundle or `drafter.json` is damaged, or they contradict each other.
        UnsupportedError: it has other ids than the target; names the difference.
    """
    manifest = load_manifest(folder)
    if not (folder / DRAFTER_NAME).is_file():
        _check_same_ids(manifest, target)
        manifest.check_files(folder)
        return manifest, identity(target.model.vocab)
    info = load_info(folder)
    if info.kind != "model":
        raise BundleError(f"{folder}: drafter.json is of a {info.kind}, yet there is a manifest")
    check_target(info, target)
    check_files(info, folder)
    manifest.check_files(folder)
    vocab = read_vocab(info, folder)
    inputs = max(len(vocab), (info.vocab.unknown if info.vocab else 0) + 1)
    if manifest.model.vocab < inputs:
        raise BundleError(
            f"{folder}: drafter.json needs {inputs} ids, the model has {manifest.model.vocab}; "
            "train or pull it again"
        )
    return manifest, vocab


def folder_kind(folder: Path) -> str | None:
    """Which kind of drafter a folder holds; None if it holds none.

    Raises:
        BundleError: its `drafter.json` is damaged.
    """
    if (folder / DRAFTER_NAME).is_file():
        return load_info(folder).kind
    return "model" if (folder / MANIFEST_NAME).is_file() else None


def _check_same_ids(manifest: Manifest, target: Manifest) -> None:
    for what, has, wanted in (
        ("tokenizer", manifest.tokenizer.sha256[:12], target.tokenizer.sha256[:12]),
        ("vocabulary", manifest.model.vocab, target.model.vocab),
    ):
        if has != wanted:
            raise UnsupportedError(
                f"the {what} of {manifest.name} is {has}, that of {target.name} is {wanted}; "
                f"a draft model needs the same ids, or a {DRAFTER_NAME} that maps them"
            )


def _read_json(path: Path) -> Any:
    try:
        if path.stat().st_size > MAX_MANIFEST_BYTES:
            raise BundleError(f"{path} is over {MAX_MANIFEST_BYTES >> 20} MiB; not a drafter")
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError:
        raise BundleError(f"{path.parent} holds no drafter: it has no {DRAFTER_NAME}") from None
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{path} is not valid JSON ({error})") from None


def _check_consistent(info: DrafterInfo, folder: Path) -> None:
    if info.kind not in KINDS:
        raise BundleError(f"drafter.kind must be {' or '.join(KINDS)}, got {info.kind!r}")
    sizes = (info.target.vocab, info.target.hidden, info.vocab.size if info.vocab else 1)
    if min(sizes) < 1 or max(sizes) > 1 << 24 or len(info.target.taps) > 64:
        raise BundleError("drafter: sizes must be positive and within reason")
    if any(tap < 0 for tap in info.target.taps):
        raise BundleError(f"drafter.target.taps must be layers, got {info.target.taps}")
    wanted = [form.graph for form in info.graphs.values()]
    for name in info.files:
        inside(folder, name)
    if info.vocab is not None:
        wanted.append(info.vocab.file)
    for name in wanted:
        inside(folder, name)
        if name not in info.files:
            raise BundleError(f"drafter: {name} is used but not listed under files")
    if info.vocab is not None and info.files[info.vocab.file].bytes != 4 * info.vocab.size:
        raise BundleError(
            f"drafter: {info.vocab.file} must have {4 * info.vocab.size} bytes for "
            f"{info.vocab.size} ids, not {info.files[info.vocab.file].bytes}"
        )
