"""Plain data to frozen dataclasses and back to sense: names, types and ranges are checked, nothing is guessed."""

from __future__ import annotations

import math
import re
import types
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, Field, fields, is_dataclass
from fractions import Fraction
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from certify.errors import InvalidInput, unknown_name

T = TypeVar("T")


def read(kind: type[T], given: Mapping[str, Any], *, where: str = "", **ready: Any) -> T:
    """Return ``kind(**given)`` with its nested dataclasses made from nested mappings; ``ready`` fields are values.

    Numbers may be fractions in words, "8/255". Raises ``InvalidInput`` for unknown names and wrong types.
    """
    hints = get_type_hints(kind)
    names = [item.name for item in fields(kind) if item.init]  # type: ignore[arg-type]
    values = dict(ready)
    for key, value in given.items():
        if key not in names or key in ready:
            raise unknown_name(f"option of [{where}]" if where else "option", key, names)
        values[key] = _value(hints[key], value, f"{where}.{key}" if where else key)
    missing = [item.name for item in fields(kind) if _needed(item) and item.name not in values]  # type: ignore[arg-type]
    if missing:
        name = f"{where}.{missing[0]}" if where else missing[0]
        raise InvalidInput(f"no {name}", f"a value for {name}", f"{name} = ... in the file, or --set {name}=...")
    return kind(**values)


def exact(word: str) -> Fraction | None:
    """Return the number or fraction that is written, None where there is none that a float could hold.

    An exponent of four digits is not even computed: 1e999999999 would take all memory.
    """
    try:
        found = None if re.search(r"e[+-]?[\d_]{4}", word, re.IGNORECASE) else Fraction(word)
        return found if found is None or math.isfinite(found) else None
    except (ValueError, ZeroDivisionError, OverflowError):
        return None


def exact_radius(word: str) -> Fraction:
    """Return the exact radius that is written; raises ``InvalidInput`` for what is no number from 0 to 1e6."""
    value = exact(word)
    if value is None or not 0 <= value <= 10**6:
        raise InvalidInput(f"radius {word!r}", "a number or fraction from 0 to 1e6", "8/255 or 0.1")
    return value


def between(name: str, value: float, low: float, high: float) -> None:
    """Raise ``InvalidInput`` unless low <= value <= high and value is finite."""
    if not low <= value <= high or value == math.inf:
        wanted = f"at least {low:g}" if high == math.inf else f"a number from {low:g} to {high:g}"
        raise InvalidInput(f"{name} = {value}", wanted, f"leave {name} out for its default")


def known(kind: str, name: str, names: Iterable[str]) -> None:
    """Raise ``InvalidInput`` unless ``name`` is one of ``names``."""
    if name not in (listed := tuple(names)):
        raise unknown_name(kind, name, listed)


def _words(kind: Any) -> str:
    return {tuple: "a list", dict: "a table"}.get(get_origin(kind), getattr(kind, "__name__", str(kind)))


def _needed(item: Field[Any]) -> bool:
    return item.init and item.default is MISSING and item.default_factory is MISSING


def _value(hint: Any, value: Any, name: str) -> Any:
    """The value as its field's type; integers are floats too, words may be fractions."""
    kinds = get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    for kind in kinds:
        if get_origin(kind) is tuple and isinstance(value, (list, tuple)):
            return tuple(_value(get_args(kind)[0], item, name) for item in value)
        if get_origin(kind) is dict and isinstance(value, Mapping):
            return {str(key): _value(get_args(kind)[1], item, f"{name}.{key}") for key, item in value.items()}
        if kind is Any:
            return value
        if is_dataclass(kind) and isinstance(value, Mapping):
            return read(kind, value, where=name)  # type: ignore[arg-type]
        if kind is float and not isinstance(value, bool) and isinstance(value, (int, float, str)):
            return _number(value, name)
        if isinstance(kind, type) and type(value) is kind:
            return value
    words = " or ".join("nothing" if kind is type(None) else _words(kind) for kind in kinds)
    raise InvalidInput(f"{name} = {value!r}", words, f"leave {name} out for its default")


def _number(value: float | str, name: str) -> float:
    found = exact(value) if isinstance(value, str) else value
    try:
        if found is not None:
            return float(found)
    except OverflowError:  # an integer beyond all floats
        pass
    raise InvalidInput(f"{name} = {value!r}", "a number or a fraction", f'{name} = "8/255"')
