"""Gives every drafter its turns: plain and drafted answers to one prompt right after each other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from forerun.runtime.types import SamplingParams, Stats

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from forerun.apps.bench.draft_prompts import Prompt

PLAIN = "none"
_WARMUP_TEXT = "Say the days of the week."
_WARMUP_TOKENS = 8


@dataclass(frozen=True)
class Answer:
    """What one generation gave.

    Attributes:
        tokens: ids of the answer.
        seconds: decode time, from the first token to the last one.
        stats: all the runtime measured.
    """

    tokens: tuple[int, ...]
    seconds: float
    stats: Stats

    @property
    def later(self) -> int:
        """Tokens that `seconds` is the time of."""
        return len(self.tokens) - 1


class Engine(Protocol):
    """A loaded model that answers with any drafter."""

    def ids(self, text: str) -> list[int]:
        """The prompt that a user's message becomes."""
        ...

    def answer(
        self, drafter: str, ids: Sequence[int], params: SamplingParams, max_tokens: int
    ) -> Answer:
        """Answer with nothing cached; drafters keep what they learnt since `restart`."""
        ...

    def restart(self) -> None:
        """Load the model and its drafters anew, so that they know no text."""
        ...

    def close(self) -> None:
        """Free the model."""
        ...


@dataclass(frozen=True)
class Sample:
    """One answer, and where it belongs.

    Attributes:
        prompt: that was answered.
        drafter: name; `PLAIN` is decoding without one.
        temperature: of the sampling.
        seed: of the sampling.
        repeat: number of the repetition, from 0.
        answer: what came.
    """

    prompt: Prompt
    drafter: str
    temperature: float
    seed: int
    repeat: int
    answer: Answer

    @property
    def text_key(self) -> tuple[str, int, float, int, int]:
        """The same for samples whose answers must be the same text, in the same repetition."""
        prompt = self.prompt
        return prompt.category, prompt.number, self.temperature, self.seed, self.repeat


@dataclass(frozen=True)
class Plan:
    """What is measured.

    Attributes:
        prompts: in order.
        drafters: beside `PLAIN`.
        settings: (temperature, seed) pairs.
        repeat: repetitions of everything.
        max_tokens: most tokens of an answer.
    """

    prompts: tuple[Prompt, ...]
    drafters: tuple[str, ...]
    settings: tuple[tuple[float, int], ...]
    repeat: int
    max_tokens: int

    @property
    def answers(self) -> int:
        """How many answers that makes."""
        rounds = len(self.prompts) * len(self.settings) * self.repeat
        return rounds * (len(self.drafters) + 1)


def settings_for(temperatures: Sequence[float], seeds: int) -> tuple[tuple[float, int], ...]:
    """Pairs of temperature and seed; greedy decoding needs one seed only."""
    return tuple(
        (temperature, seed)
        for temperature in temperatures
        for seed in range(seeds if temperature > 0 else 1)
    )


def measure(
    engine: Engine,
    plan: Plan,
    progress: Callable[[str, int, int | None], None] = lambda stage, done, total: None,
    stopped: Callable[[], bool] = lambda: False,
) -> list[Sample]:
    """Answer every prompt with every drafter, by turns.

    A pass over the prompts is one repetition of one setting. Drafters learn from text to text, as
    they do for a user, but each pass begins with fresh ones: none may have seen an answer before.
    The order is rotated from prompt to prompt, so that no drafter always follows the same one.

    Args:
        engine: the loaded model.
        plan: what to measure.
        progress: told the answers made and all there are.
        stopped: asked after each answer; True ends the measurement.

    Returns:
        All samples; of a pass that was not finished those of the prompts that are complete, and
        none if it was a repetition.
    """
    samples: list[Sample] = []
    count = 0

    def tell() -> None:
        nonlocal count
        count += 1
        progress("answers", count, plan.answers)

    for repeat in range(plan.repeat):
        for temperature, seed in plan.settings:
            found, complete = _one_pass(engine, plan, (temperature, seed, repeat), tell, stopped)
            if complete or repeat == 0:
                samples += found
            if not complete:
                return samples
    return samples


def _one_pass(
    engine: Engine,
    plan: Plan,
    key: tuple[float, int, int],
    tell: Callable[[], None],
    stopped: Callable[[], bool],
) -> tuple[list[Sample], bool]:
    """Samples of the prompts that were finished, and whether all of them were."""
    temperature, seed, repeat = key
    params = SamplingParams(temperature=temperature, seed=seed)
    arms = (PLAIN, *plan.drafters)
    samples: list[Sample] = []
    if not _warm_up(engine, arms, min(_WARMUP_TOKENS, plan.max_tokens), stopped):
        return samples, False
    for turn, prompt in enumerate(plan.prompts, start=repeat):
        ids, fresh = engine.ids(prompt.text), []
        for arm in _rotated(arms, turn):
            answer = engine.answer(arm, ids, params, plan.max_tokens)
            if stopped():
                return samples, False
            fresh.append(Sample(prompt, arm, temperature, seed, repeat, answer))
            tell()
        samples += fresh
    return samples, True


def _warm_up(engine: Engine, arms: Sequence[str], tokens: int, stopped: Callable[[], bool]) -> bool:
    """Open fresh drafters and run each once; False if it was stopped."""
    engine.restart()
    ids = engine.ids(_WARMUP_TEXT)
    for arm in arms:
        if stopped():
            return False
        engine.answer(arm, ids, SamplingParams(), tokens)
    return not stopped()


def _rotated(arms: Sequence[str], by: int) -> list[str]:
    start = by % len(arms)
    return [*arms[start:], *arms[:start]]
