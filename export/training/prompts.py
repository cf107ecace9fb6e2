"""Prompts from templates, in an order that depends on a seed alone."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from forerun.export.training import prompt_texts as texts

# Prompts sorted by length at a time; more leaves less padding, and less variety in a batch.
_SORTED_BATCHES = 8
_HELD_OUT_PER_TEMPLATE = 16
_GREEDY_EVERY = 3


@dataclass(frozen=True)
class Prompt:
    """A prompt and how it is to be answered.

    Attributes:
        ids: of the whole prompt, chat template included.
        template: number of its template.
        category: kind of prompt.
        greedy: the answer is the argmax at every position.
        held_out: only for evaluation.
    """

    ids: list[int]
    template: int
    category: str
    greedy: bool
    held_out: bool


def templates() -> list[tuple[str, str, bool]]:
    """All templates as (category, text, held out); numbers of templates count these."""
    kept = [(c, t, False) for c, group in texts.TEMPLATES.items() for t in group]
    return kept + [(c, t, True) for c, group in texts.HELD_OUT.items() for t in group]


def fingerprint() -> str:
    """Hash of all but the seed that decides which prompts there are, and in which order."""
    words = [texts.TOPICS, texts.NAMES, texts.PLACES, texts.SENTENCES, texts.BROKEN]
    counts = [_SORTED_BATCHES, _HELD_OUT_PER_TEMPLATE, _GREEDY_EVERY]
    parts = [templates(), *words, texts.PARAGRAPHS, counts]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def fill(template: str, rng: random.Random) -> str:
    """Fill the slots of a template."""
    topic, other = rng.sample(texts.TOPICS, 2)
    return template.format(
        t=topic,
        u=other,
        n=rng.randint(2, 10),
        a=rng.randint(11, 99),
        b=rng.randint(11, 99),
        name=rng.choice(texts.NAMES),
        place=rng.choice(texts.PLACES),
        sentence=rng.choice(texts.SENTENCES),
        broken=rng.choice(texts.BROKEN),
        paragraph=rng.choice(texts.PARAGRAPHS),
    )


def prompt_batches(
    seed: int, batch: int, encode: Callable[[str], list[int]], limit: int = 1 << 30
) -> Iterator[list[Prompt]]:
    """Yield batches without end; those for evaluation come first.

    Args:
        seed: of the order and of what fills the slots.
        batch: prompts in a batch.
        encode: turns a user's message into the ids of a prompt.
        limit: longest prompt in tokens; longer ones are left out.
    """
    rng = random.Random(f"prompts-{seed}")
    numbered = list(enumerate(templates()))
    seen: set[str] = set()

    def make(chosen: list[tuple[int, tuple[str, str, bool]]]) -> list[Prompt]:
        prompts = []
        for number, (category, text, held_out) in chosen:
            message = fill(text, rng)
            if message in seen and "{" in text:
                continue
            seen.add(message)
            greedy = held_out or rng.randrange(_GREEDY_EVERY) == 0
            ids = encode(message)
            if len(ids) <= limit:
                prompts.append(Prompt(ids, number, category, greedy, held_out))
        return prompts

    held_out = [item for item in numbered if item[1][2]]
    yield from _cut(make(held_out * _HELD_OUT_PER_TEMPLATE), batch, rng)
    rest = [item for item in numbered if not item[1][2]]
    pool: list[Prompt] = []
    while True:
        # Every template equally often, each time with other words in its slots.
        rng.shuffle(rest)
        pool += make(rest)
        if len(pool) >= batch * _SORTED_BATCHES:
            count = len(pool) // batch * batch
            yield from _cut(pool[:count], batch, rng)
            pool = pool[count:]


def _cut(prompts: list[Prompt], batch: int, rng: random.Random) -> list[list[Prompt]]:
    """Batches of prompts of like length, in random order."""
    prompts = sorted(prompts, key=lambda p: len(p.ids))
    batches = [prompts[i : i + batch] for i in range(0, len(prompts), batch)]
    rng.shuffle(batches)
    return batches
