"""`pull`: fetch, export, quantize, and one rename that makes the bundle visible.

Everything under way lies in `models/.partial-NAME-VARIANT`; a killed run leaves that folder, and
the next pull removes it.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from forerun.devices.home import home, model_folder
from forerun.errors import BundleError, OptionError
from forerun.export.bundle import require_space
from forerun.export.catalog import CatalogEntry, Progress, find_entry
from forerun.export.drafters import install_drafters
from forerun.export.fetch import WAITING, fetch, require_terms
from forerun.export.lock import locked, try_locked
from forerun.export.transfer import space_errors
from forerun.runtime.manifest import load_manifest

_PARTIAL = ".partial-"
_SLACK = 64 << 20
# Bytes per weight, scales and everything beside the weights included.
_BYTES_PER_WEIGHT = {"fp32": 4.1, "int8": 1.3, "int4": 1.0, "int4-exact": 1.2}


def pull(
    name: str,
    *,
    variant: str | None = None,
    accept_terms: bool = False,
    progress: Progress | None = None,
    capacity: int | None = None,
    force: bool = False,
) -> Path:
    """Install a model of the catalog; a model that is installed and undamaged is left alone.

    Args:
        name: of the catalog, e.g. ``smollm2-135m``.
        variant: ``int4``, ``int4-exact``, ``int8`` or ``fp32``; None takes the model's
            default. For a quantized variant the float32 bundle is used if it is installed, and
            is not kept otherwise.
        accept_terms: the user has read and accepted the terms of the model, if it has any.
        progress: called with (stage, done, total).
        capacity: length of the static KV cache; None takes the exporter's default.
        force: make it again even if it is installed.

    Returns:
        The folder of the bundle.

    Raises:
        UnknownModelError: the catalog has no such model.
        OptionError: the variant is unknown, or an installed bundle has another capacity.
        TermsError: the terms were not accepted.
        SpaceError: the disk is too small.
        DownloadError: no source gave the right files.
        ExportMismatch: the export differs from its source; nothing was installed.
    """
    entry = find_entry(name)
    variant = entry.default_variant if variant is None else variant
    folder = model_folder(name, variant)
    if not force and _is_installed(folder, capacity):
        install_drafters(name)
        return folder
    require_terms(entry, accept_terms)
    report: Progress = progress or (lambda stage, done, total: None)
    models = home() / "models"
    with space_errors(models):
        models.mkdir(parents=True, exist_ok=True)
        with locked(_lock(name), lambda: report(WAITING, 0, None)):
            _clean(name)
            # Another process may have installed it while this one waited for the lock.
            if force or not _is_installed(folder, capacity):
                _install(entry, variant, folder, accept_terms, report, capacity)
                _measure_threads(folder, report)
            install_drafters(name)
    return folder


def _measure_threads(folder: Path, report: Progress) -> None:
    """Find the best thread count now, so that no later start has to."""
    from forerun.runtime.probe import probe_bundle

    report("measure threads", 0, 1)
    probe_bundle(load_manifest(folder), folder)
    report("measure threads", 1, 1)


def _install(
    entry: CatalogEntry,
    variant: str,
    folder: Path,
    accept_terms: bool,
    report: Progress,
    capacity: int | None,
) -> None:
    _require_space(entry, variant, folder)
    fp32 = model_folder(entry.name, "fp32")
    if variant != "fp32" and _is_installed(fp32, capacity, strict=False):
        with _partial(entry.name, variant) as work:
            _finish(_quantized(fp32, work, variant, report), folder, entry)
        return
    weights = fetch(entry, accept_terms=accept_terms, progress=report)
    with _partial(entry.name, variant) as work:
        bundle = _exported(weights, work, entry, capacity, report)
        if variant != "fp32":
            bundle = _quantized(bundle, work, variant, report)
        _finish(bundle, folder, entry)


def _exported(
    weights: Path, work: Path, entry: CatalogEntry, capacity: int | None, report: Progress
) -> Path:
    from forerun.export.export import export_model
    from forerun.export.sources import open_source

    source = open_source(weights, f"{entry.name} ({weights.name})")
    export_model(source, work / "fp32", name=entry.name, capacity=capacity, progress=report)
    return work / "fp32"


def _quantized(bundle: Path, work: Path, variant: str, report: Progress) -> Path:
    from forerun.quant.quantize import quantize

    quantize(bundle, work / variant, weights=variant, progress=report)
    return work / variant


def _finish(bundle: Path, folder: Path, entry: CatalogEntry) -> None:
    """Check a finished bundle and rename it to where it is looked for."""
    load_manifest(bundle).check_files(bundle)
    folder.parent.mkdir(parents=True, exist_ok=True)
    if entry.terms_path:
        # Terms that must be passed on lie beside every copy of the weights.
        shutil.copyfile(entry.terms_path, folder.parent / "TERMS.txt")
    if os.path.lexists(folder):
        folder.rename(bundle.parent / "replaced")
    bundle.rename(folder)


def _is_installed(folder: Path, capacity: int | None, strict: bool = True) -> bool:
    """Whether an undamaged bundle is there; with another capacity it is refused, or not used."""
    try:
        manifest = load_manifest(folder)
        manifest.check_files(folder)
    except BundleError:
        return False
    if capacity in (None, manifest.kv.capacity):
        return True
    if strict:
        raise OptionError(
            f"{folder} is installed with capacity {manifest.kv.capacity}, not {capacity}; "
            "force a new pull to replace it"
        )
    return False


def _require_space(entry: CatalogEntry, variant: str, folder: Path) -> None:
    kinds = {"fp32", variant}
    needed = sum(entry.parameters * _BYTES_PER_WEIGHT[kind] for kind in kinds)
    require_space(folder, int(needed) + _SLACK, f"pulling {entry.name}:{variant}")


@contextlib.contextmanager
def _partial(name: str, variant: str) -> Iterator[Path]:
    work = home() / "models" / f"{_PARTIAL}{name}-{variant}"
    work.mkdir(parents=True)
    try:
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _clean(name: str) -> None:
    """Remove what killed pulls left: of this model, and of others that nobody pulls now."""
    for work in (home() / "models").glob(f"{_PARTIAL}*"):
        owner = work.name.removeprefix(_PARTIAL).rpartition("-")[0]
        with contextlib.nullcontext(True) if owner == name else try_locked(_lock(owner)) as mine:
            if mine:
                shutil.rmtree(work, ignore_errors=True)


def _lock(name: str) -> Path:
    return home() / "models" / f".{name}.lock"
