"""What is measured in which turn: the same token ids for every runtime."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from forerun.errors import OptionError

if TYPE_CHECKING:
    from collections.abc import Sequence

PREFILL_TOKENS = 512
SHORT_TOKENS = 16
FIRST_TOKEN_PROMPT = 20
NEW_TOKENS = 64
_ROUND_CONTEXT = 256


@dataclass(frozen=True)
class Measure:
    """One request to a worker.

    Attributes:
        depth: of the row it belongs to.
        prompt: token ids.
        tokens: how many to generate; the first one ends the prefill.
        gives: which figures of the row it measures.
    """

    depth: int
    prompt: tuple[int, ...]
    tokens: int
    gives: frozenset[str]


def make_plan(
    ids: Sequence[int], depths: Sequence[int], runs: int
) -> dict[tuple[int, int], list[Measure]]:
    """Return (depth, run) to what is measured in that turn; run -1 is the warm-up.

    Every run reads another stretch of the text, so that no runtime can profit from a cache of
    prompts. At depth 0 a prompt of `SHORT_TOKENS` stands before decoding, the time to the first
    token is that of a prompt of `FIRST_TOKEN_PROMPT` tokens, and the prefill that of
    `PREFILL_TOKENS` tokens. At other depths all three come from one prompt of that many tokens.

    Args:
        ids: token ids of a text.
        depths: see above.
        runs: repetitions.

    Raises:
        OptionError: the text is too short for the depths.
    """
    longest_prompt = max(*depths, PREFILL_TOKENS, FIRST_TOKEN_PROMPT)
    stride = (len(ids) - longest_prompt) // (runs + 1)
    if stride < 1:
        raise OptionError(
            f"the text has {len(ids)} tokens, too few for depth {max(depths)} and {runs} runs"
        )

    def prompt(run: int, length: int) -> tuple[int, ...]:
        start = (run + 1) * stride
        return tuple(ids[start : start + length])

    return {
        (depth, run): _turn(depth, run, prompt, depths)
        for depth in depths
        for run in range(-1, runs)
    }


def _turn(depth: int, run: int, prompt, depths: Sequence[int]) -> list[Measure]:
    if depth > 0:
        gives = frozenset({"prefill", "first_token", "decode"})
        return [Measure(depth, prompt(run, depth), NEW_TOKENS, gives)]
    short = prompt(run, FIRST_TOKEN_PROMPT)
    measures = [
        Measure(0, short, 1, frozenset({"first_token"})),
        # Other tokens than the prompt before, for the sake of prompt caches.
        Measure(0, prompt(run, 2 * SHORT_TOKENS)[SHORT_TOKENS:], NEW_TOKENS, frozenset({"decode"})),
    ]
    if PREFILL_TOKENS not in depths:
        measures.append(Measure(0, prompt(run, PREFILL_TOKENS), 1, frozenset({"prefill"})))
    return measures


def prefill_tokens(depth: int) -> int:
    """Length of the prompt whose prefill stands in the row of a depth."""
    return depth or PREFILL_TOKENS


def longest(depths: Sequence[int]) -> int:
    """Most tokens that are in a cache at once."""
    return max(max(depths), SHORT_TOKENS) + NEW_TOKENS


def context_for(depths: Sequence[int]) -> int:
    """Context that runtimes which ask for one are opened with."""
    needed = max(longest(depths), PREFILL_TOKENS + 1) + 1
    return -(-needed // _ROUND_CONTEXT) * _ROUND_CONTEXT
