"""Writing a drafter to the side and renaming it into place."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from forerun.errors import OptionError
from forerun.export.bundle import folder_aside
from forerun.runtime.drafting.folder import DRAFTER_NAME


@contextlib.contextmanager
def drafter_folder(out: Path) -> Iterator[Path]:
    """Yield an empty temporary folder that becomes `out` if the block succeeds.

    An existing `out` is replaced only if it is empty or a drafter.

    Raises:
        OptionError: `out` exists and is something else.
    """
    out = Path(out).absolute()
    check_place(out)
    with folder_aside(out) as temporary:
        yield temporary


def check_place(out: Path) -> None:
    """Refuse a folder that must not be replaced.

    Raises:
        OptionError: it exists and is no drafter.
    """
    taken = out.exists() and any(out.iterdir() if out.is_dir() else [out])
    if taken and not (out / DRAFTER_NAME).is_file():
        raise OptionError(f"{out} exists and is not a drafter; choose another folder")
