"""`pull`: fetch, export, quantize, and one rename that makes the bundle visible.

Everything under way lies in `models/.partial-NAME-VARIANT`; a killed run leaves that folder, and
the next pull removes it.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from forerun.devices.home import VARIANTS, home, model_folder
from forerun.errors import BundleError, OptionError
from forerun.export.bundle import replace_folder, require_space
from forerun.export.catalog import CatalogEntry, Progress, find_entry
from forerun.export.drafters import install_drafters, missing_drafters
from forerun.export.fetch import WAITING, fetch, require_terms
from forerun.export.lock import locked, try_locked
from forerun.export.recipe import is_outdated
from forerun.export.transfer import space_errors
from forerun.runtime.manifest import Manifest, load_manifest

_PARTIAL = ".partial-"
_REPLACED = "replaced"
_SLACK = 64 << 20
# Everything beside the weights included, as in `WeightFormat`.
_FLOAT_BYTES_PER_WEIGHT = 4.1


@dataclass(frozen=True)
class _Job:
    """One bundle to be made, and who is told about it.

    Attributes:
        entry: of the catalog.
        variant: one of `VARIANTS`.
        accept_terms: the user has accepted the terms.
        report: takes the progress.
        note: takes lines for the user.
        capacity: of the static KV cache; None takes the exporter's default.
        force: make it even if it is installed.
    """

    entry: CatalogEntry
    variant: str
    accept_terms: bool
    report: Progress
    note: Callable[[str], None]
    capacity: int | None
    force: bool = False

    @property
    def folder(self) -> Path:
        """Where the bundle is installed."""
        return model_folder(self.entry.name, self.variant)

    @property
    def label(self) -> str:
        """What the user calls the bundle."""
        return f"{self.entry.name}:{self.variant}"


def pull(
    name: str,
    *,
    variant: str | None = None,
    accept_terms: bool = False,
    progress: Progress | None = None,
    note: Callable[[str], None] | None = None,
    capacity: int | None = None,
    force: bool = False,
) -> Path:
    """Install a model of the catalog.

    A model that is installed and undamaged is left alone, unless an older forerun made it (see
    `recipe`): then it is made again, and can be used as it is until the new one takes its place.

    Args:
        name: of the catalog, e.g. ``smollm2-135m``.
        variant: ``int4``, ``int4-exact``, ``int8`` or ``fp32``; None takes the model's
            default. For a quantized variant the float32 bundle is used if it is installed, and
            is not kept otherwise.
        accept_terms: the user has read and accepted the terms of the model, if it has any.
        progress: called with (stage, done, total).
        note: called with a line for the user when something is made again.
        capacity: length of the static KV cache; None takes that of the bundle that is made
            again, else the exporter's default.
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
    report: Progress = progress or (lambda stage, done, total: None)
    job = _Job(entry, variant, accept_terms, report, note or (lambda line: None), capacity, force)
    wanted = _is_wanted(job)
    if wanted:
        require_terms(entry, accept_terms)
    elif not missing_drafters(name):
        return job.folder
    models = home() / "models"
    with space_errors(models):
        models.mkdir(parents=True, exist_ok=True)
        with locked(_lock(name), lambda: report(WAITING, 0, None)):
            _clean(name)
            # Another process may have installed it while this one waited for the lock.
            if wanted and _is_wanted(job):
                _install(job)
            install_drafters(name)
    return job.folder


def _measure_threads(folder: Path, report: Progress) -> None:
    """Find the best thread count now, so that no later start has to."""
    from forerun.runtime.probe import probe_bundle

    report("measure threads", 0, 1)
    probe_bundle(load_manifest(folder), folder)
    report("measure threads", 1, 1)


def _install(job: _Job) -> None:
    """Make the bundle, from the float32 bundle if that is installed."""
    _require_space(job)
    job = _told(job)
    float_job = replace(job, variant="fp32", force=False)
    source = _installed(float_job.folder, job.capacity, strict=False)
    if job.variant == "fp32" or source is None:
        return _make(job)
    if is_outdated(source):
        _make(_told(float_job))
    with _partial(job) as work:
        _finish(_quantized(float_job.folder, work, job), job)


