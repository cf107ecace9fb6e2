"""`load`: from a bundle to a text model that runs where and how it was asked to."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from forerun.devices.home import find_bundle
from forerun.devices.providers import find_provider
from forerun.devices.request import DeviceRequest, parse_devices
from forerun.errors import BundleError, OptionError, UnsupportedError
from forerun.runtime.drafting.choice import (
    DEFAULT_DRAFTER,
    NO_DRAFTER,
    AnyDrafter,
    Drafters,
    default_drafter,
    measured_means,
    named_drafters,
    trees_allowed,
)
from forerun.runtime.drafting.plan import check_name
from forerun.runtime.drafting.policy import check_policy
from forerun.runtime.drafting.schedules import SCHEDULES
from forerun.runtime.kv_request import A_SKIP, A_WINDOW, KVRequest, no_drafting
from forerun.runtime.manifest import Manifest, inside, load_manifest
from forerun.runtime.prefix import PrefixCache
from forerun.runtime.skipping import NO_SKIPPING, read_skipping
from forerun.runtime.template import MAX_TEMPLATE_CHARS
from forerun.runtime.text import Text
from forerun.runtime.tokenizer import Tokenizer

DEFAULT_MODEL = "smollm2-135m"
MAX_THREADS = 1024
_SERIAL, _SELF = "serial", "skip"
# Where drafting cannot change the text of a row-exact bundle.
_EXACT = "cpu"


def load(
    model: str | os.PathLike[str] = DEFAULT_MODEL,
    *,
    variant: str | None = None,
    threads: int | None = None,
    spin: bool = True,
    drafter: AnyDrafter = DEFAULT_DRAFTER,
    policy: str = "measured",
    schedule: str | None = None,
    trees: bool | None = None,
    device: str = "cpu",
    allow_fallback: bool = False,
    on_fallback: Callable[[str], None] | None = None,
    on_placement: Callable[[str], None] | None = None,
    kv: str | None = None,
    kv_budget: str | int | None = None,
    window: int | None = None,
    skipping: str = NO_SKIPPING,
) -> Text:
    """Load a text model from its bundle.

    Args:
        model: a name that was pulled (``smollm2-135m``, ``smollm2-135m:fp32``) or a bundle folder.
        variant: such as ``int4`` or ``fp32``; only with a name.
        threads: of the computation; None takes the best that was measured on this machine.
        spin: let waiting threads spin; False when another model runs at the same time.
        drafter: what generations draft with unless they say otherwise, see `Session.generate`.
        policy: how much to draft, one of `policy.POLICIES`, by step costs measured once.
        schedule: one of `schedules.SCHEDULES`; None takes serial, or what ``auto`` chose.
        trees: whether drafts may be trees; None allows them where they cannot change the text.
        device: where the model runs, or ``target=webgpu,draft=cpu``, or ``auto``, which measures
            and chooses threads, drafter and schedule too, where those are not given.
        allow_fallback: go on on the CPU if that device cannot be opened, or fails later.
        on_fallback: told when that happens, and why; None gives a `RuntimeWarning`.
        on_placement: told what ``auto`` chose, and why, and how long `kv_budget` is in tokens.
        kv: a layout of the KV cache (`layouts.LAYOUTS`); None takes the bundle's, or the device's.
        kv_budget: bytes, or a size such as ``64MB``, that the KV cache may take.
        window: tokens of a KV cache that keeps only the first and the newest; no drafter then.
        skipping: see `skipping.parse_skipping`; lossy, no drafter then.

    Raises:
        UnknownModelError: there is no such model on this machine.
        BundleError: the bundle is damaged, or of another time.
        DeviceError: the device is not here, or cannot run the whole model.
        OptionError: a number is out of range, or options contradict each other or are not known.
        UnsupportedError: the drafter does not fit the model.
    """
    check_threads(threads)
    devices, asked = parse_devices(device), KVRequest(kv, kv_budget, window)
    how, wish = _Drafting(drafter, policy, schedule, trees), read_skipping(skipping)
    if window is not None:
        how = _refused(how, A_WINDOW)
    name = os.fspath(model)
    bundle = _read_bundle(find_bundle(name if variant is None else f"{name}:{variant}"))
    if wish.rule(bundle.whole) is not None:
        how = _refused(how, A_SKIP)
    opening = _Opening(devices, threads, spin, allow_fallback, skipping)
    opening = opening.on_cpu() if how.refusal else opening
    return _opened(bundle, opening, how, asked, on_fallback, on_placement)


def check_threads(threads: int | None) -> None:
    """Refuse a number of threads that is none.

    Raises:
        OptionError: it is not from 1 to `MAX_THREADS`.
    """
    if threads is not None and (type(threads) is not int or not 1 <= threads <= MAX_THREADS):
        raise OptionError(f"threads is {threads!r}; it must be from 1 to {MAX_THREADS}")


@dataclass(frozen=True)
class _Opening:
    """How the model is opened, see `load`."""

    devices: DeviceRequest
    threads: int | None
    spin: bool
    allow_fallback: bool
    skipping: str

    def on_cpu(self) -> _Opening:
        """The same for what the cpu alone can do: there is nothing to choose or to fall back to."""
        if self.devices.target is not None:
            return self
        return replace(self, devices=replace(self.devices, target="cpu"), allow_fallback=False)


def _shaped(whole: Manifest, asked: KVRequest, devices: DeviceRequest) -> Manifest:
    """The manifest with the KV cache that was asked for, wherever the target may run."""
    if devices.target is None:
        return asked.apply_anywhere(whole)
    return asked.apply(whole, devices.target)[0]


@dataclass(frozen=True)
class _Bundle:
    """The parts of a bundle that are read at once; `manifest` is `whole` as it will run."""

    folder: Path
    whole: Manifest
    manifest: Manifest
    tokenizer: Tokenizer
    template: str | None


def _read_bundle(folder: Path) -> _Bundle:
    manifest = load_manifest(folder)
    if manifest.kind != "text":
        raise UnsupportedError(f"{folder} is a {manifest.kind} model; a text model is needed here")
    manifest.check_files(folder)
    template = read_template(manifest, folder)
    return _Bundle(folder, manifest, manifest, Tokenizer(manifest, folder), template)


@dataclass(frozen=True)
class _Drafting:
    """What `load` was told about drafting; see there."""

    drafter: AnyDrafter
    policy: str
    schedule: str | None
    trees: bool | None
    device: str = "cpu"
    threads: int | None = None
    refusal: str = ""

    def __post_init__(self) -> None:
        check_policy(self.policy)
        check_name("schedule", self.schedule or _SERIAL, SCHEDULES)


def _placed(
    bundle: _Bundle,
    devices: DeviceRequest,
    how: _Drafting,
    threads: int | None,
    tell: Callable[[str], None] | None,
) -> tuple[str, int, _Drafting]:
    """Device and threads of the target, and how to draft, where the caller left it open."""
    from forerun.runtime.drafting.survey import place

    is_open = how.drafter == DEFAULT_DRAFTER
    name = default_drafter(bundle.manifest) if is_open else how.drafter
    found = place(
        bundle.manifest,
        bundle.folder,
        devices,
        # Of a drafter that is no name nothing is known.
        name if isinstance(name, str) else NO_DRAFTER,
        threads,
        is_chosen=not is_open,
        schedule=how.schedule,
        drafted_on=_EXACT if is_open else None,
        whole=bundle.whole,
    )
    if tell is not None:
        tell(found.reason)
    chosen = replace(
        how,
        drafter=found.drafter if is_open else how.drafter,
        schedule=how.schedule or (found.schedule if found.schedule in SCHEDULES else _SERIAL),
        device=found.draft or how.device,
        threads=found.draft_threads or None,
    )
    return found.target, found.threads, chosen


def _drafting(how: _Drafting, devices: DeviceRequest) -> _Drafting:
    """How to draft on those devices."""
    if how.drafter == _SELF and None in (devices.target, devices.draft):
        raise OptionError(f"the drafter {_SELF} runs where the model runs; name that device")
    return replace(how, device=devices.draft or "cpu")


def _refused(how: _Drafting, what: str) -> _Drafting:
    """Not to draft, since what was asked for would let drafts change the text."""
    if how.drafter not in (DEFAULT_DRAFTER, NO_DRAFTER):
        raise OptionError(no_drafting(what))
    return replace(how, drafter=NO_DRAFTER, refusal=no_drafting(what))


def _opened(
    bundle: _Bundle,
    opening: _Opening,
    drafting: _Drafting,
    asked: KVRequest,
    on_fallback: Callable[[str], None] | None,
    on_placement: Callable[[str], None] | None,
) -> Text:
    devices, threads = opening.devices, opening.threads
    drafting = _drafting(drafting, devices)
    bundle = replace(bundle, manifest=_shaped(bundle.whole, asked, devices))
    target, may_fall_back = devices.target or "cpu", opening.allow_fallback
    if None in (devices.target, devices.draft):
        target, threads, drafting = _placed(bundle, devices, drafting, threads, on_placement)
    if devices.target is None:
        # Chosen, so that there is nothing to fall back from.
        may_fall_back = may_fall_back and target != "cpu"
    manifest, line = asked.apply(bundle.whole, target)
    if line and on_placement is not None:
        on_placement(line)
    bundle = replace(bundle, manifest=manifest)
    # Imported here: onnxruntime takes long to import, and wrong input should be told before.
    from forerun.runtime.open import open_runner
    from forerun.runtime.probe import best_threads

    runner = open_runner(
        bundle.manifest,
        bundle.folder,
        device=target,
        threads=threads or best_threads(bundle.manifest) or best_threads(bundle.whole),
        spin=opening.spin,
        allow_fallback=may_fall_back,
        on_fallback=on_fallback,
        arena=asked.arena(bundle.manifest),
        skipping=opening.skipping,
    )
    return _with_drafters(runner, bundle, drafting)


def _with_drafters(runner: Any, bundle: _Bundle, how: _Drafting) -> Text:
    manifest, cache = bundle.manifest, PrefixCache(runner)
    lowering = find_provider(runner.device).form
    chosen = how.drafter
    if chosen == DEFAULT_DRAFTER:
        chosen = default_drafter(manifest, runner.device)
    drafters = Drafters(
        manifest,
        named_drafters(manifest, bundle.folder, how.threads or runner.threads, how.device, runner),
        default=chosen,
        schedule=how.schedule or _SERIAL,
        trees=trees_allowed(manifest, lowering) if how.trees is None else how.trees,
        device=how.device,
        means=lambda: measured_means(cache, runner.device, runner.threads, how.policy),
        refusal=how.refusal,
    )
    text = Text(runner, bundle.tokenizer, bundle.template, cache=cache, drafters=drafters)
    try:
        # A drafter that does not fit is told now, and its first answer does not wait for it.
        drafters.plan()
    except BaseException:
        text.close()
        raise
    return text


def read_template(manifest: Manifest, folder: Any) -> str | None:
    """The chat template of a bundle, None if it has none.

    Raises:
        BundleError: it is not readable text.
    """
    name = manifest.tokenizer.chat_template
    if name is None:
        return None
    try:
        text = inside(folder, name).read_bytes()[: 4 * MAX_TEMPLATE_CHARS + 1].decode("utf-8")
    except (OSError, UnicodeDecodeError):
        raise BundleError(f"{folder}: {name} is not readable text; pull or export again") from None
    return text or None
