"""A model that drafts for itself: its own steps with many feed-forward blocks left out.

Draft and verification share weights and KV cache, so the drafter costs no memory at all
(self-speculative decoding, Zhang et al. 2024, arXiv 2309.08168, with FFN-SkipLLM's blocks). What
the drafts wrote into the cache is dropped before the full model verifies them. Attention, head and
norms remain in every draft step, which bounds the gain: with a share s of the step's time skipped,
n drafts cost n * (1 - s) steps and must save more than that.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from forerun.errors import UnsupportedError
from forerun.runtime.drafting.coupled import CoupledPick
from forerun.runtime.drafting.tree import TokenTree
from forerun.runtime.drafting.vocab import identity
from forerun.runtime.skipping import Fixed, Skip, SkipRule, static_skip

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from forerun.runtime.drafting.drafter import Outcome
    from forerun.runtime.manifest import Manifest
    from forerun.runtime.types import SamplingParams

# Share of the blocks that a draft step leaves out.
SHARE = 0.25


class SkipDrafter:
    """Drafts chains with the target's own runner.

    Args:
        runner: the target's; its KV cache holds the text but for the anchor whenever `propose` is
            called, and again when it returns.
        rule: what a draft step skips.
        name: of the drafter in statistics.
    """

    needs_features = False
    proposes_trees = False

    def __init__(self, runner: Any, rule: SkipRule, name: str = "skip") -> None:
        self.name = name
        self._runner, self._rule = runner, rule
        self._pick = CoupledPick(identity(runner.manifest.model.vocab))
        self._ids: list[int] = []
        self._answer_start = 0

    def configure(self, params: SamplingParams, skipped: int = 0) -> None:
        """Rank as the target draws; see `combine.configure`."""
        self._pick.configure(params, skipped)

    def begin(self, ids: Sequence[int], features: Any = None) -> None:
        """Take up a text."""
        self._ids = list(ids)
        self._answer_start = max(len(ids) - 1, 0)

    def propose(self, budget: int, keep_going: Callable[[float], bool] | None = None) -> TokenTree:
        """Draft a chain of at most `budget` tokens, and leave the cache as it was."""
        runner, length = self._runner, self._runner.arena.length
        if budget < 1 or length != len(self._ids) - 1:
            return TokenTree.EMPTY
        before, runner.skipping = runner.skipping, self._rule
        try:
            return self._chain(budget, keep_going)
        finally:
            runner.skipping = before
            # A step that was broken off may have emptied the cache.
            runner.arena.rewind(min(length, runner.arena.length))

    def observe(self, outcome: Outcome) -> None:
        """Append what was decided."""
        self._ids += outcome.new_tokens

    def rewind(self, length: int) -> None:
        """Forget the tokens from `length` on."""
        del self._ids[length:]

    def close(self) -> None:
        """Nothing to free: the runner is the target's."""

    def _chain(self, budget: int, keep_going: Callable[[float], bool] | None) -> TokenTree:
        text = list(self._ids)
        tokens: list[int] = []
        confidences: list[float] = []
        value = 1.0
        while len(tokens) < budget:
            if tokens and keep_going is not None and not keep_going(value):
                break
            logits = self._runner.step(text[-1:])[0]
            new, sure = self._pick.choose(logits, len(text), 1, text, self._answer_start)
            text += new
            tokens += new
            confidences += sure
            value *= sure[0]
        return TokenTree.chain(tokens, confidences, self.name)


def open_skip(runner: Any, share: float = SHARE) -> SkipDrafter:
    """Let a model draft for itself.

    Args:
        runner: of the target.
        share: of the blocks to skip in draft steps.

    Raises:
        UnsupportedError: its graph cannot skip blocks.
    """
    manifest = runner.manifest
    if manifest.skipping is None:
        raise UnsupportedError(
            f"the drafter skip needs a bundle that can skip feed-forward blocks, and "
            f"{manifest.name} cannot; quantize its float32 bundle with --skipping"
        )
    if not getattr(runner, "can_skip", False):
        raise UnsupportedError(
            f"the drafter skip needs a graph that can skip feed-forward blocks, and that of "
            f"{manifest.name} for {runner.device} cannot; run it on the cpu"
        )
    return SkipDrafter(runner, draft_rule(manifest, share))


def draft_rule(manifest: Manifest, share: float) -> SkipRule:
    """What draft steps skip: adaptive where it was calibrated that far, else a fixed set.

    There is no warm-up, since a wrong draft costs nothing but its time.
    """
    found, layers = manifest.skipping, manifest.model.layers
    assert found is not None
    ratios = [level.ratio for level in found.levels]
    if ratios and min(ratios) <= share <= max(ratios):
        level = min(found.levels, key=lambda level: abs(level.ratio - share))
        return Fixed("draft", Skip(np.ones(layers, bool), level.tau, level.run), 0)
    return Fixed("draft", static_skip(found, layers, share), 0)
