"""Trained drafters that come with the package: `pull` puts them beside their model."""

from __future__ import annotations

import filecmp
import hashlib
import os
import shutil
from pathlib import Path

from forerun.devices.home import home
from forerun.export.bundle import folder_aside
from forerun.runtime.drafting.folder import DRAFTER_NAME

# Holds the hash of the card that was installed, so that a card someone changed tells itself.
MARK_NAME = ".packaged"
# Hashes of cards that were installed before there was a mark.
_UNMARKED = frozenset(
    {
        "b37de66c240ba26d7d1621fcd2cf0e7d861a8eb4ff67fc7102df019c01014086",
        "e41e4001205f3872d083111ef781e3eb9f2a3fb512517931f327432bb76e12a8",
    }
)
_PACKAGED = Path(__file__).parent / "trained"


def packaged_drafters(model: str, root: Path | None = None) -> dict[str, Path]:
    """Folders of the drafters that were trained for a catalog model, by kind."""
    folder = (root or _PACKAGED) / model
    if not folder.is_dir():
        return {}
    return {path.name: path for path in sorted(folder.iterdir()) if (path / DRAFTER_NAME).is_file()}


def missing_drafters(model: str, root: Path | None = None) -> dict[Path, Path]:
    """What `install_drafters` would write: packaged folders by the place of each.

    A place that holds something else than what was installed there is the user's, e.g. a drafter
    of their own training, and is never written to.
    """
    places = home() / "models" / model / "drafters"
    pairs = {places / kind: source for kind, source in packaged_drafters(model, root).items()}
    return {
        target: source
        for target, source in pairs.items()
        if _is_ours(target) and not _is_whole(target, source)
    }


def install_drafters(model: str, root: Path | None = None) -> list[Path]:
    """Copy a model's drafters to where they are looked for, if they are not there already.

    Args:
        model: name of the catalog model.
        root: where packaged drafters are; None takes those of this package.

    Returns:
        The folders that were written, `$FORERUN_HOME/models/MODEL/drafters/KIND`.
    """
    missing = missing_drafters(model, root)
    for target, source in missing.items():
        with folder_aside(target) as fresh:
            for path in _files(source):
                shutil.copyfile(path, fresh / path.name)
            (fresh / MARK_NAME).write_text(_card_hash(source), encoding="utf-8")
    return list(missing)


def _is_ours(target: Path) -> bool:
    """Whether nothing of the user's is lost with a folder."""
    if not os.path.lexists(target):
        return True
    if target.is_symlink():
        return False
    card = _card_hash(target)
    try:
        mark = (target / MARK_NAME).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return card in _UNMARKED
    return card in ("", mark)


def _is_whole(target: Path, source: Path) -> bool:
    """Whether a folder has every file of a packaged one, as it is there."""
    try:
        return all(filecmp.cmp(path, target / path.name, shallow=False) for path in _files(source))
    except OSError:
        return False


def _files(source: Path) -> list[Path]:
    """Without the notes that reading a drafter leaves in its folder."""
    return [path for path in sorted(source.iterdir()) if not path.name.startswith(".")]


def _card_hash(folder: Path) -> str:
    """SHA-256 of the card, which holds the hashes of all other files; empty if there is none."""
    try:
        return hashlib.sha256((folder / DRAFTER_NAME).read_bytes()).hexdigest()
    except OSError:
        return ""
