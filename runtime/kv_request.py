"""What a caller asked of the KV cache: its layout, its size, or a window; checked, then applied."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from forerun.errors import OptionError
from forerun.runtime.budget import parse_size, plan_capacity, with_capacity
from forerun.runtime.layouts import CHAIN, choose_layout, layouts_of

if TYPE_CHECKING:
    from forerun.runtime.manifest import Manifest
    from forerun.runtime.window import WindowArena

NO_DRAFTING = (
    "drafting does not go with a window of the KV cache, since reading drafts evicts tokens that "
    "plain decoding would still see; use --drafter none, or no window"
)


@dataclass(frozen=True)
class KVRequest:
    """A layout and a size of the KV cache.

    Attributes:
        layout: a name of `layouts.LAYOUTS`; None takes the bundle's default.
        budget: bytes, or a size like ``64MB``, that the cache may take; None takes all tokens.
        window: rows of the first tokens and the newest together, for texts without end.

    Raises:
        OptionError: the budget is no size, or both a budget and a window were given.
    """

    layout: str | None = None
    budget: str | int | None = None
    window: int | None = None

    def __post_init__(self) -> None:
        if self.budget is not None and self.window is not None:
            raise OptionError("a KV budget and a window both set the cache's size; give one")
        if isinstance(self.budget, str):
            parse_size(self.budget)

    def apply(self, manifest: Manifest, lowering: str = CHAIN) -> tuple[Manifest, str]:
        """The manifest of the bundle as it will run.

        Args:
            manifest: of the bundle.
            lowering: the device's form of the graph.

        Returns:
            The manifest with the layout and capacity alone that were asked for, and a line that
            says how large the cache is; empty if no budget was given.

        Raises:
            OptionError: the bundle or the device lacks the layout, or the budget is too small.
            BundleError: the bundle's cache has one size only.
        """
        chosen = choose_layout(manifest, self.layout)
        if lowering != CHAIN and chosen.kv != manifest.kv:
            raise OptionError(
                f"{lowering} runs the layout {layouts_of(manifest)[0]} alone, not {self.layout}; "
                "use the cpu, or that layout"
            )
        if lowering != CHAIN and self.window is not None:
            raise OptionError(f"a window of the KV cache runs on the cpu, not on {lowering}")
        if self.window is not None:
            return with_capacity(chosen, self.window, lowering), ""
        if self.budget is None:
            return chosen, ""
        nbytes = parse_size(self.budget) if isinstance(self.budget, str) else self.budget
        plan = plan_capacity(chosen.kv, nbytes)
        return with_capacity(chosen, plan.capacity, lowering), plan.text

    def arena(self, manifest: Manifest) -> WindowArena | None:
        """The window's cache for a manifest that `apply` gave, or None for the ordinary one.

        Raises:
            OptionError: the window is too small, or the layout's keys cannot be rotated.
            BundleError: the bundle does not say how keys are rotated.
        """
        # Imported here: onnxruntime takes long to import, and wrong input should be told before.
        from forerun.runtime.window import open_window

        return None if self.window is None else open_window(manifest, self.window)
