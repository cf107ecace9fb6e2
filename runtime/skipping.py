"""Which feed-forward blocks a decoding step leaves out, and the rules that decide it.

Attention always runs, so the KV cache is complete whatever is skipped. Three rules:

* adaptive (FFN-SkipLLM, Jaiswal et al. 2024, arXiv 2404.03865): the graph itself measures how
  little a block changed the residual stream and skips the next ones;
* static: always the same blocks, the least harmful of the calibration;
* decode (SkipDecode, Del Corro et al. 2023, arXiv 2307.02628): the further the answer, the more
  blocks are skipped, lower ones first, so that what is computed only ever shrinks.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

from forerun.errors import OptionError

if TYPE_CHECKING:
    from forerun.runtime.manifest import Manifest, SkipLevel, Skipping

NO_SKIPPING, _DEFAULT = "off", "default"
# No cosine reaches it.
_NEVER = np.float32(np.inf)
_SPAN, _LONGEST = 256, 1 << 20
# Shares are decimals, and floats only near them.
_CLOSE = 1e-6
_WARM_LAYERS = 1
_HOW = "give a share such as 0.25, adaptive:0.25, static:0.25, decode:0.25 or decode:0.25:256"


@dataclass(frozen=True, eq=False)
class Skip:
    """What one step may leave out.

    Attributes:
        flags: bool [layers], False skips that layer's block.
        tau: cosine from which the adaptive rule skips; infinite turns it off.
        run: blocks that it skips then.
    """

    flags: np.ndarray
    tau: float = float(_NEVER)
    run: int = 0


class FfnGate:
    """The inputs of a graph that say what to skip, and its count of what ran, in place.

    Args:
        layers: of the model.

    Attributes:
        flags: bool [layers].
        tau: float32 [].
        run: int32 [].
        ran: int32 [], blocks that ran in the last step.
    """

    def __init__(self, layers: int) -> None:
        self.flags = np.ones(layers, bool)
        self.tau = np.array(_NEVER, np.float32)
        self.run = np.zeros((), np.int32)
        self.ran = np.zeros((), np.int32)
        self._set: Skip | None = None

    def set(self, skip: Skip | None) -> None:
        """Let the next steps skip; None lets every block run."""
        if skip is self._set:
            return
        self._set = skip
        self.flags[:] = True if skip is None else skip.flags
        self.tau[...] = _NEVER if skip is None else skip.tau
        self.run[...] = 0 if skip is None else skip.run


class Singles:
    """Counts steps of a single row that follow each other, and the blocks they ran.

    Args:
        layers: of the model.

    Attributes:
        ran: blocks that such steps ran so far.
        possible: blocks there were.
    """

    def __init__(self, layers: int) -> None:
        self.ran = self.possible = 0
        self._layers = layers
        self._steps, self._length = 0, -1

    def before(self, length: int) -> int:
        """How many came one behind the other before a step on `length` cached tokens."""
        if length != self._length:
            # A rewind, or a cache that lost its rows.
            self._steps = 0
        return self._steps

    def note(self, rows: int, length: int, gate: FfnGate | None) -> None:
        """Take note of a step that left `length` cached tokens."""
        self._steps, self._length = (self._steps + 1 if rows == 1 else 0), length
        if rows == 1:
            self.ran += self._layers if gate is None else int(gate.ran)
            self.possible += self._layers

    def end(self) -> None:
        """A tree ran: the next single row is the first one again."""
        self._steps = 0


class SkipRule(Protocol):
    """Decides what a step of a single row may skip; steps of several rows never skip.

    Attributes:
        name: what it is called in options and statistics.
    """

    name: str

    def choose(self, steps: int) -> Skip | None:
        """What to skip, None for nothing.

        Args:
            steps: single-row steps since the last prompt, verification or rewind; 0 for the first.
        """
        ...


class Fixed:
    """The same for every step after the first `warmup` ones: the adaptive and the static rule."""

    def __init__(self, name: str, skip: Skip, warmup: int) -> None:
        self.name, self._skip, self._warmup = name, skip, warmup

    def choose(self, steps: int) -> Skip | None:
        """See `SkipRule.choose`."""
        return self._skip if steps >= self._warmup else None


class Schedule:
    """SkipDecode: the number of computed blocks falls linearly with the token's number.

    Args:
        name: of the rule.
        layers: of the model.
        skippable: layers in the order in which they drop out.
        most: how many of them are skipped in the end.
        span: tokens until then.
        warmup: first tokens that run in full.
    """

    def __init__(
        self, name: str, layers: int, skippable: range, most: int, span: int, warmup: int
    ) -> None:
        self.name, self._span, self._warmup = name, span, warmup
        self._skips: list[Skip | None] = [None]
        for count in range(1, most + 1):
            flags = np.ones(layers, bool)
            flags[skippable[:count]] = False
            self._skips.append(Skip(flags))

    def choose(self, steps: int) -> Skip | None:
        """See `SkipRule.choose`."""
        done = min(max(steps - self._warmup, 0), self._span)
        return self._skips[(len(self._skips) - 1) * done // self._span]


def parse_skipping(text: str, manifest: Manifest) -> SkipRule | None:
    """The rule that an option asks for.

    Args:
        text: ``off``, ``default``, a share of the blocks to skip (adaptive), ``adaptive:SHARE``,
            ``static:SHARE`` or ``decode:SHARE[:TOKENS]``.
        manifest: of the model.

    Returns:
        None if nothing is to be skipped.

    Raises:
        OptionError: another text, a bundle that cannot skip, more than its calibration allows, or
            less than a block.
    """
    return read_skipping(text).rule(manifest)


def read_skipping(text: str) -> SkipWish:
    """What an option says, before there is a bundle; texts as in `parse_skipping`.

    Raises:
        OptionError: another text, or no text at all.
    """
    if not isinstance(text, str):
        kind = type(text).__name__
        raise OptionError(f"skipping is {text!r}, of the type {kind}; {_HOW}, default or off")
    words = text.strip().lower().split(":")
    if words in ([NO_SKIPPING], [_DEFAULT]):
        return SkipWish(words[0])
    if words[0] not in RULES:
        words = ["adaptive", *words]
    kind, *numbers = words
    if not 1 <= len(numbers) <= (2 if kind == "decode" else 1):
        raise OptionError(f"skipping {text!r} is not known; {_HOW}, default or off")
    share, span = _number(numbers[0], text), _SPAN
    if not 0 <= share <= 1:
        raise OptionError(f"the share to skip must be in 0..1, got {numbers[0]}")
    if len(numbers) == 2:
        span = _number(numbers[1], text)
        if not 1 <= span <= _LONGEST or span != int(span):
            raise OptionError(f"the tokens of {text!r} must be a whole number from 1 to {_LONGEST}")
    return SkipWish(kind if share else NO_SKIPPING, share, int(span))


@dataclass(frozen=True)
class SkipWish:
    """What was asked for.

    Attributes:
        kind: ``off``, ``default`` or one of `RULES`.
        share: of the blocks to skip.
        span: tokens after which ``decode`` skips that many.
    """

    kind: str
    share: float = 0.0
    span: int = _SPAN

    def rule(self, manifest: Manifest) -> SkipRule | None:
        """The rule for a model, None if nothing is to be skipped; errors as of `parse_skipping`."""
        found = manifest.skipping
        if self.kind == NO_SKIPPING:
            return None
        if found is None:
            raise OptionError(
                f"{manifest.name} cannot skip feed-forward blocks; "
                "quantize its float32 bundle with --skipping"
            )
        if self.kind == _DEFAULT:
            return read_skipping(repr(found.default)).rule(manifest)
        return RULES[self.kind](self, manifest, found)


def _adaptive(wish: SkipWish, manifest: Manifest, found: Skipping) -> SkipRule:
    ratios = [level.ratio for level in found.levels]
    _check_share(wish, max(ratios, default=0.0), "adaptive", manifest)
    least = min(ratios, default=1.0)
    if wish.share < least - _CLOSE:
        raise OptionError(
            f"{manifest.name} skips {least:.2g} of its feed-forward blocks or more "
            f"(adaptive), got {wish.share:g}; give at least that, or off"
        )
    level = level_within(found, wish.share)
    flags = np.ones(manifest.model.layers, bool)
    skip = Skip(flags, level.tau, level.run)
    return Fixed(f"adaptive:{level.ratio:g}", skip, _warmup(found))


def _static(wish: SkipWish, manifest: Manifest, found: Skipping) -> SkipRule:
    layers = manifest.model.layers
    _check_share(wish, len(found.order) / layers, "static", manifest)
    _check_blocks(wish, manifest)
    skip = static_skip(found, layers, wish.share)
    return Fixed(f"static:{wish.share:g}", skip, _warmup(found))


def _decode(wish: SkipWish, manifest: Manifest, found: Skipping) -> SkipRule:
    layers = manifest.model.layers
    skippable = range(max(found.first, _WARM_LAYERS), found.stop)
    _check_share(wish, len(skippable) / layers, "decode", manifest)
    most = _check_blocks(wish, manifest)
    name = f"decode:{wish.share:g}:{wish.span}"
    return Schedule(name, layers, skippable, most, wish.span, _warmup(found))


RULES: dict[str, Callable[[SkipWish, Manifest, Skipping], SkipRule]] = {
    "adaptive": _adaptive,
    "static": _static,
    "decode": _decode,
}


def level_within(found: Skipping, share: float) -> SkipLevel:
    """The calibrated level that skips most without skipping more than a share.

    Args:
        found: with a level that skips no more.
        share: of the blocks.
    """
    within = (level for level in found.levels if level.ratio <= share + _CLOSE)
    return max(within, key=lambda level: level.ratio)


def static_skip(found: Skipping, layers: int, share: float) -> Skip:
    """A share of all layers' blocks, the least harmful first."""
    flags = np.ones(layers, bool)
    flags[list(found.order[: _count(share, layers)])] = False
    return Skip(flags)


def _count(share: float, layers: int) -> int:
    # Not above the share, but 0.3 of 30 layers are 9, whatever floats say.
    return int(share * layers + _CLOSE)


def _warmup(found: Skipping) -> int:
    # The first single row behind anything else may be the end of a prompt, which never skips.
    return max(found.warmup, 1)


def _check_share(wish: SkipWish, largest: float, kind: str, manifest: Manifest) -> None:
    if wish.share > largest + _CLOSE:
        raise OptionError(
            f"{manifest.name} can skip at most {largest:.2f} of its feed-forward blocks "
            f"({kind}), got {wish.share:g}"
        )


def _check_blocks(wish: SkipWish, manifest: Manifest) -> int:
    """How many blocks a share is, one at least."""
    layers = manifest.model.layers
    count = _count(wish.share, layers)
    if not count:
        raise OptionError(
            f"{wish.share:g} of the {layers} feed-forward blocks of {manifest.name} is less than "
            f"one; give at least {math.ceil(1e4 / layers) / 1e4:g}, or off"
        )
    return count


def _number(word: str, text: str) -> float:
    try:
        return float(word)
    except ValueError:
        raise OptionError(f"skipping {text!r} is not known; {_HOW}, default or off") from None
