"""The prompts of `forerun bench draft`: own texts, in six kinds of work that drafters differ on."""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib import resources
from typing import TYPE_CHECKING

from forerun.errors import OptionError

if TYPE_CHECKING:
    from collections.abc import Sequence

CATEGORIES = {
    "chat": "questions whose answers repeat little",
    "summarise": "a short version of a given text",
    "rewrite": "a given text with corrections or replacements",
    "code": "functions to write, mend or extend",
    "json": "records and configurations as JSON",
    "copy": "a given text repeated, with its form or a word changed",
}


@dataclass(frozen=True)
class Prompt:
    """A user's message.

    Attributes:
        category: one of `CATEGORIES`.
        number: of the prompt in its category, from 0.
        text: what the user says; the model's chat template is not applied yet.
    """

    category: str
    number: int
    text: str


def load_prompts(categories: Sequence[str] = (), limit: int | None = None) -> list[Prompt]:
    """Return prompts, one of each category by turns, so that any beginning of them is mixed.

    Args:
        categories: which; none given means all.
        limit: most prompts of each category.

    Raises:
        OptionError: a category is not known, or the limit is not positive.
    """
    unknown = [name for name in categories if name not in CATEGORIES]
    if unknown:
        raise OptionError(
            f"category {unknown[0]!r} is not known; there are {', '.join(CATEGORIES)}"
        )
    if limit is not None and limit < 1:
        raise OptionError(f"the limit is {limit} prompts; it must be at least 1")
    path = resources.files("forerun.apps.bench").joinpath("prompts/draft.json")
    texts: dict[str, list[str]] = json.loads(path.read_text(encoding="utf-8"))
    chosen = [
        Prompt(category, number, text)
        for category in texts
        if not categories or category in categories
        for number, text in enumerate(texts[category][:limit])
    ]
    return sorted(chosen, key=lambda prompt: prompt.number)
