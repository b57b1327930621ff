"""KEY=VALUE options to nested tables, as a TOML file would give them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


def assignments(
    texts: Iterable[str], tables: dict[str, Any] | None = None, *, example: str = "--set optimizer.clip=1.0"
) -> dict[str, Any]:
    """Return ``tables`` (none by default) with every KEY=VALUE put where its dotted key says.

    ``example`` is what a refusal proposes: it begins with the option that the texts were given to.
    """
    tables = {} if tables is None else tables
    for text in texts:
        put(tables, *_assignment(text, example))
    return tables


def _assignment(text: str, example: str) -> tuple[str, Any]:
    """The key and the value of KEY=VALUE; a value that is not TOML is a word."""
    import tomllib

    from certify.errors import InvalidInput

    key, sign, value = text.partition("=")
    if not (sign and key.strip() and value.strip()):
        raise InvalidInput(f"{example.split()[0]} {text!r}", "KEY=VALUE", example)
    try:
        return key.strip(), tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return key.strip(), value.strip()


def put(tables: dict[str, Any], key: str, value: Any) -> None:
    """Set a dotted key in nested tables."""
    from certify.errors import InvalidInput

    *path, last = key.split(".")
    for name in path:
        tables = tables.setdefault(name, {})
        if not isinstance(tables, dict):
            raise InvalidInput(f"{key} = {value!r}", f"{name} to be a table", "a key such as optimizer.clip")
    tables[last] = value
