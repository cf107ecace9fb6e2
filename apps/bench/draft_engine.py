"""The model under test, answering through the same session that users get."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from forerun.apps.bench.draft_turns import PLAIN, Answer
from forerun.errors import UnsupportedError
from forerun.runtime.types import SamplingParams

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from forerun.runtime.manifest import Manifest
    from forerun.runtime.text import Text

_CERTAIN = 1e4


class TextEngine:
    """One loaded model and its only KV cache, shared by plain and drafted answers.

    Args:
        load: loads the model; called again at each `restart`.

    Raises:
        UnsupportedError: the model has no chat template.
    """

    def __init__(self, load: Callable[[], Text]) -> None:
        self._load = load
        self._cancelled = threading.Event()
        self._open()

    @property
    def model(self) -> str:
        """Name of the model."""
        return self._text.manifest.name

    @property
    def weights(self) -> str:
        """Form of the weights, e.g. ``int4``."""
        return self._text.manifest.quantization.method

    @property
    def capacity(self) -> int:
        """Tokens the context holds."""
        return self._text.capacity

    @property
    def manifest(self) -> Manifest:
        """What the bundle says about itself."""
        return self._text.manifest

    @property
    def row_exact(self) -> bool:
        """Whether a row computes the same however many there are."""
        return self._text.manifest.row_exact

    @property
    def eos(self) -> frozenset[int]:
        """Ids that end an answer."""
        return frozenset(self._text.tokenizer.eos)

    def ids(self, text: str) -> list[int]:
        """The prompt that a user's message becomes."""
        rendered = self._text.render(text)
        return self._text.tokenizer.encode(rendered, add_special=False)

    def answer(
        self, drafter: str, ids: Sequence[int], params: SamplingParams, max_tokens: int
    ) -> Answer:
        """Answer with nothing cached; see `Engine.answer`.

        Raises:
            UserError: the drafter is not known or does not fit the model.
        """
        self._session.reset()
        events = self._session.generate(
            ids, sampling=params, max_tokens=max_tokens, drafter=drafter
        )
        if self._cancelled.is_set():
            self._session.cancel()
        tokens: list[int] = []
        for event in events:
            if event.token is not None:
                tokens.append(event.token)
            if event.stats is not None:
                stats = event.stats
        seconds = stats.tpot_ms * max(len(tokens) - 1, 0) / 1e3
        return Answer(tuple(tokens), seconds, stats)

    def logprob(self, ids: Sequence[int], token: int) -> float:
        """Log-probability of a token after a sequence, computed anew without a drafter."""
        self._session.reset()
        # The bias leaves no other choice; log-probabilities are told without it.
        params = SamplingParams(logit_bias={token: _CERTAIN})
        source = self._session.generate_ids(
            ids, sampling=params, max_tokens=1, stop_ids=(), logprobs=True, drafter=PLAIN
        )
        _, value = next(source)
        source.close()
        assert value is not None
        return value

    def restart(self) -> None:
        """See `Engine.restart`."""
        self._text.close()
        self._open()

    def cancel(self) -> None:
        """End the answer that is being made, and every later one at once."""
        self._cancelled.set()
        self._session.cancel()

    def close(self) -> None:
        """Free the model."""
        self._text.close()

    def _open(self) -> None:
        text = self._load()
        if text.template is None:
            text.close()
            raise UnsupportedError(
                f"{text.manifest.name} is a base model without a chat template; "
                "the prompts of this benchmark are a user's messages"
            )
        self._text, self._session = text, text.session()