def _told(job: _Job) -> _Job:
    """Say it if a bundle of an older forerun is made again; the new one keeps its capacity."""
    old = None if job.force else _installed(job.folder, job.capacity)
    if old is None:
        return job
    job.note(f"{job.label} was made by an older forerun; making it again")
    return replace(job, capacity=old.kv.capacity)


def _make(job: _Job) -> None:
    """Fetch the weights, export them, and quantize that if it is wanted."""
    weights = fetch(job.entry, accept_terms=job.accept_terms, progress=job.report)
    with _partial(job) as work:
        bundle = _exported(weights, work, job)
        if job.variant != "fp32":
            bundle = _quantized(bundle, work, job)
        _finish(bundle, job)


def _exported(weights: Path, work: Path, job: _Job) -> Path:
    from forerun.export.export import export_model
    from forerun.export.sources import open_source

    name, out = job.entry.name, work / "fp32"
    source = open_source(weights, f"{name} ({weights.name})")
    export_model(source, out, name=name, capacity=job.capacity, progress=job.report)
    return out


def _quantized(bundle: Path, work: Path, job: _Job) -> Path:
    from forerun.quant.quantize import quantize

    quantize(bundle, work / job.variant, weights=job.variant, progress=job.report)
    return work / job.variant


def _finish(bundle: Path, job: _Job) -> None:
    """Check a finished bundle, rename it to where it is looked for, and measure it."""
    load_manifest(bundle).check_files(bundle)
    job.folder.parent.mkdir(parents=True, exist_ok=True)
    if job.entry.terms_path:
        # Terms that must be passed on lie beside every copy of the weights.
        shutil.copyfile(job.entry.terms_path, job.folder.parent / "TERMS.txt")
    replace_folder(bundle, job.folder, bundle.parent / _REPLACED)
    _measure_threads(job.folder, job.report)


def _is_wanted(job: _Job) -> bool:
    """Whether there is something to make."""
    there = None if job.force else _installed(job.folder, job.capacity)
    return there is None or is_outdated(there)


def _installed(folder: Path, capacity: int | None, strict: bool = True) -> Manifest | None:
    """The manifest of an undamaged bundle; one of another capacity is refused, or not used."""
    try:
        manifest = load_manifest(folder)
        manifest.check_files(folder)
    except BundleError:
        return None
    if capacity in (None, manifest.kv.capacity):
        return manifest
    if strict:
        raise OptionError(
            f"{folder} is installed with capacity {manifest.kv.capacity}, not {capacity}; "
            "force a new pull to replace it"
        )
    return None


def _require_space(job: _Job) -> None:
    from forerun.quant.quantize import FORMATS

    bytes_per_weight = _FLOAT_BYTES_PER_WEIGHT
    if job.variant != "fp32":
        bytes_per_weight += FORMATS[job.variant].bytes_per_weight
    needed = int(job.entry.parameters * bytes_per_weight) + _SLACK
    require_space(job.folder, needed, f"pulling {job.label}")


@contextlib.contextmanager
def _partial(job: _Job) -> Iterator[Path]:
    work = home() / "models" / f"{_PARTIAL}{job.entry.name}-{job.variant}"
    work.mkdir(parents=True)
    try:
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _clean(name: str) -> None:
    """Remove what killed pulls left: of this model, and of others that nobody pulls now."""
    for work in (home() / "models").glob(f"{_PARTIAL}*"):
        owner, variant = _owner(work)
        if not variant:
            continue
        with contextlib.nullcontext(True) if owner == name else try_locked(_lock(owner)) as mine:
            if mine:
                _take_back(work / _REPLACED, home() / "models" / owner / variant)
                shutil.rmtree(work, ignore_errors=True)


def _owner(work: Path) -> tuple[str, str]:
    """The model and the variant that a folder under way is for; both may have hyphens."""
    name = work.name.removeprefix(_PARTIAL)
    variant = next((v for v in VARIANTS if name.endswith(f"-{v}")), "")
    return name.removesuffix(f"-{variant}"), variant


def _take_back(old: Path, folder: Path) -> None:
    """Undo the first of the two renames of a pull that was killed between them."""
    if old.is_dir() and not os.path.lexists(folder):
        old.rename(folder)


def _lock(name: str) -> Path:
    return home() / "models" / f".{name}.lock"
