"""Where finished units go: memory, or a folder in which each is on disk before the next one is begun."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, Protocol

from analysis.journal import MANIFEST, RECORDS, TIMINGS, Timing, report_of, scan
from analysis.lines import sealed
from analysis.manifest import Manifest
from analysis.records import Report
from analysis.units import Done
from certify.errors import InvalidFile, InvalidInput
from models.files import read_bytes, write


class Store(Protocol):
    """A place for finished units."""

    @property
    def units(self) -> frozenset[int]:
        """The numbers of the units that are here already."""
        ...

    def append(self, done: Done) -> None:
        """Keep a unit, whole and for good."""
        ...

    def count(self) -> int:
        """Return how many units are here, also after an interruption in the middle of ``append``."""
        ...

    def report(self) -> Report:
        """Return the report of what is here."""
        ...


class InMemory:
    """Units of a run that nobody wants to keep."""

    def __init__(self, heading: bytes, machine: str) -> None:
        self.heading, self.machine = heading, machine
        self.records, self.timings, self.units = heading, b"", frozenset[int]()

    def append(self, done: Done) -> None:
        """Keep a unit."""
        self.records += sealed(self.heading, done.unit, done.data)
        self.timings += Timing(done.unit, done.network, self.machine, done.seconds).line()
        self.units |= {done.unit}

    def count(self) -> int:
        """Return how many units are here."""
        return len(self.units)

    def report(self) -> Report:
        """Return the report of what is here."""
        return report_of(scan(self.records, "the run"), self.timings)


class InFolder:
    """Units in the records.jsonl of a folder; made by ``kept_in``."""

    def __init__(
        self, folder: Path, heading: bytes, machine: str, files: tuple[BinaryIO, BinaryIO], units: frozenset[int]
    ) -> None:
        self.folder, self.heading, self.machine, self.files, self.units = folder, heading, machine, files, units

    def append(self, done: Done) -> None:
        """Append a unit in one piece and wait until it is on disk."""
        records, timings = self.files
        _append(records, sealed(self.heading, done.unit, done.data))
        _append(timings, Timing(done.unit, done.network, self.machine, done.seconds).line())
        self.units |= {done.unit}

    def count(self) -> int:
        """Return how many units the file holds: one may have come to it without being counted."""
        self.files[0].flush()
        return len(scan(read_bytes(self.folder / RECORDS), str(self.folder / RECORDS)).units)

    def report(self) -> Report:
        """Return the report of what is here."""
        records, timings = (read_bytes(self.folder / name) for name in (RECORDS, TIMINGS))
        return report_of(scan(records, str(self.folder / RECORDS)), timings)


@contextmanager
def kept_in(folder: Path, heading: bytes, manifest: Manifest, machine: str, *, resume: bool) -> Iterator[InFolder]:
    """Open the store of a folder for one process; ``resume`` cuts a torn end and goes on after the last whole unit.

    Raises ``InvalidInput`` for a folder that holds records where nobody asked to resume, ``InvalidFile`` where they are
    of another run, changed, or being written by another process.
    """
    path = folder / RECORDS
    _make(folder)
    if not resume and path.exists() and path.stat().st_size:
        raise InvalidInput(
            f"{folder} holds the records of a run already",
            "a new folder",
            "--resume to go on, or another --out",
        )
    with open(path, "ab+") as records, open(folder / TIMINGS, "ab+") as timings:
        _lock(records, folder)
        if records.seek(0, os.SEEK_END):
            _compare(folder, manifest)
        else:
            write({folder / MANIFEST: manifest.text()})
        units = _prepare(records, timings, heading, str(path))
        yield InFolder(folder, heading, machine, (records, timings), units)


def _prepare(records: BinaryIO, timings: BinaryIO, heading: bytes, source: str) -> frozenset[int]:
    """Leave the heading and whole units alone; return the units' numbers."""
    records.seek(0)
    data = records.read()
    if heading.startswith(data):  # nothing, or a part of the heading
        records.truncate(0)
        timings.truncate(0)
        _append(records, heading)
        return frozenset()
    contents = scan(data, source)
    records.truncate(contents.whole)
    timings.seek(0)
    timings.truncate(timings.read().rfind(b"\n") + 1)
    return frozenset(contents.units)


def _compare(folder: Path, manifest: Manifest) -> None:
    """Refuse records that other models, data, configurations or versions gave."""
    found = Manifest.read(folder / MANIFEST)
    different = list(found.differences(manifest))
    if different or found.identity != manifest.identity:
        raise InvalidFile(
            f"{folder} holds another run: it differs in {', '.join(different) or 'its identity'}",
            "the models, data, configuration and versions that it was begun with",
            "the command that began it, or another --out",
        )


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError
    except OSError as error:
        reason = (error.strerror or "permission denied").lower()
        raise InvalidFile(f"cannot write to {folder}: {reason}", "a folder that can be written to") from None


def _lock(file: BinaryIO, folder: Path) -> None:
    """Hold the file until it is closed; a killed process holds nothing."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise InvalidFile(f"another process writes to {folder}", "one at a time", "wait, or another --out") from None
    except OSError:
        pass  # a file system without locks


def _append(file: BinaryIO, data: bytes) -> None:
    try:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    except OSError as error:
        with suppress(OSError):
            file.close()
        raise InvalidFile(
            f"cannot write {file.name}: {(error.strerror or type(error).__name__).lower()}",
            "room on the disk",
            "free some space, then --resume: finished units are whole",
        ) from None
