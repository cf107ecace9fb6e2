"""Trained drafters that come with the package: `pull` puts them beside their model."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from forerun.devices.home import home

_PACKAGED = Path(__file__).parent / "drafters"
_CARD = "drafter.json"


def packaged_drafters(model: str, root: Path | None = None) -> dict[str, Path]:
    """Folders of the drafters that were trained for a catalog model, by kind."""
    folder = (root or _PACKAGED) / model
    if not folder.is_dir():
        return {}
    return {path.name: path for path in sorted(folder.iterdir()) if (path / _CARD).is_file()}


def install_drafters(model: str, root: Path | None = None) -> list[Path]:
    """Copy a model's drafters to where they are looked for, if they are not there already.

    Args:
        model: name of the catalog model.
        root: where packaged drafters are; None takes those of this package.

    Returns:
        Their folders, `$FORERUN_HOME/models/MODEL/drafters/KIND`.
    """
    folders = []
    for kind, source in packaged_drafters(model, root).items():
        target = home() / "models" / model / "drafters" / kind
        if not _same(source, target):
            _replace(source, target)
        folders.append(target)
    return folders


def _same(source: Path, target: Path) -> bool:
    """The card holds the hashes of all other files, which the reader of a drafter checks."""
    try:
        return (source / _CARD).read_bytes() == (target / _CARD).read_bytes()
    except OSError:
        return False


def _replace(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    fresh = target.with_name(f".{target.name}.{os.getpid()}")
    old = target.with_name(f".{target.name}.{os.getpid()}.old")
    for leftover in (fresh, old):
        shutil.rmtree(leftover, ignore_errors=True)
    shutil.copytree(source, fresh)
    if target.exists():
        target.rename(old)
    fresh.rename(target)
    shutil.rmtree(old, ignore_errors=True)
