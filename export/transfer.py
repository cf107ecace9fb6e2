"""Moving bytes to disk: resumable download, copies that are hashed on the way."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import http.client
import os
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from forerun.errors import DownloadError, OptionError, SpaceError

CHUNK = 1 << 20
ATTEMPTS = 4
TIMEOUT_S = 60.0
_FULL = (errno.ENOSPC, errno.EDQUOT)
_FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST)
Count = Callable[[int, "int | None"], None]


@contextlib.contextmanager
def space_errors(folder: Path) -> Iterator[None]:
    """Turn "no space left" into a `SpaceError`, and "may not write" into an `OptionError`."""
    try:
        yield
    except OSError as error:
        if is_full(error):
            raise SpaceError(
                f"the disk of {folder} is full; nothing was kept, free some space and run it again"
            ) from error
        if error.errno in _FORBIDDEN:
            raise OptionError(
                f"{folder} cannot be written ({error.strerror}); set FORERUN_HOME to another folder"
            ) from error
        raise


def is_full(error: OSError) -> bool:
    """Whether an error means that no space is left."""
    # numpy's tofile gives no error number: "884736 requested and 672768 written".
    return error.errno in _FULL or (error.errno is None and " requested and " in str(error))


def raise_if_full(error: BaseException | None) -> None:
    """Raise the "no space left" that a library may have wrapped into an error of its own."""
    while error is not None:
        if isinstance(error, OSError) and is_full(error):
            raise error
        error = error.__cause__ or error.__context__


def copy_checked(source: IO[bytes], out: Path, nbytes: int, sha256: str, count: Count) -> None:
    """Write exactly `nbytes` of a stream to `out`, which appears only when its hash is right.

    Raises:
        DownloadError: the stream is shorter or longer, or has another SHA-256.
    """
    temporary = out.with_name(out.name + ".partial")
    try:
        with open(temporary, "wb") as target:
            done, digest = _copy(source, target, nbytes, count)
        if done != nbytes or digest != sha256:
            wrong = "another SHA-256" if done == nbytes else f"another size than {nbytes} bytes"
            raise DownloadError(f"what came for {out.name} has {wrong}; the catalog differs")
        temporary.replace(out)
    finally:
        temporary.unlink(missing_ok=True)


def _copy(source: IO[bytes], target: IO[bytes], nbytes: int, count: Count) -> tuple[int, str]:
    digest, done = hashlib.sha256(), 0
    while chunk := source.read(min(CHUNK, nbytes - done + 1)):
        done += len(chunk)
        if done > nbytes:
            break
        digest.update(chunk)
        target.write(chunk)
        count(done, nbytes)
    target.flush()
    os.fsync(target.fileno())
    return done, digest.hexdigest()


def download(url: str, out: Path, sha256: str, limit: int, count: Count) -> None:
    """Download a URL to `out`, going on where an earlier try ended.

    Args:
        url: http, https or file.
        out: appears only when complete; until then `out` + ``.partial`` grows.
        sha256: of the whole; "" if unknown.
        limit: bytes it may have at most.
        count: called with (done, total).

    Raises:
        DownloadError: it cannot be fetched, is too large, or has another hash.
    """
    partial = out.with_name(out.name + ".partial")
    for attempt in range(ATTEMPTS):
        before = _size(partial)
        try:
            _continue(url, partial, limit, count)
            break
        except (TimeoutError, ConnectionError, http.client.HTTPException) as error:
            _give_up_or_wait(attempt if _size(partial) <= before else 0, url, error)
        except urllib.error.URLError as error:
            final = isinstance(error, urllib.error.HTTPError) and error.code < 500
            final = final or isinstance(error.reason, ssl.SSLError)
            _give_up_or_wait(ATTEMPTS if final else attempt, url, error)
    else:
        raise DownloadError(f"{_short(url)} broke off {ATTEMPTS} times; run it again to go on")
    if sha256 and _sha256(partial) != sha256:
        partial.unlink()
        raise DownloadError(f"{_short(url)} has another SHA-256 than the package index says")
    partial.replace(out)


def _continue(url: str, partial: Path, limit: int, count: Count) -> None:
    start = _size(partial)
    request = urllib.request.Request(url, headers={"User-Agent": "forerun"})
    if start:
        request.add_header("Range", f"bytes={start}-")
    try:
        response = urllib.request.urlopen(request, timeout=TIMEOUT_S, context=_context())
    except urllib.error.HTTPError as error:
        if error.code != 416:
            raise
        # Nothing is left to send: the file is complete, or it is not the one it began as.
        error.close()
        if error.headers.get("Content-Range") != f"bytes */{start}":
            partial.unlink()
            raise ConnectionError("the file has changed") from None
        return
    with response:
        if getattr(response, "status", None) != 206:
            start = 0
        total = _total(response, start)
        if total is not None and total > limit:
            raise DownloadError(f"{_short(url)} has {total} bytes; at most {limit} were expected")
        _append(response, partial, start, total, limit, count)


def _append(
    response: Any, partial: Path, start: int, total: int | None, limit: int, count: Count
) -> None:
    done = start
    with open(partial, "r+b" if start else "wb") as target:
        target.seek(start)
        target.truncate()
        while chunk := response.read(CHUNK):
            done += len(chunk)
            if done > limit:
                raise DownloadError(f"{partial.stem} has more than {limit} bytes")
            target.write(chunk)
            count(done, total)
    if total is not None and done < total:
        raise ConnectionError(f"it ended after {done} of {total} bytes")


def _give_up_or_wait(attempt: int, url: str, error: Exception) -> None:
    if attempt >= ATTEMPTS - 1:
        raise DownloadError(f"{_short(url)} cannot be fetched ({error})") from error
    time.sleep(0.5 * 2**attempt)


def _total(response: Any, start: int) -> int | None:
    length = response.headers.get("Content-Length", "")
    return start + int(length) if length.isdigit() else None


def _context() -> ssl.SSLContext:
    context = ssl.create_default_context()
    # pip and requests have variables of their own for the certificates of a company.
    for name in ("PIP_CERT", "REQUESTS_CA_BUNDLE"):
        path = os.environ.get(name)
        if path and os.path.isfile(path):
            with contextlib.suppress(ssl.SSLError):
                context.load_verify_locations(path)
    return context


def _short(url: str) -> str:
    return url.split("#")[0].split("?")[0].rsplit("/", 1)[-1]


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        while chunk := stream.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
