"""The drafters by name, and how each is opened for a target."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from forerun.errors import OptionError, UserError
from forerun.runtime.drafting.auto import AutoDrafter
from forerun.runtime.drafting.combine import Fallback, Speculative
from forerun.runtime.drafting.folder import check_target, folder_kind, load_draft_model, load_info
from forerun.runtime.drafting.ngram import NgramDrafter
from forerun.runtime.drafting.recycle import RecycleDrafter
from forerun.runtime.drafting.tree import TokenTree

if TYPE_CHECKING:
    from forerun.runtime.drafting.drafter import Drafter, KeepGoing, Outcome
    from forerun.runtime.drafting.model import ModelDrafter
    from forerun.runtime.manifest import Manifest

FOLDER = "drafters"


@dataclass(frozen=True)
class DrafterContext:
    """What a drafter is opened with.

    Attributes:
        target_manifest: of the model that confirms.
        target_folder: of its bundle.
        drafter_folder: of the drafter; None looks beside the bundle, in ``../drafters/KIND``.
        threads: of the drafter's sessions.
        spin: let their waiting threads spin; the target runs in turn with them.
        vocab: ids of the target; None takes the manifest's.
        device: where a drafter with a model runs.
        runner: the target's own, for drafters that run on it; None if it is not loaded.
    """

    target_manifest: Manifest
    target_folder: Path
    drafter_folder: Path | None = None
    threads: int | None = None
    spin: bool = False
    vocab: int | None = None
    device: str = "cpu"
    runner: Any = None

    @property
    def ids(self) -> int:
        """Number of the target's ids."""
        return self.vocab or self.target_manifest.model.vocab

    def find(self, kind: str) -> Path | None:
        """Folder of the drafter of this kind; None if there is none."""
        folder = self.drafter_folder or Path(self.target_folder).parent / FOLDER / kind
        return folder if folder_kind(folder) == kind else None

    def need(self, kind: str) -> Path:
        """The same, where it must be there.

        Raises:
            OptionError: it is not; names what is.
        """
        folder = self.find(kind)
        if folder is not None:
            return folder
        name = self.target_manifest.name
        if self.drafter_folder is not None:
            raise OptionError(f"{self.drafter_folder} holds no drafter of the kind {kind!r}")
        here = [row.name for row in DRAFTERS.values() if row.is_here(self)]
        raise OptionError(
            f"there is no {kind} drafter for {name} here, only {', '.join(here)}; "
            f"`forerun pull {name}` fetches one if there is one, `forerun train-drafter` makes one"
        )

    def obstacle(self, kind: str) -> str | None:
        """Why the drafter of this kind cannot be used with the target; None if it can."""
        folder = self.find(kind)
        if folder is None:
            return f"there is no {kind} drafter"
        try:
            if kind == "model":
                load_draft_model(folder, self.target_manifest)
            else:
                check_target(load_info(folder), self.target_manifest)
        except UserError as error:
            return str(error)
        return None


@dataclass(frozen=True)
class DrafterRow:
    """One drafter that can be asked for.

    Attributes:
        name: in options and statistics.
        make: opens it.
        needs: kinds of drafter folders without which it cannot be opened.
        summary: one line for help texts.
        skips: whether the target's own graph must be able to skip feed-forward blocks.
    """

    name: str
    make: Callable[[DrafterContext], Drafter]
    needs: tuple[str, ...]
    summary: str
    skips: bool = False

    def is_here(self, context: DrafterContext) -> bool:
        """Whether all that it needs is there."""
        if self.skips and context.target_manifest.skipping is None:
            return False
        return all(context.find(kind) is not None for kind in self.needs)


class Silent:
    """The drafter of plain decoding: never guesses."""

    name = "none"
    needs_features = False
    proposes_trees = False

    def begin(self, ids: Sequence[int], features: Any = None) -> None:
        """Nothing to take up."""

    def propose(self, budget: int, keep_going: KeepGoing | None = None) -> TokenTree:
        """Nothing."""
        return TokenTree.EMPTY

    def observe(self, outcome: Outcome) -> None:
        """Nothing to note."""

    def rewind(self, length: int) -> None:
        """Nothing to forget."""

    def close(self) -> None:
        """Nothing to free."""


