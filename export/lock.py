"""A lock between processes that the system releases when its holder dies."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

if os.name == "nt":  # pragma: no cover
    import msvcrt

    def _lock(stream: IO[bytes]) -> None:
        msvcrt.locking(stream.fileno(), msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]

else:
    import fcntl

    def _lock(stream: IO[bytes]) -> None:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)


_POLL_S = 0.2


@contextlib.contextmanager
def locked(path: Path, waiting: Callable[[], None] | None = None) -> Iterator[None]:
    """Hold the lock of a file; the file itself stays, it is never deleted.

    Args:
        path: the lock file, made when it is missing.
        waiting: called once if another process holds the lock.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab") as stream:
        while True:
            try:
                _lock(stream)
                break
            except OSError as error:
                if not isinstance(error, BlockingIOError | PermissionError):
                    raise
            if waiting:
                waiting()
                waiting = None
            time.sleep(_POLL_S)
        yield


@contextlib.contextmanager
def try_locked(path: Path) -> Iterator[bool]:
    """Hold the lock of a file if nobody else does; yields whether it is held."""
    with open(path, "ab") as stream:
        try:
            _lock(stream)
        except OSError:
            yield False
        else:
            yield True
