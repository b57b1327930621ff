"""records.jsonl and its neighbours: written unit by unit, read back as the report they hold."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from analysis.evaluation import tally
from analysis.lines import (
    END,
    LayersLine,
    Line,
    NetworkLine,
    RunLine,
    SampleLine,
    UnitLine,
    WarningLine,
    digest,
    unpack,
)
from analysis.plain import Record
from analysis.records import Course, NetworkReport, Report, SampleRecord, Sensitivity
from certify.errors import InvalidFile
from models.files import read_bytes

RECORDS, TIMINGS, MANIFEST = "records.jsonl", "timings.jsonl", "manifest.json"


@dataclass(frozen=True)
class Contents:
    """What a file of records holds: a heading, then whole units as bytes, by number, in the order of the file.

    ``whole`` is where the last whole unit ends: what follows was torn off while it was written.
    """

    source: str
    run: RunLine
    networks: tuple[NetworkLine, ...]
    heading: bytes
    units: dict[int, bytes]
    whole: int

    def lines(self) -> Iterator[Line]:
        """Yield the lines of the units, in the order of their numbers."""
        for number in sorted(self.units):
            yield from (unpack(line, self.source) for line in self.units[number].splitlines())


def read(path: str | Path) -> Report:
    """Return the report in a folder or its records.jsonl; timings are read if they lie beside it.

    A torn end is left out, and named in the warnings with all that is missing. Raises ``InvalidFile`` for files that
    are no records, or were changed since.
    """
    file = Path(path) / RECORDS if Path(path).is_dir() else Path(path)
    timings = file.with_name(TIMINGS)
    return report_of(scan(read_bytes(file), str(file)), timings.read_bytes() if timings.is_file() else b"")


def scan(data: bytes, source: str) -> Contents:
    """Return the whole units of a file's bytes. Raises ``InvalidFile`` where one was changed or is there twice."""
    lines = data.splitlines(keepends=True)
    if lines and not lines[-1].endswith(b"\n"):
        lines.pop()
    run, networks = _heading(lines, source)
    first = 1 + len(networks)
    heading, body, units = b"".join(lines[:first]), list[bytes](), dict[int, bytes]()
    whole = len(heading)
    for place, line in enumerate(lines[first:], first + 1):
        if not line.startswith(END):
            body.append(line)
            continue
        end = unpack(line, source)
        assert isinstance(end, UnitLine)
        joined = b"".join(body)
        seal = len(body), digest(heading + joined)
        if (end.lines, end.sha256) != seal or end.unit in units or end.unit >= run.units:
            raise InvalidFile(
                f"{source}: unit {end.unit}, which ends in line {place}, is not what was written",
                f"{end.lines} lines that have, with the heading, the hash that line {place} states, once",
                f"copy the file again, or cut it at the start of that unit (line {place - len(body)}) and --resume",
            )
        units[end.unit] = joined
        whole += len(joined) + len(line)
        body = []
    return Contents(source, run, networks, heading, units, whole)


def _heading(lines: list[bytes], source: str) -> tuple[RunLine, tuple[NetworkLine, ...]]:
    run = unpack(lines[0], source) if lines else None
    if isinstance(run, RunLine):
        found = [unpack(line, source) for line in lines[1 : run.networks + 1]]
        networks = tuple(line for line in found if isinstance(line, NetworkLine))
        if len(networks) == run.networks:
            return run, networks
    raise InvalidFile(f"{source} holds no whole heading", "a line of kind run, then those of its networks")


def report_of(contents: Contents, timings: bytes) -> Report:
    """Return the report that records and timings make; networks without any sample are left out, with a warning."""
    samples: dict[str, list[SampleRecord]] = {about.name: [] for about in contents.networks}
    layers: dict[str, Sensitivity] = {}
    warnings = list(contents.run.warnings)
    for line in contents.lines():
        if isinstance(line, SampleLine):
            samples[line.network].append(line.sample)
        elif isinstance(line, LayersLine):
            layers[line.network] = line.layers
        elif isinstance(line, WarningLine):
            warnings.append(f"{line.network}: {line.text}")
    run, found = contents.run, [about for about in contents.networks if samples[about.name]]
    return Report(
        command=run.command,
        arguments=run.arguments,
        samples=run.samples,
        seed=run.seed,
        versions=run.versions,
        networks=tuple(_network(about, samples[about.name], layers.get(about.name)) for about in found),
        warnings=(*warnings, *_late(samples), *_unfinished(contents, samples)),
        course=_course(timings),
    )


def _late(samples: Mapping[str, Sequence[SampleRecord]]) -> Iterator[str]:
    """Which networks' samples ran out of time."""
    for name, records in samples.items():
        late = sum(any(outcome.verdict == "timeout" for outcome in record.outcomes) for record in records)
        if late:
            yield (
                f"{name}: {late} of {len(records)} samples ended with timeout at some radius; they count as not "
                "certified, and as surviving an attack that was not begun"
            )


def _unfinished(contents: Contents, samples: Mapping[str, Sequence[SampleRecord]]) -> Iterator[str]:
    """What a run still lacks."""
    done, units, count = len(contents.units), contents.run.units, contents.run.count
    if done < units:
        found = ", ".join(f"{len(records)} of {count} samples of {name}" for name, records in samples.items())
        yield f"not finished: {done} of {units} units of work are done ({found}); rates are over those"


def _network(about: NetworkLine, samples: Sequence[SampleRecord], layers: Sensitivity | None) -> NetworkReport:
    return NetworkReport(
        name=about.name,
        source=about.source,
        network=about.network,
        parameters=about.parameters,
        normalisation=about.normalisation,
        evaluation=tally(samples, about.conditions),
        layers=layers,
    )


@dataclass(frozen=True)
class Timing(Record):
    """A line of timings.jsonl: the seconds that a unit took, by task. They are no result."""

    unit: int
    network: str
    machine: str
    seconds: dict[str, float]

    def line(self) -> bytes:
        """Return the line, with its line feed."""
        return json.dumps(self.to_dict()).encode() + b"\n"


def timings_in(data: bytes) -> Iterator[Timing]:
    """Yield what the whole lines say; one that was torn while it was written is passed over."""
    for line in data.splitlines():
        with suppress(ValueError, KeyError, TypeError, AttributeError):
            yield Timing.from_dict(json.loads(line))


def _course(timings: bytes) -> Course | None:
    """The sums over all units whose line is whole; None where there is none."""
    machines, sums = dict[str, None](), dict[str, dict[str, float]]()
    for found in timings_in(timings):
        machines[found.machine] = None
        tasks = sums.setdefault(found.network, {})
        for task, seconds in found.seconds.items():
            tasks[task] = tasks.get(task, 0.0) + seconds
    return Course("; ".join(machines), sums) if sums else None
