"""Chat templates: messages to the prompt text a model was trained on."""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from forerun.errors import TemplateError

MAX_TEMPLATE_CHARS = 1 << 18
MAX_OUTPUT_CHARS = 1 << 24
_MAX_DEPTH = 32
_MAX_INDENT = 16


class _RaisedByTemplateError(Exception):
    """What a template's own ``raise_exception`` raises."""


def render_chat(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    *,
    add_generation_prompt: bool = True,
    bos_token: str = "",
    eos_token: str = "",
    **variables: Any,
) -> str:
    """Render messages with a model's Jinja template, as Hugging Face transformers does.

    The template runs in a sandbox, with limits on rounds, time and size.

    Args:
        template: Jinja source.
        messages: each with ``role`` and ``content``; plain JSON values only.
        add_generation_prompt: end with the beginning of the assistant's turn.
        bos_token: text of the token that begins a text.
        eos_token: text of the token that ends one.
        **variables: more names for the template (``tools``, ``enable_thinking``, ...), plain JSON.

    Raises:
        TemplateError: the template is broken, refuses the messages, goes for Python's internals or
            exceeds a limit.
    """
    if len(template) > MAX_TEMPLATE_CHARS:
        raise TemplateError(
            f"the chat template has {len(template)} characters; at most {MAX_TEMPLATE_CHARS}"
        )
    values = {
        **{name: _plain(value, name) for name, value in variables.items()},
        "messages": [_message(m, i) for i, m in enumerate(messages)],
        "add_generation_prompt": bool(add_generation_prompt),
        "bos_token": bos_token,
        "eos_token": eos_token,
    }
    try:
        return _render(template, values)
    except TemplateError:
        raise
    except _RaisedByTemplateError as error:
        raise TemplateError(f"the chat template refuses these messages: {error}") from None
    except RecursionError:
        raise TemplateError("the chat template is nested too deeply") from None
    except Exception as error:
        # A template can raise anything its expressions can: TypeError, KeyError, ValueError, ...
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise TemplateError(f"the chat template failed: {reason}") from None


def _render(template: str, values: dict[str, Any]) -> str:
    # Imported here because jinja2 takes 40 ms to import and base models need no template.
    from forerun.runtime.template_guard import GuardedEnvironment

    environment = GuardedEnvironment()
    budget = environment.budget

    def tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any):
        budget.count_nested(value)
        indent = None if indent is None else min(int(indent), _MAX_INDENT)
        allowed = {k: options[k] for k in ("separators", "sort_keys") if k in options}
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **allowed)

    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    pieces, length = [], 0
    for piece in environment.from_string(template).generate(**values):
        length += len(piece)
        if length > MAX_OUTPUT_CHARS:
            raise TemplateError(f"the chat template writes over {MAX_OUTPUT_CHARS} characters")
        pieces.append(piece)
    return "".join(pieces)


def _raise_exception(message: str = "") -> None:
    raise _RaisedByTemplateError(str(message)[:200])


def _strftime_now(layout: str) -> str:
    if len(layout) > 64 or re.search(r"%[^a-zA-Z%]*\d", layout):
        raise ValueError("strftime_now takes up to 64 characters and no field widths")
    return datetime.datetime.now().strftime(layout)


def _message(message: Any, index: int) -> Any:
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise TemplateError(f"message {index} must be an object with a role and content")
    return _plain(message, f"message {index}")


def _plain(value: Any, where: str, depth: int = 0) -> Any:
    """Copy JSON values, so that a template never holds an object of the program."""
    if depth > _MAX_DEPTH:
        raise TemplateError(f"{where} is nested too deeply")
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, Mapping):
        return {str(k): _plain(v, where, depth + 1) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, where, depth + 1) for item in value]
    raise TemplateError(f"{where} holds a {type(value).__name__}; only JSON values are allowed")
