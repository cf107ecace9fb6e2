"""Writing bundles to the side and renaming them into place."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from forerun.errors import OptionError, SpaceError

if TYPE_CHECKING:
    from collections.abc import Iterator


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

    After an error, also Ctrl-C, nothing is left of it, and `out` is what it was.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}.{os.getpid()}.", dir=out.parent))
    try:
        yield temporary
        old = out.with_name(f".{out.name}.{os.getpid()}.old")
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


def _space_or_option(error: OSError, out: Path) -> Exception:
    if error.errno == errno.ENOSPC:
        return SpaceError(f"the disk of {out.parent} is full; nothing was written")
    return OptionError(f"{out} cannot be written ({error.strerror}); choose another folder")