def open_drafter(name: str, context: DrafterContext) -> Drafter:
    """Open a drafter for a target.

    Args:
        name: one of `DRAFTERS`, or the path of a drafter's folder.
        context: the target, and how to run the drafter.

    Raises:
        OptionError: there is no such drafter, nothing trained for this target here, or it cannot
            run on the device.
        BundleError: the drafter's folder is damaged.
        UnsupportedError: it was made for another target; names the difference.
        DeviceError: the device is not here, or cannot run the drafter.
    """
    if name in DRAFTERS:
        _check_device(DRAFTERS[name], context.device)
        return DRAFTERS[name].make(context)
    folder = Path(name).expanduser()
    kind = folder_kind(folder) if name else None
    if kind is None:
        raise OptionError(
            f"drafter {name!r} is not known; it can be {', '.join(DRAFTERS)}, "
            "or the folder of a drafter"
        )
    _check_device(DRAFTERS[kind], context.device)
    return DRAFTERS[kind].make(replace(context, drafter_folder=folder))


def _check_device(row: DrafterRow, device: str) -> None:
    if device != "cpu" and "model" not in row.needs:
        others = ", ".join(name for name, other in DRAFTERS.items() if "model" in other.needs)
        raise OptionError(
            f"the drafter {row.name!r} runs on the cpu, not on {device}; only {others} can"
        )


def _silent(context: DrafterContext) -> Drafter:
    return Silent()


def _ngram(context: DrafterContext) -> Drafter:
    return NgramDrafter()


def _recycle(context: DrafterContext) -> Drafter:
    return RecycleDrafter(context.ids)


def _copying(context: DrafterContext) -> Drafter:
    return Fallback(NgramDrafter(), RecycleDrafter(context.ids))


def _model(context: DrafterContext) -> ModelDrafter:
    from forerun.runtime.drafting.model import ModelDrafter
    from forerun.runtime.open import open_runner

    folder = context.need("model")
    manifest, vocab = load_draft_model(folder, context.target_manifest)
    runner = open_runner(
        manifest, folder, device=context.device, threads=context.threads, spin=context.spin
    )
    return ModelDrafter(runner, vocab)


def _cascade(context: DrafterContext) -> Drafter:
    return Speculative(_model(context), NgramDrafter())


def _head(context: DrafterContext) -> Drafter:
    folder = context.need("head")
    from forerun.runtime.drafting.head import open_head

    return open_head(folder, context)


def _skip(context: DrafterContext) -> Drafter:
    from forerun.runtime.drafting.skip import open_skip

    if context.runner is None:
        raise OptionError("the drafter skip runs on the model itself; load it with forerun.load")
    return open_skip(context.runner)


def _auto(context: DrafterContext) -> Drafter:
    """All that fits, chosen among round by round; of the trained ones the cheapest."""
    free = [NgramDrafter(), RecycleDrafter(context.ids)]
    for kind, make in (("head", _head), ("model", _model)):
        if context.obstacle(kind) is None:
            return AutoDrafter(free, [make(context)])
    return AutoDrafter(free)


_ROWS = (
    DrafterRow("none", _silent, (), "plain decoding"),
    DrafterRow("ngram", _ngram, (), "copies what followed the same words earlier in the text"),
    DrafterRow("recycle", _recycle, (), "recalls what the model thought after the same token"),
    DrafterRow("ngram+recycle", _copying, (), "ngram where it matches, else recycle"),
    DrafterRow("head", _head, ("head",), "a small network trained on the model's hidden states"),
    DrafterRow("model", _model, ("model",), "a small model of its own, on any device"),
    DrafterRow("model+ngram", _cascade, ("model",), "the small model, itself sped up by ngram"),
    DrafterRow("skip", _skip, (), "the model itself with feed-forward blocks left out", skips=True),
    DrafterRow("auto", _auto, (), "whichever of these gave most lately; plain if none pays"),
)
DRAFTERS: dict[str, DrafterRow] = {row.name: row for row in _ROWS}
