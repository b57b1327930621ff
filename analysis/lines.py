"""The lines of records.jsonl: each kind is a record, each line one JSON object that names its kind."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any, ClassVar

from analysis.plain import Record
from analysis.records import Conditions, SampleRecord, Sensitivity
from certify.errors import InvalidFile

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class RunLine(Record):
    """The first line: what was asked and with what. ``count`` samples of each of ``networks`` networks in ``units``.

    ``identity`` is a hash of all that decides the results; runs of one identity give the same file.
    """

    kind: ClassVar[str] = "run"
    schema_version: int
    identity: str
    command: str
    arguments: dict[str, Any]
    samples: str
    seed: int
    versions: dict[str, str]
    count: int
    networks: int
    units: int
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class NetworkLine(Record):
    """A network: where it comes from, its weights' hash, and under which conditions it is examined."""

    kind: ClassVar[str] = "network"
    name: str
    source: str
    network: str
    parameters: int
    normalisation: str
    weights_sha256: str
    conditions: Conditions


@dataclass(frozen=True)
class SampleLine(Record):
    """What was found about one sample of a network."""

    kind: ClassVar[str] = "sample"
    network: str
    sample: SampleRecord


@dataclass(frozen=True)
class LayersLine(Record):
    """What was found about the layers of a network."""

    kind: ClassVar[str] = "layers"
    network: str
    layers: Sensitivity


@dataclass(frozen=True)
class WarningLine(Record):
    """What lowers trust in a network's numbers."""

    kind: ClassVar[str] = "warning"
    network: str
    text: str


@dataclass(frozen=True)
class UnitLine(Record):
    """The end of a unit of work: how many lines precede it, and the hash of the heading's bytes and theirs."""

    kind: ClassVar[str] = "unit"
    unit: int
    lines: int
    sha256: str


Line = RunLine | NetworkLine | SampleLine | LayersLine | WarningLine | UnitLine
KINDS: dict[str, type[Line]] = {
    kind.kind: kind for kind in (RunLine, NetworkLine, SampleLine, LayersLine, WarningLine, UnitLine)
}
#: What a unit's last line starts with.
END = b'{"kind":"unit",'


def pack(line: Line) -> bytes:
    """Return the line, with its line feed."""
    return json.dumps({"kind": line.kind, **line.to_dict()}, allow_nan=False, separators=(",", ":")).encode() + b"\n"


def unpack(data: bytes, source: str) -> Line:
    """Return the record of a line. Raises ``InvalidFile`` for one that is none, or of another schema."""
    try:
        found = json.loads(data)
        kind = KINDS[found["kind"]]
        if kind is RunLine and found["schema_version"] != SCHEMA_VERSION:
            raise InvalidFile(
                f"{source} has schema version {found['schema_version']!r}",
                f"records of schema version {SCHEMA_VERSION}",
                "use the version of kafcert that wrote it",
            )
        line: Line = kind.from_dict(found)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InvalidFile(
            f"{source}: {data[:40]!r}... is no line of records ({type(error).__name__})",
            f"a JSON object of kind {', '.join(KINDS)}",
            "records.jsonl as certify report --out wrote it",
        ) from None
    return line


def sealed(heading: bytes, unit: int, body: bytes) -> bytes:
    """Return the bytes of a unit of work under that heading: its lines, and the one that ends it."""
    return body + pack(UnitLine(unit, body.count(b"\n"), digest(heading + body)))


def digest(data: bytes) -> str:
    """Return the SHA-256 of ``data``."""
    return hashlib.sha256(data).hexdigest()
