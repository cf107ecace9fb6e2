"""Ranges of the options of a generation."""

from __future__ import annotations

import math
from collections.abc import Callable

from forerun.errors import OptionError
from forerun.runtime.noise import MAX_SEED
from forerun.runtime.types import SamplingParams


def _is_real(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


_RANGES: dict[str, tuple[Callable[..., bool], str]] = {
    "temperature": (lambda v: _is_real(v) and v >= 0, "a number >= 0 (0 is greedy)"),
    "top_k": (lambda v: _is_int(v) and v >= 0, "a whole number >= 0 (0 keeps all)"),
    "top_p": (lambda v: _is_real(v) and 0 < v <= 1, "above 0 and at most 1"),
    "min_p": (lambda v: _is_real(v) and 0 <= v <= 1, "between 0 and 1"),
    "typical_p": (lambda v: _is_real(v) and 0 < v <= 1, "above 0 and at most 1"),
    "repetition_penalty": (lambda v: _is_real(v) and 0 < v <= 1e4, "above 0 (1 is off)"),
    "presence_penalty": (lambda v: _is_real(v) and abs(v) <= 1e4, "a number (0 is off)"),
    "frequency_penalty": (lambda v: _is_real(v) and abs(v) <= 1e4, "a number (0 is off)"),
    "seed": (lambda v: _is_int(v) and 0 <= v <= MAX_SEED, "a whole number from 0 to 2**64 - 1"),
}


def check_params(params: SamplingParams, vocab: int) -> None:
    """Check every value against its range.

    Args:
        params: what the caller asked for.
        vocab: number of tokens of the model; ids in `logit_bias` must be below it.

    Raises:
        OptionError: a value is out of range; the text names it and what is allowed.
    """
    for name, (is_valid, allowed) in _RANGES.items():
        value = getattr(params, name)
        if not is_valid(value):
            raise OptionError(f"{name} is {value!r}; it must be {allowed}")
    if not isinstance(params.logit_bias, dict):
        raise OptionError("logit_bias must map token ids to numbers, e.g. {42: -5.0}")
    for token, value in params.logit_bias.items():
        if not _is_int(token) or not 0 <= token < vocab:
            raise OptionError(f"logit_bias names the token {token!r}; ids go from 0 to {vocab - 1}")
        if not _is_real(value) or abs(value) > 1e4:
            raise OptionError(f"logit_bias of token {token} is {value!r}; it must be a number")


def check_count(name: str, value: object, lowest: int) -> None:
    """Check a whole number.

    Raises:
        OptionError: it is none, or below `lowest`.
    """
    if not _is_int(value) or value < lowest:  # type: ignore[operator]
        raise OptionError(f"{name} is {value!r}; it must be a whole number of at least {lowest}")
