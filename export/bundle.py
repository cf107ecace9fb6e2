"""Writing bundles to the side and renaming them into place."""

from __future__ import annotations

import contextlib
import errno
import glob
import os
import platform
import re
import shutil
import tempfile
import zlib
from pathlib import Path
from typing import TYPE_CHECKING

from forerun.errors import OptionError, SpaceError

if TYPE_CHECKING:
    from collections.abc import Iterator


# A process of another machine or container has a number that says nothing here.
_MACHINE = f"{zlib.crc32(platform.node().encode()):08x}"
_OLD = "old"


@contextlib.contextmanager
def new_bundle(out: Path) -> Iterator[Path]:
    """Yield an empty temporary folder that becomes `out` if the block succeeds.

    The folder lies beside `out`, so that the rename is atomic; after an error, also Ctrl-C,
    nothing is left of it. An existing `out` is replaced only if it is a bundle.

    Raises:
        OptionError: `out` exists and is something else than a bundle.
        SpaceError: the disk is full.
    """
    out = Path(out).absolute()
    taken = out.exists() and any(out.iterdir() if out.is_dir() else [out])
    if taken and not (out / "manifest.json").is_file():
        raise OptionError(f"{out} exists and is not a bundle; choose another folder")
    try:
        with contextlib.ExitStack() as stack:
            try:
                temporary = stack.enter_context(folder_aside(out))
            except OSError as error:
                raise _space_or_option(error, out) from error
            yield temporary
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise _space_or_option(error, out) from error
        raise


@contextlib.contextmanager
def folder_aside(out: Path) -> Iterator[Path]:
    """Yield an empty temporary folder beside `out` that takes its place if the block succeeds.

    After an error, also Ctrl-C, nothing is left of it, and `out` is what it was. What processes
    left that were killed is removed by the next one.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    _clean(out)
    prefix = f".{out.name}.{_MACHINE}-{os.getpid()}."
    temporary = Path(tempfile.mkdtemp(prefix=prefix, dir=out.parent))
    try:
        yield temporary
        old = out.with_name(f"{prefix}{_OLD}")
        replace_folder(temporary, out, old)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def require_space(folder: Path, needed: int, what: str) -> None:
    """Refuse work for which the disk has no room.

    Raises:
        SpaceError: fewer than `needed` bytes are free where `folder` lies.
    """
    place = Path(folder).absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < needed:
        raise SpaceError(
            f"{what} needs {needed >> 20} MiB on the disk of {place}, {free >> 20} MiB are free"
        )


def replace_folder(new: Path, out: Path, old: Path) -> None:
    """Rename a folder to `out`, and what was there, if anything, to `old`.

    After an error, also Ctrl-C, `out` is what it was.
    """
    try:
        if os.path.lexists(out):
            out.rename(old)
        new.rename(out)
    except BaseException:
        if os.path.lexists(old) and not os.path.lexists(out):
            old.rename(out)
        raise


def _clean(out: Path) -> None:
    """Remove what killed processes left beside `out`, and undo a replacement that was cut short."""
    name = re.compile(rf"\.{re.escape(out.name)}\.{_MACHINE}-(\d+)\.({_OLD}|[a-z0-9_]+)")
    for path in sorted(out.parent.glob(f".{glob.escape(out.name)}.*")):
        match = name.fullmatch(path.name)
        if not match or _lives(int(match.group(1))):
            continue
        if match.group(2) == _OLD and not os.path.lexists(out):
            path.rename(out)
        else:
            shutil.rmtree(path, ignore_errors=True)


def _lives(pid: int) -> bool:
    """Whether a process runs; on Windows, where asking would end it, all are taken to."""
    if os.name == "nt":  # pragma: no cover
        return True
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def _space_or_option(error: OSError, out: Path) -> Exception:
    if error.errno == errno.ENOSPC:
        return SpaceError(f"the disk of {out.parent} is full; nothing was written")
    return OptionError(f"{out} cannot be written ({error.strerror}); choose another folder")
