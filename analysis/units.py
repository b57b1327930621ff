"""A run as a list of units of work, each always the same whoever computes it, in whatever order."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import torch
from torch import Tensor

from analysis.chunk import Batch, Tick, Watch, measure, outputs_of
from analysis.layers import layer_sensitivity
from analysis.lines import LayersLine, Line, NetworkLine, SampleLine, WarningLine, pack
from analysis.protocol import Protocol
from analysis.records import Sensitivity
from certify import class_margins
from certify.memory import is_shortage


@dataclass(frozen=True)
class LayerPlan:
    """At which radius and on how many samples the layers are measured; None: not at all."""

    radius: Fraction | None
    samples: int


@dataclass(frozen=True, eq=False)
class Case:
    """A network with its samples, and what is said about it."""

    about: NetworkLine
    batch: Batch


@dataclass(frozen=True)
class Unit:
    """A part of the samples of one case, or (None) its layers."""

    number: int
    case: int
    part: tuple[int, int] | None


@dataclass(frozen=True, eq=False)
class Stage:
    """All that a run works on: cases, what is asked of each, and the folder for the sample of an alarm."""

    cases: tuple[Case, ...]
    protocol: Protocol
    layers: LayerPlan
    dump: Path | None = None

    @property
    def units(self) -> tuple[Unit, ...]:
        """Every unit of the run, in order: case by case, samples before layers."""
        return tuple(Unit(number, *rest) for number, rest in enumerate(self._parts()))

    def work(self, unit: Unit) -> int:
        """Return how much progress a unit is."""
        return 1 if unit.part is None else self.protocol.work(unit.part[1] - unit.part[0])

    def _parts(self) -> Iterator[tuple[int, tuple[int, int] | None]]:
        size = self.protocol.batch
        for place, case in enumerate(self.cases):
            count = len(case.batch.x)
            yield from ((place, (first, min(first + size, count))) for first in range(0, count, size))
            if self.layers.radius is not None:
                yield place, None


@dataclass(frozen=True)
class Done:
    """A finished unit: the bytes of its lines, and the seconds spent per task."""

    unit: int
    network: str
    data: bytes
    seconds: dict[str, float]


def perform(stage: Stage, unit: Unit, tick: Tick = lambda _: None) -> Done:
    """Return what a unit gives; nothing but the stage decides it."""
    case = stage.cases[unit.case]
    name = case.about.name
    if unit.part is None:
        start = time.perf_counter()
        layers = _layers(case, stage)
        tick(1)
        return Done(unit.number, name, _packed(layers), {"layers": time.perf_counter() - start})
    batch = case.batch.take(torch.arange(*unit.part))
    found = measure(batch, stage.protocol, Watch(tick=tick, dump=stage.dump))
    lines: list[Line] = [SampleLine(name, record) for record in found.records]
    lines += [WarningLine(name, text) for text in found.shortages]
    return Done(unit.number, name, _packed(lines), found.seconds)


def _packed(lines: Sequence[Line]) -> bytes:
    return b"".join(pack(line) for line in lines)


def _layers(case: Case, stage: Stage) -> list[Line]:
    """The layers on the first samples that the network gets right, on half as many where memory runs out."""
    chosen, lines = _right(case.batch, stage.protocol.batch, stage.layers.samples), list[Line]()
    while len(chosen):
        try:
            return [*lines, LayersLine(case.about.name, _sensitivity(case.batch.take(chosen), stage))]
        except (RuntimeError, MemoryError) as error:
            if not is_shortage(error):
                raise
        lines.append(WarningLine(case.about.name, f"memory ran out for the layers on {len(chosen)} samples"))
        chosen = chosen[: len(chosen) // 2]
    return lines


def _sensitivity(batch: Batch, stage: Stage) -> Sensitivity:
    assert stage.layers.radius is not None
    return layer_sensitivity(batch.model, batch.x, batch.y, stage.protocol, radius=stage.layers.radius)


def _right(batch: Batch, size: int, wanted: int) -> Tensor:
    """The places of the first samples that are classified right, found in the chunks of the evaluation."""
    right, places = torch.empty(0, dtype=torch.long), torch.arange(len(batch.x))
    for part in places.split(size):
        some = batch.take(part)
        rows = class_margins(some.y, some.classes, some.x.dtype).rows(outputs_of(some))
        right = torch.cat([right, part[(rows > 0).all(1).cpu()]])
        if len(right) >= wanted:
            break
    return right[:wanted]
