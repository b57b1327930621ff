"""A run from its stage to its report: units computed, kept as they come, and read back."""

from __future__ import annotations

import math
import os
import platform
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from analysis.chunk import Tick
from analysis.lines import SCHEMA_VERSION, RunLine, pack
from analysis.manifest import manifest_of
from analysis.plain import encode
from analysis.records import Report
from analysis.shard import Shard
from analysis.store import InMemory, Store, kept_in
from analysis.units import Done, Stage, Unit
from analysis.workers import Load, in_turn, side_by_side


@dataclass(frozen=True)
class Heading:
    """What the first line says beside numbers: the command, its settings, and a sentence about the samples."""

    command: str
    arguments: dict[str, Any]
    samples: str


@dataclass(frozen=True, kw_only=True)
class Way:
    """How to compute a run, which never changes what comes out; ``shard`` is the part to do.

    After the ``deadline`` (of ``time.monotonic``) no unit is begun. Without a ``folder`` nothing is kept.
    ``load`` makes the stage in each of several ``jobs``.
    """

    folder: Path | None = None
    resume: bool = False
    jobs: int = 1
    shard: Shard | None = None
    deadline: float = math.inf
    load: Load | None = None


@dataclass(frozen=True)
class Result:
    """The report, and how many of the units that were asked for are done."""

    report: Report
    done: int
    asked: int


class Interrupted(KeyboardInterrupt):
    """The user stopped the run: ``done`` of ``asked`` units are finished."""

    def __init__(self, done: int, asked: int) -> None:
        super().__init__(done, asked)
        self.done, self.asked = done, asked


def carry_out(stage: Stage, heading: Heading, way: Way = Way(), tick: Tick = lambda _: None) -> Result:
    """Compute all units that are not there yet, and return the report of what is.

    In a folder every unit is computed by one thread, so that neither ``jobs`` nor the machine's cores change a bit.
    Raises ``Interrupted``, what ``kept_in`` raises for the folder, and what a unit raises.
    """
    asked = stage.units if way.shard is None else way.shard.take(stage.units)
    with _store(stage, heading, way) as store:
        todo = [unit for unit in asked if unit.number not in store.units]
        for unit in asked:
            if unit.number in store.units:
                tick(stage.work(unit))
        try:
            threads = nullcontext() if way.folder is None else one_thread()
            with threads, closing(_computed(stage, todo, way, tick)) as found:
                for done in found:
                    store.append(done)
        except KeyboardInterrupt:
            raise Interrupted(store.count(), len(asked)) from None
        return Result(store.report(), len(store.units), len(asked))


def _computed(stage: Stage, units: Sequence[Unit], way: Way, tick: Tick) -> Generator[Done, None, None]:
    if way.jobs == 1 or way.load is None:
        return in_turn(stage, units, way.deadline, tick)
    return side_by_side(way.load, stage, units, way.jobs, way.deadline, tick)


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute with one thread: sums of several threads may differ in their last bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _store(stage: Stage, heading: Heading, way: Way) -> Iterator[Store]:
    manifest, machine = manifest_of(stage), f"{platform.platform()}, {os.cpu_count()} cores"
    head = RunLine(
        schema_version=SCHEMA_VERSION,
        identity=manifest.identity,
        command=heading.command,
        arguments=encode(heading.arguments),
        samples=heading.samples,
        seed=stage.protocol.seed,
        versions=manifest.versions,
        count=len(stage.cases[0].batch.x),
        networks=len(stage.cases),
        units=len(stage.units),
        warnings=_warnings(stage),
    )
    text = pack(head) + b"".join(pack(case.about) for case in stage.cases)
    if way.folder is None:
        yield InMemory(text, machine)
        return
    shard = None if way.shard is None else str(way.shard)
    with kept_in(way.folder, text, manifest.of_shard(shard), machine, resume=way.resume) as store:
        yield store


def _warnings(stage: Stage) -> tuple[str, ...]:
    if math.isinf(stage.protocol.sample_seconds):
        return ()
    limit = f"{stage.protocol.sample_seconds:g} s"
    return (f"every sample had {limit}: verdicts depend on the machine's speed and cannot be reproduced exactly",)
