"""The JSON Schema of records.jsonl, made from the record types, so that the two never differ."""

from __future__ import annotations

import dataclasses
import json
import types
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from analysis.lines import KINDS, SCHEMA_VERSION, RunLine
from analysis.plain import Record

#: The schema as it comes with the package.
SHIPPED = Path(__file__).parent / "schemas" / f"records-{SCHEMA_VERSION}.json"
_PLAIN: dict[Any, dict[str, Any]] = {
    Any: {},
    str: {"type": "string"},
    bool: {"type": "boolean"},
    int: {"type": "integer"},
    float: {"anyOf": [{"type": "number"}, {"enum": ["nan", "inf", "-inf"]}]},
    Fraction: {"type": "string", "pattern": r"^-?\d+(/[1-9]\d*)?$"},
}


def schema() -> dict[str, Any]:
    """Return what each line of records.jsonl obeys; ``records-1.json`` holds the same."""
    records: dict[str, Any] = {}
    for line in KINDS.values():
        _record(line, records)
        found = records[line.__name__]
        found["properties"] = {"kind": {"const": line.kind}, **found["properties"]}
        found["required"] = ["kind", *found["required"]]
    records[RunLine.__name__]["properties"]["schema_version"] = {"const": SCHEMA_VERSION}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": f"A line of records.jsonl, schema version {SCHEMA_VERSION}",
        "oneOf": [{"$ref": f"#/$defs/{line.__name__}"} for line in KINDS.values()],
        "$defs": records,
    }


def text() -> str:
    """Return the schema as the file holds it."""
    return json.dumps(schema(), indent=1) + "\n"


def _record(kind: type[Record], records: dict[str, Any]) -> None:
    """Describe a record, with the properties that are derived for readers, and all that it refers to."""
    hints = get_type_hints(kind)
    names = {field.name: hints[field.name] for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    for name in kind.derived:
        names[name] = get_type_hints(getattr(kind, name).fget)["return"]
    records[kind.__name__] = {
        "description": (kind.__doc__ or "").partition("\n")[0],
        "type": "object",
        "properties": {name: _described(hint, records) for name, hint in names.items()},
        "required": list(names),
        "additionalProperties": False,
    }


def _described(kind: Any, records: dict[str, Any]) -> dict[str, Any]:
    """Describe a type as ``analysis.plain.encode`` writes its values."""
    origin, args = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        (inner,) = (arg for arg in args if arg is not type(None))
        return {"anyOf": [_described(inner, records), {"type": "null"}]}
    if origin is tuple and args[-1] is Ellipsis:
        return {"type": "array", "items": _described(args[0], records)}
    if origin is tuple:
        items = [_described(arg, records) for arg in args]
        return {"type": "array", "prefixItems": items, "items": False, "minItems": len(items)}
    if origin is Literal:
        return {"enum": list(args)}
    if origin is dict:
        return {"type": "object", "additionalProperties": _described(args[1], records)}
    if kind in _PLAIN:
        return dict(_PLAIN[kind])
    if kind.__name__ not in records:
        _record(kind, records)
    return {"$ref": f"#/$defs/{kind.__name__}"}
