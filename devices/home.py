"""Where models, downloads and caches live, and how a bundle is found by name."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

from forerun.errors import OptionError, UnknownModelError

VARIANTS = ("int4", "int4-fast", "int4-exact", "int8", "int8-rows", "fp32")
DEFAULT_VARIANT = VARIANTS[0]
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,99}")
_CATALOG = Path(__file__).resolve().parent.parent / "export" / "catalog.json"


def home() -> Path:
    """The folder of everything forerun keeps: ``$FORERUN_HOME``, else ``~/.forerun``.

    It holds ``models/NAME/VARIANT``, ``downloads`` and ``cache``; it need not exist yet.
    """
    given = os.environ.get("FORERUN_HOME")
    return Path(given).expanduser().absolute() if given else Path.home() / ".forerun"


def model_folder(name: str, variant: str = DEFAULT_VARIANT) -> Path:
    """Where the bundle of a catalog model is installed.

    Raises:
        UnknownModelError: the name is not one a catalog could hold (no path can be given here).
        OptionError: the variant is none of `VARIANTS`.
    """
    if not _NAME.fullmatch(name):
        raise UnknownModelError(f"{name!r} is not the name of a model; {_known()}")
    if variant not in VARIANTS:
        raise OptionError(f"variant {variant!r} is unknown; there are {', '.join(VARIANTS)}")
    return home() / "models" / name / variant


def installed() -> list[str]:
    """Bundles in `home()`, as ``NAME:VARIANT``, sorted."""
    found = (home() / "models").glob("*/*/manifest.json")
    pairs = [(path.parent.parent.name, path.parent.name) for path in found]
    return sorted(f"{n}:{v}" for n, v in pairs if _NAME.fullmatch(n) and v in VARIANTS)


def find_bundle(name_or_path: str | os.PathLike[str]) -> Path:
    """Return the folder of a bundle.

    Args:
        name_or_path: ``smollm2-135m`` (int4), ``smollm2-135m:fp32``, or a folder that holds a
            manifest.json.

    Raises:
        UnknownModelError: there is none; names what is installed and what can be pulled.
    """
    given = os.fspath(name_or_path)
    path = Path(given).expanduser()
    if given and (path / "manifest.json").is_file():
        return path
    if not given or isinstance(name_or_path, Path) or os.sep in given or path.is_dir():
        raise UnknownModelError(f"{given or '(nothing)'} holds no manifest.json; {_known()}")
    name, _, variant = given.partition(":")
    variant = variant or DEFAULT_VARIANT
    if variant not in VARIANTS:
        raise UnknownModelError(
            f"{given!r}: there is no variant {variant!r}, only {', '.join(VARIANTS)}"
        )
    folder = model_folder(name, variant)
    if not (folder / "manifest.json").is_file():
        raise UnknownModelError(f"{name}:{variant} is not installed; {_known()}")
    return folder


def _known() -> str:
    here = ", ".join(installed()) or "nothing"
    return f"installed: {here}; `forerun pull NAME` offers: {', '.join(_offered())}"


def _offered() -> list[str]:
    # The catalog is read as data: devices may not import export.
    try:
        models = json.loads(_CATALOG.read_text(encoding="utf-8"))["models"]
        return sorted(row["name"] for row in models)
    except (OSError, ValueError, KeyError, TypeError):
        return ["nothing (the catalog cannot be read)"]
