"""Text models: generate, stream or chat with a runner that is loaded."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from types import TracebackType
from typing import Any

from forerun.errors import OptionError, UnsupportedError
from forerun.runtime.chat import Chat
from forerun.runtime.drafting.choice import Drafters
from forerun.runtime.manifest import Manifest
from forerun.runtime.prefix import PrefixCache, StepRunner
from forerun.runtime.session import Session
from forerun.runtime.template import render_chat
from forerun.runtime.tokenizer import Tokenizer, as_text
from forerun.runtime.types import Event, SamplingParams


class Text:
    """A loaded text model. Use `load` to get one.

    Args:
        runner: computes the logits.
        tokenizer: of the same bundle.
        template: the model's chat template, or None for a base model.
        cache: of the runner; None makes one.
        drafters: what generations can draft with; None knows no names, only `Drafter` objects.
    """

    def __init__(
        self,
        runner: StepRunner,
        tokenizer: Tokenizer,
        template: str | None = None,
        *,
        cache: PrefixCache | None = None,
        drafters: Drafters | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.template = template
        self._runner = runner
        self._cache = cache or PrefixCache(runner)
        self._drafters = drafters or Drafters(runner.manifest)
        self._session = self.session()

    @property
    def manifest(self) -> Manifest:
        """What the bundle says about itself."""
        return self._runner.manifest

    @property
    def capacity(self) -> int:
        """Tokens the context holds; more than any text has with a window, see `is_endless`."""
        return self._cache.capacity

    @property
    def is_endless(self) -> bool:
        """Whether a text never ends, since older tokens are forgotten: with a window."""
        return self._cache.is_endless

    @property
    def suggested(self) -> SamplingParams:
        """Sampling that the model's makers suggest; greedy if they suggest nothing."""
        given = self.manifest.generation
        names = ("temperature", "top_p", "min_p", "typical_p", "repetition_penalty")
        values: dict[str, Any] = {name: given[name] for name in names if name in given}
        if "top_k" in given:
            values["top_k"] = int(given["top_k"])
        return SamplingParams(**values)

    def generate(self, prompt: str | bytes | Sequence[int], **options: Any) -> str:
        """Return the whole answer; arguments and errors as in `stream`."""
        return "".join(event.text for event in self.stream(prompt, **options))

    def stream(
        self,
        prompt: str | bytes | Sequence[int],
        *,
        raw: bool = False,
        system: str | None = None,
        **options: Any,
    ) -> Generator[Event, None, None]:
        """Stream the answer to one prompt.

        Args:
            prompt: text, or ids that are taken as they are.
            raw: continue the text itself. Otherwise a model with a chat template gets the prompt
                as a user's message; a base model always continues.
            system: system message, for models with a chat template.
            **options: as in `Session.generate`: sampling, max_tokens, stop, logprobs, context,
                n_keep, on_prefill, drafter, accept.

        Raises:
            UserError: as in `Session.generate`.
            OptionError: `system` was given where no template is applied.
            TemplateError: the template refuses the prompt.
        """
        is_text = isinstance(prompt, (str, bytes))
        if is_text and prompt and self.template is not None and not raw:
            prompt = self.render(prompt, system)
            return self._session.generate(self._rendered_ids(prompt), **options)
        if system is not None:
            raise OptionError("a system message needs a chat template and a prompt that is text")
        return self._session.generate(prompt, **options)

    def render(self, prompt: str | bytes, system: str | None = None) -> str:
        """The text a prompt becomes through the chat template.

        Raises:
            UnsupportedError: the model has no template.
            TemplateError: the template refuses the prompt.
        """
        messages = [{"role": "user", "content": as_text(prompt)}]
        if system is not None:
            messages.insert(0, {"role": "system", "content": as_text(system)})
        return render_chat(
            self._need_template(),
            messages,
            bos_token=self.tokenizer.token_text(self.tokenizer.bos),
            eos_token=self.tokenizer.token_text(next(iter(self.tokenizer.eos), None)),
        )

    def chat(self, system: str | None = None, **options: Any) -> Chat:
        """Begin a conversation.

        Args:
            system: text of the system message, or None for the template's own.
            **options: `messages`, an earlier conversation to go on with.

        Raises:
            UnsupportedError: the model has no chat template.
        """
        return Chat(self.session(), self._need_template(), system=system, **options)

    def session(self) -> Session:
        """A session of its own; all sessions of this model take turns on one KV cache."""
        return Session(self._runner, self.tokenizer, cache=self._cache, drafters=self._drafters)

    def cancel(self) -> None:
        """End the latest `stream` or `generate` within one step; callable from any thread."""
        self._session.cancel()

    def close(self) -> None:
        """Free the model and its drafters; it cannot be used afterwards."""
        self._drafters.close()
        close = getattr(self._runner, "close", None)
        if close is not None:
            close()

    def __enter__(self) -> Text:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _need_template(self) -> str:
        if self.template is None:
            raise UnsupportedError(
                f"{self.manifest.name} is a base model without a chat template; "
                "use generate, which continues a text"
            )
        return self.template

    def _rendered_ids(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special=False, limit=self.capacity)
