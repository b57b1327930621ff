"""Records to plain JSON data and back, by their type annotations."""

from __future__ import annotations

import dataclasses
import functools
import math
import types
from fractions import Fraction
from pathlib import PurePath
from typing import Any, ClassVar, Self, Union, get_args, get_origin, get_type_hints


class Record:
    """Base of the frozen records: ``from_dict(to_dict())`` gives an equal one.

    ``derived`` names properties that ``to_dict`` adds for readers of the JSON and ``from_dict`` ignores.
    """

    derived: ClassVar[tuple[str, ...]] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON: no NaN, no infinities (they are words), fractions as "p/q"."""
        return encode(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """Rebuild what ``to_dict`` wrote."""
        return decode(cls, data)


def encode(value: Any) -> Any:
    """Return ``value`` as plain data; fractions, paths and floats that JSON lacks become words."""
    if isinstance(value, Record):
        names = [field.name for field in dataclasses.fields(value)]  # type: ignore[arg-type]  # all are dataclasses
        return {name: encode(getattr(value, name)) for name in (*names, *value.derived)}
    if isinstance(value, dict):
        return {str(key): encode(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [encode(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    return str(value) if isinstance(value, (Fraction, PurePath)) else value


def decode(kind: Any, data: Any) -> Any:
    """Return the value of type ``kind`` (a record, tuple, dict, Fraction, float, ... or optional) that was encoded."""
    origin, args = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return None if data is None else decode(next(arg for arg in args if arg is not type(None)), data)
    if origin is tuple:
        kinds = [args[0]] * len(data) if args[-1] is Ellipsis else args
        return tuple(decode(item, value) for item, value in zip(kinds, data, strict=True))
    if origin is dict:
        return {key: decode(args[1], value) for key, value in data.items()}
    if isinstance(kind, type) and issubclass(kind, Record):
        hints = _hints(kind)  # type: ignore[arg-type]  # classes can be hashed
        names = [field.name for field in dataclasses.fields(kind)]  # type: ignore[arg-type]  # all are dataclasses
        return kind(**{name: decode(hints[name], data[name]) for name in names})
    if kind in (int, str, bool) and type(data) is not kind:
        raise TypeError(f"{data!r} is no {kind.__name__}")
    return kind(data) if kind in (float, Fraction) else data


@functools.cache
def _hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind)
