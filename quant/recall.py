"""Whether a model still finds what it read long ago: pairs at known depths, asked for at the end.

Sentences such as "The lantern number is 4821." stand between ordinary prose. The text is read once;
then every sentence is begun again behind it, and the model must complete the number. A pair is
recalled if all tokens of its number are the most probable ones, which is what greedy decoding
would write. Words and numbers come from a fixed seed.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from forerun.errors import ContextLimitError, OptionError
from forerun.quant.measure_divergence import Stream, log_softmax, prefill, run_rows

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from forerun.quant.measure_divergence import Progress

DEPTHS = (256, 1024, 2048, 4096)
PAIRS = 10
_SAY, _ASK = "\n\nThe {} number is {}.\n\n", "\n\nThe {} number is"
_SEED = 4
# The question, the number, and a little more.
_ROOM = 64
_LEAST = 96
# Tokens before a question that are read row by row where only such steps show what is judged:
# skipping of feed-forward blocks begins a few rows behind a prompt.
_LEAD = 32
_WORDS = (
    "apple river candle mountain violin harbor garden silver window rocket pepper castle marble "
    "lantern forest pencil thunder blanket copper dolphin engine feather guitar hammer island "
    "jacket kettle ladder meadow needle orange parrot quilt ribbon saddle ticket umbrella valley "
    "wagon yellow zebra anchor basket camera dragon falcon bridge cherry desert eagle flower "
    "glacier honey igloo jungle kitten lemon mirror nutmeg oyster pillow rabbit shadow temple"
)


@dataclass(frozen=True)
class Query:
    """One pair: how many tokens before the end it begins, what asks for it, and its answer."""

    depth: int
    ask: np.ndarray
    answer: np.ndarray


@dataclass(frozen=True)
class RecallText:
    """Token ids int64 [T] to read once, and what to ask then."""

    ids: np.ndarray
    queries: tuple[Query, ...]


def depths_within(limit: int, depths: tuple[int, ...] = DEPTHS) -> tuple[int, ...]:
    """Depths that a cache of `limit` tokens holds beside a question; at least one if it can."""
    fitting = tuple(depth for depth in depths if depth + _ROOM <= limit)
    return fitting or ((limit - _ROOM,) if limit - _ROOM >= _LEAST else ())


def recall_text(
    tokenizer: Tokenizer,
    filler: list[int],
    bos: list[int],
    depths: tuple[int, ...] = DEPTHS,
    pairs: int = PAIRS,
) -> RecallText:
    """Lay out pairs in prose: at every depth a group that begins so many tokens before the end.

    Args:
        tokenizer: of the model.
        filler: ids of prose, at least as many as the largest depth.
        bos: ids that begin the text.
        depths: tokens before the end, where the first pair of a group begins.
        pairs: of a group; fewer where the next group begins before.

    Raises:
        OptionError: not even one pair fits, or there are too many of them.
    """
    ordered = sorted(depths)
    most = len(_WORDS.split()) // len(ordered)
    if pairs > most:
        raise OptionError(f"at most {most} pairs at each of {len(ordered)} depths, got {pairs}")
    source = random.Random(_SEED)
    words = source.sample(_WORDS.split(), pairs * len(ordered))
    numbers = source.sample(range(1000, 10000), len(words))
    made = [_pair(tokenizer, *pair) for pair in zip(words, numbers, strict=True)]
    ids: list[int] = []
    queries: list[Query] = []
    for index in reversed(range(len(ordered))):
        depth, nearer = ordered[index], ordered[index - 1] if index else 0
        group = made[index * pairs : (index + 1) * pairs]
        laid, kept = _group(group, filler[len(ids) :], depth, depth - nearer)
        ids += laid
        queries += kept
    if not queries:
        raise OptionError(f"no pair fits into {max(ordered)} tokens")
    text = ids[len(bos) :]
    return RecallText(np.array(bos + text, np.int64), tuple(queries))


def recall(stream: Stream, text: RecallText, progress: Progress | None = None) -> dict[str, Any]:
    """Read the text once and ask for every pair.

    Args:
        stream: an open model; with `rows_per_step` the last tokens of the text, the questions and
            the answers are read so many rows at a time.
        text: from `recall_text`.
        progress: called with (stage, done, total) in tokens and questions read.

    Returns:
        recall (percent of the pairs), nll (mean of -log p of a number's tokens, in nats), queries,
        and by_depth: the same for every depth.
    """
    report = progress or (lambda stage, done, total: None)
    total = len(text.ids) + _ROOM * len(text.queries)
    cut = len(text.ids) - (_LEAD if stream.rows_per_step else 0)
    before, lead = text.ids[:cut], text.ids[cut:]
    _read(stream, before, lambda done: report("recall", done, total))
    found: dict[int, list[tuple[bool, float]]] = {}
    for number, query in enumerate(text.queries, start=1):
        _back(stream, before)
        found.setdefault(query.depth, []).append(_ask(stream, lead, query))
        report("recall", len(text.ids) + _ROOM * number, total)
    by_depth = {str(depth): _score(found[depth]) for depth in sorted(found)}
    return {**_score([one for group in found.values() for one in group]), "by_depth": by_depth}


def _pair(tokenizer: Tokenizer, word: str, number: int) -> tuple[list[int], Query]:
    def encode(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False).ids

    ask = encode(_ASK.format(word))
    whole = encode(f"{_ASK.format(word)} {number}")
    # A tokenizer that merges across the border asks with the part that both have in common.
    same = next((i for i, (a, b) in enumerate(zip(ask, whole, strict=False)) if a != b), len(ask))
    query = Query(0, np.array(whole[:same], np.int64), np.array(whole[same:], np.int64))
    return encode(_SAY.format(word, number)), query


def _group(
    pairs: list[tuple[list[int], Query]], filler: list[int], depth: int, room: int
) -> tuple[list[int], list[Query]]:
    """Tokens from `depth` before the end until the next group, and the queries of its pairs."""
    longest = max(len(said) for said, _ in pairs)
    count = min(len(pairs), room // longest)
    gap = min(longest, (room - count * longest) // max(count, 1))
    laid: list[int] = []
    queries = []
    for said, query in pairs[:count]:
        queries.append(Query(depth, query.ask, query.answer))
        laid += said + filler[len(laid) : len(laid) + gap]
    return laid + filler[len(laid) : room], queries


def _read(stream: Stream, ids: np.ndarray, done: Any) -> None:
    stream.runner.arena.rewind(0)
    prefill(stream.runner, ids, done)


def _back(stream: Stream, ids: np.ndarray) -> None:
    """Forget the last question; a cache that dropped rows in the meantime reads all again."""
    try:
        stream.runner.arena.rewind(len(ids))
    except (OptionError, ContextLimitError):
        _read(stream, ids, lambda done: None)


def _ask(stream: Stream, lead: np.ndarray, query: Query) -> tuple[bool, float]:
    count = len(query.answer)
    told = np.concatenate([lead, query.ask, query.answer[:-1]])
    if stream.rows_per_step:
        logits = run_rows(stream, told)[-count:]
    else:
        # One step of many rows and one of a few: what a prompt and a checked draft are.
        first = prefill(stream.runner, told[: len(told) - count + 1])[None].copy()
        rest = told[len(told) - count + 1 :]
        logits = np.concatenate([first, run_rows(stream, rest)]) if len(rest) else first
    p = log_softmax(logits)[np.arange(count), query.answer]
    return bool((logits.argmax(-1) == query.answer).all()), float(-p.mean())


def _score(found: list[tuple[bool, float]]) -> dict[str, Any]:
    right, nll = zip(*found, strict=True)
    return {
        "recall": 100 * sum(right) / len(right),
        "nll": float(np.mean(nll)),
        "queries": len(right),
    }
