"""Dataclasses out of what JSON gives: the inverse of `dataclasses.asdict`."""

from __future__ import annotations

import math
from dataclasses import MISSING, fields, is_dataclass
from types import NoneType, UnionType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

T = TypeVar("T")


def from_dict(kind: type[T], value: object) -> T:
    """Return `value` as a `kind`: a dataclass, or what is made of str, bool, numbers, None, lists, tuples and dicts.

    Raises TypeError for anything else, also for numbers that are not finite, and LookupError if a field is missing.
    """
    result: T = _read(kind, value)
    return result


def _read(kind: Any, value: Any) -> Any:
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is UnionType:
        return None if value is None and NoneType in arguments else _read(arguments[0], value)
    if isinstance(kind, type) and is_dataclass(kind) and isinstance(value, dict):
        hints = get_type_hints(kind)
        needed = [f for f in fields(kind) if f.name in value or f.default is f.default_factory is MISSING]
        return kind(**{f.name: _read(hints[f.name], value[f.name]) for f in needed})
    if origin is list and isinstance(value, list):
        return [_read(arguments[0], item) for item in value]
    if origin is tuple and isinstance(value, list) and len(value) == len(arguments):
        return tuple(_read(argument, item) for argument, item in zip(arguments, value, strict=True))
    if origin is dict and isinstance(value, dict):
        return {_read(arguments[0], key): _read(arguments[1], item) for key, item in value.items()}
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is kind and (kind is not float or math.isfinite(value)):
        return value
    raise TypeError(f"{str(value)[:40]!r} is not a {getattr(kind, '__name__', kind)}")
