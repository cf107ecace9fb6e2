"""Strict decoding of JSON into frozen dataclasses: anything unexpected is an error."""

from __future__ import annotations

import dataclasses
import functools
import types
import typing
from typing import Any, TypeVar

from forerun.errors import BundleError

T = TypeVar("T")


def decode(cls: type[T], value: Any, where: str = "manifest") -> T:
    """Build `cls` from plain JSON data.

    Args:
        cls: a dataclass; fields may be int, float, str, bool, None unions, tuples, dicts
            and dataclasses.
        value: what `json.load` returned.
        where: path shown in errors, e.g. ``manifest.kv``.

    Raises:
        BundleError: a key is unknown or missing, or a value has another type.
    """
    if not isinstance(value, dict):
        raise BundleError(f"{where} must be an object, got {type(value).__name__}")
    hints, fields = _described(cls)
    unknown = sorted(set(value) - set(fields))
    if unknown:
        raise BundleError(f"{where} has the unknown key {unknown[0]!r}; known: {', '.join(fields)}")
    kwargs = {}
    for name, field in fields.items():
        if name in value:
            kwargs[name] = _convert(hints[name], value[name], f"{where}.{name}")
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise BundleError(f"{where} lacks the key {name!r}")
    return cls(**kwargs)


@functools.cache
def _described(cls: type) -> tuple[dict[str, Any], dict[str, dataclasses.Field[Any]]]:
    """Types and fields by name; a manifest has hundreds of objects of a few classes."""
    return typing.get_type_hints(cls), {f.name: f for f in dataclasses.fields(cls)}


def _convert(hint: Any, value: Any, where: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        return _convert(next(a for a in args if a is not type(None)), value, where)
    if origin is tuple:
        if not isinstance(value, list):
            raise BundleError(f"{where} must be a list, got {type(value).__name__}")
        return tuple(_convert(args[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    if origin is dict:
        if not isinstance(value, dict):
            raise BundleError(f"{where} must be an object, got {type(value).__name__}")
        return {key: _convert(args[1], item, f"{where}.{key}") for key, item in value.items()}
    if dataclasses.is_dataclass(hint):
        return decode(typing.cast(type, hint), value, where)
    return _scalar(hint, value, where)


def _scalar(hint: Any, value: Any, where: str) -> Any:
    if hint is Any:
        return value
    if hint is float and type(value) in (int, float):
        return float(value)
    if type(value) is not hint:
        raise BundleError(f"{where} must be {hint.__name__}, got {type(value).__name__}")
    return value
