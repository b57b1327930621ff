"""Shards of one run to the run: the bytes that one undivided run would have written."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from analysis.journal import MANIFEST, RECORDS, TIMINGS, Contents, Timing, read, scan, timings_in
from analysis.lines import sealed
from analysis.manifest import Manifest
from analysis.records import Report
from analysis.shard import Shard
from certify.errors import InvalidFile, InvalidInput
from models.files import read_bytes, write


@dataclass(frozen=True)
class _Part:
    """A shard and its folder."""

    folder: Path
    manifest: Manifest
    shard: Shard


def merge(folders: Sequence[Path], out: Path) -> Report:
    """Write the run whose shards are in the folders, in any order, to ``out``, and return its report.

    Raises ``InvalidFile`` for shards that are missing, there twice, torn, unfinished or of different runs, and
    ``InvalidInput`` where ``out`` holds records already.
    """
    if (out / RECORDS).exists():
        raise InvalidInput(f"{out} holds the records of a run already", "a new folder", "another --out")
    parts = sorted((_part(folder) for folder in folders), key=lambda part: part.shard)
    _check(parts)
    found = [_contents(part) for part in parts]
    units = {number: body for contents in found for number, body in contents.units.items()}
    heading = found[0].heading
    records = heading + b"".join(sealed(heading, number, units[number]) for number in sorted(units))
    timings = [timing for part in parts for timing in _timings(part.folder / TIMINGS)]
    write(
        {
            out / MANIFEST: parts[0].manifest.of_shard(None).text(),
            out / TIMINGS: b"".join(timing.line() for timing in sorted(timings, key=lambda timing: timing.unit)),
            out / RECORDS: records,
        }
    )
    return read(out)


def _part(folder: Path) -> _Part:
    manifest = Manifest.read(folder / MANIFEST)
    if manifest.shard is None:
        raise InvalidFile(f"{folder} holds an undivided run", "shards: runs with --shard I/N", "leave it out")
    return _Part(folder, manifest, Shard.parse(manifest.shard))


def _check(parts: Sequence[_Part]) -> None:
    """Refuse what is not every shard of one run, once."""
    first, n = parts[0], parts[0].shard.n
    for part in parts[1:]:
        different = list(first.manifest.differences(part.manifest.of_shard(first.manifest.shard)))
        if different or part.shard.n != n:
            raise InvalidFile(
                f"{first.folder} and {part.folder} are of different runs: {', '.join(different) or 'other shards'}",
                "shards of one run",
                "leave one of them out",
            )
    places = [part.shard.i for part in parts]
    twice = sorted({place for place in places if places.count(place) > 1})
    if twice:
        which = ", ".join(str(part.folder) for part in parts if part.shard.i == twice[0])
        raise InvalidFile(f"shard {twice[0]}/{n} is there twice: {which}", "every shard once", "leave one out")
    missing = [str(place) for place in range(1, n + 1) if place not in places]
    if missing:
        raise InvalidFile(
            f"of {n} shards {', '.join(missing)} are missing",
            f"all of 1 to {n}",
            f"add their folders; certify report ... --shard {missing[0]}/{n} computes one",
        )


def _contents(part: _Part) -> Contents:
    """The whole units of a shard, none of which may be missing or torn."""
    file = part.folder / RECORDS
    data = read_bytes(file)
    found = scan(data, str(file))
    wanted = set(part.shard.take(range(found.run.units)))
    if found.run.identity != part.manifest.identity or not set(found.units) <= wanted:
        raise InvalidFile(f"{file} does not belong to the manifest beside it", "both of one shard", "copy both again")
    if found.whole != len(data) or set(found.units) != wanted:
        raise InvalidFile(
            f"shard {part.shard} in {part.folder} is not finished: {len(found.units)} of {len(wanted)} units",
            "finished shards",
            "the command that began it, with --resume",
        )
    return found


def _timings(file: Path) -> Iterator[Timing]:
    yield from timings_in(read_bytes(file) if file.is_file() else b"")
