"""A conversation: messages on top of a session, with the KV cache of earlier turns reused."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from forerun.errors import ContextLimitError
from forerun.runtime.drafting.choice import AnyDrafter
from forerun.runtime.generation import OnPrefill
from forerun.runtime.session import DEFAULT_KEEP, DEFAULT_MAX_TOKENS, ContextPolicy, Session
from forerun.runtime.template import render_chat
from forerun.runtime.tokenizer import as_text
from forerun.runtime.types import Event, SamplingParams

Message = dict[str, Any]


@dataclass(frozen=True)
class _Said:
    """The conversation as the model saw it: `text` is what `ids` show as."""

    text: str = ""
    ids: tuple[int, ...] = ()


class Chat:
    """A conversation with one model.

    Args:
        session: runs the model.
        template: the model's chat template (Jinja source).
        system: text of the system message, or None for the template's own.
        messages: an earlier conversation to go on with.

    Raises:
        TemplateError: the template is broken or refuses these messages.
    """

    def __init__(
        self,
        session: Session,
        template: str,
        *,
        system: str | None = None,
        messages: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        self.session = session
        self._template = template
        self._system = system
        self._messages: list[Message] = [dict(message) for message in messages]
        self._said = _Said()
        if self._messages:
            self._render(self._messages, add_generation_prompt=False)

    @property
    def messages(self) -> list[Message]:
        """A copy of the conversation, the system message first if there is one."""
        return [dict(message) for message in self._with_system(self._messages)]

    @property
    def system(self) -> str | None:
        """The system message, or None for the template's own."""
        return self._system

    @system.setter
    def system(self, text: str | None) -> None:
        self._system = text

    def reset(self) -> None:
        """Forget the conversation; the system message stays."""
        self._messages = []
        self._said = _Said()

    def cancel(self) -> None:
        """End the answer within one step and keep what was said; callable from any thread."""
        self.session.cancel()

    def say(
        self,
        text: str | bytes,
        *,
        sampling: SamplingParams | None = None,
        max_tokens: int = DEFAULT_MAX_TOKENS,
        stop: str | Iterable[str] = (),
        logprobs: bool = False,
        context: ContextPolicy = "error",
        on_prefill: OnPrefill | None = None,
        drafter: AnyDrafter | None = None,
        accept: str = "match",
    ) -> Generator[Event, None, None]:
        """Send a message and stream the answer.

        The message and the answer join the conversation when the answer ends, also when it is
        cancelled or the generator is closed; not when an error is raised.

        Args:
            text: the user's message.
            sampling: see `Session.generate`, like the following.
            max_tokens: most tokens of the answer.
            stop: texts that end the answer.
            logprobs: give log-probabilities.
            context: ``error`` refuses a conversation that exceeds the context; ``slide`` leaves
                out its oldest turns, and slides within a long answer.
            on_prefill: progress of reading the prompt.
            drafter: see `Session.generate`.
            accept: see `Session.generate`.

        Raises:
            PromptError: the message is not text.
            TemplateError: the template refuses the conversation.
            UserError: as in `Session.generate`.
        """
        message = {"role": "user", "content": as_text(text)}
        messages, prompt_text, ids = self._fit([*self._messages, message], context)
        is_sliding = context == "slide"
        head = self._head_length(prompt_text, messages) if is_sliding else DEFAULT_KEEP
        events = self.session.generate(
            ids,
            sampling=sampling,
            max_tokens=max_tokens,
            stop=stop,
            logprobs=logprobs,
            context=context,
            n_keep=head,
            on_prefill=on_prefill,
            drafter=drafter,
            accept=accept,
        )
        return self._answer(events, messages, _Said(prompt_text, tuple(ids)))

    def _answer(
        self, events: Generator[Event, None, None], messages: list[Message], prompt: _Said
    ) -> Generator[Event, None, None]:
        before = self._messages
        pieces: list[str] = []
        ids: list[int] = []
        try:
            for event in events:
                pieces.append(event.text)
                if event.token is not None:
                    ids.append(event.token)
                yield event
        except (GeneratorExit, KeyboardInterrupt):
            if before is self._messages:
                self._commit(messages, prompt, "".join(pieces), ids)
            raise
        finally:
            events.close()
        # A reset in the middle of an answer forgets the answer too.
        if before is self._messages:
            self._commit(messages, prompt, "".join(pieces), ids)

    def _commit(self, messages: list[Message], prompt: _Said, answer: str, ids: list[int]) -> None:
        self._messages = [*messages, {"role": "assistant", "content": answer}]
        # A stop string cuts text that its ids still hold; the next turn then tokenizes again.
        exact = self.session.tokenizer.decode(ids) == answer
        self._said = _Said(prompt.text + answer, (*prompt.ids, *ids)) if exact else _Said()

    def _fit(
        self, messages: list[Message], context: ContextPolicy
    ) -> tuple[list[Message], str, list[int]]:
        """Render and tokenize; with ``slide``, leave out the oldest turns that do not fit."""
        room = self.session.capacity if context != "slide" else self.session.capacity * 3 // 4
        while True:
            text = self._render(messages)
            try:
                ids = self._tokenize(text)
                too_long = len(ids) > room
            except ContextLimitError:
                ids, too_long = [], True
                if context != "slide" or len(messages) == 1:
                    raise
            if context != "slide" or not too_long or len(messages) == 1:
                return messages, text, ids
            messages = messages[_oldest_turn(messages) :]

    def _tokenize(self, text: str) -> list[int]:
        """Ids of a rendered conversation, those the model itself generated kept as they are."""
        said, limit = self._said, self.session.capacity
        encode = self.session.tokenizer.encode
        if said.ids and text.startswith(said.text):
            return [*said.ids, *encode(text[len(said.text) :], add_special=False, limit=limit)]
        return encode(text, add_special=False, limit=limit)

    def _head_length(self, text: str, messages: list[Message]) -> int:
        """Tokens before the first message, the system message among them: a slide keeps them."""
        head = text[: max(text.find(messages[0]["content"]), 0)]
        return len(self.session.tokenizer.encode(head, add_special=False))

    def _render(self, messages: list[Message], add_generation_prompt: bool = True) -> str:
        tokenizer = self.session.tokenizer
        return render_chat(
            self._template,
            self._with_system(messages),
            add_generation_prompt=add_generation_prompt,
            bos_token=tokenizer.token_text(tokenizer.bos),
            eos_token=tokenizer.token_text(next(iter(tokenizer.eos), None)),
        )

    def _with_system(self, messages: list[Message]) -> list[Message]:
        if self._system is None:
            return messages
        return [{"role": "system", "content": self._system}, *messages]


def _oldest_turn(messages: list[Message]) -> int:
    """Length of the oldest turn: up to the second message of a user, and never all."""
    for index, message in enumerate(messages[1:-1], start=1):
        if message["role"] == "user":
            return index
    return len(messages) - 1
