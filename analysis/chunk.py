"""Samples that are computed together: attacked and bounded at all radii, whatever stands in other chunks."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from analysis.arrays import save_arrays
from analysis.protocol import Protocol
from analysis.records import Outcome, SampleRecord
from analysis.shortage import Found, in_halves
from certify import AlphaCROWN, class_margins, prove
from certify.errors import InvalidInput, InvalidModel, SoundnessAlarm
from certify.propagate.methods import resolve_method

T = TypeVar("T")

#: Called with the number of (sample, task) pairs just done.
Tick = Callable[[int], None]
#: Called with a radius, places of samples in their data set, and the worst point met for each.
Keep = Callable[[Fraction, Tensor, Tensor], None]
#: Samples per chunk and radius that the attack just broke and that are bounded nevertheless, to check the bounds:
#: those broken by the least, which an unsound bound would certify first.
AUDIT = 16
#: The part of a sample's remaining time that a method which keeps time itself is given: its answer must be in time.
TRUSTED = 0.9


@dataclass(frozen=True, eq=False)
class Batch:
    """Samples as their network takes them, with true labels and places in their data set."""

    model: nn.Module
    x: Float[Tensor, "n *shape"]
    y: Int[Tensor, "n"]
    classes: int
    index: Int[Tensor, "n"]

    def take(self, part: Int[Tensor, "m"]) -> Batch:
        """Return some of the samples."""
        return replace(self, x=self.x[part], y=self.y[part], index=self.index[part])


@dataclass(frozen=True)
class Watch:
    """Who is told on the way: of progress, of the worst points met; ``dump`` takes the sample of an alarm."""

    tick: Tick = lambda _: None
    keep: Keep = lambda *_: None
    dump: Path | None = None


@dataclass(frozen=True)
class Measured:
    """What came out, the seconds spent per task, and sentences about memory that ran out."""

    records: tuple[SampleRecord, ...]
    seconds: dict[str, float]
    shortages: tuple[str, ...]


def measure(batch: Batch, protocol: Protocol, watch: Watch) -> Measured:
    """Return the records of the samples of one chunk: all at once, or one by one where each has its own time.

    Raises ``InvalidModel`` for outputs that are not finite, ``SoundnessAlarm`` for a sample that is both certified, in
    float arithmetic, and attacked.
    """
    whole = torch.arange(len(batch.x))
    parts = whole.split(1) if math.isfinite(protocol.sample_seconds) else (whole,)
    seconds, shortages = dict.fromkeys(("attack", *protocol.methods), 0.0), dict[str, None]()
    records: list[SampleRecord] = []
    for part in parts:
        trial = _Trial(batch.take(part), protocol, watch, seconds)
        for radius in protocol.radii:
            trial.step(radius)
            watch.keep(radius, trial.batch.index, trial.witness)
        records += trial.records()
        shortages |= trial.shortages
    return Measured(tuple(records), seconds, tuple(shortages))


def outputs_of(batch: Batch, notice: Callable[[Tensor], None] = lambda _: None) -> Float[Tensor, "n classes"]:
    """Return the network's outputs, computed in halves where memory runs out."""

    def compute(samples: Tensor) -> Found:
        with torch.no_grad():
            return (batch.model(batch.x[samples]),)

    def give_up(samples: Tensor) -> Found:
        place = int(batch.index[samples[0].cpu()])
        raise InvalidInput(f"memory runs out on sample {place} alone", "room for the network", "a larger machine")

    (outputs,) = in_halves(compute, torch.arange(len(batch.x), device=batch.x.device), give_up, notice)
    return outputs


class _Trial:
    """Samples under growing radii: what fell so far, and the witnesses of it."""

    def __init__(self, batch: Batch, protocol: Protocol, watch: Watch, seconds: dict[str, float]) -> None:
        self.batch, self.protocol, self.watch, self.seconds = batch, protocol, watch, seconds
        self.deadline = time.monotonic() + protocol.sample_seconds
        self.spec = class_margins(batch.y, batch.classes, batch.x.dtype)
        self.shortages: dict[str, None] = {}  # a set that keeps its order
        outputs = outputs_of(batch, self._notice("the network", Fraction(0)))
        if not bool(torch.isfinite(outputs).all()):
            raise InvalidModel("the model's outputs hold NaN or infinities", "finite outputs", "check weights and data")
        self.predicted = outputs.argmax(1)
        self.margin = self.spec.rows(outputs).amin(1)
        self.right = self.margin > 0  # a tie of the top logits is nobody's class
        self.worst, self.witness = self.margin.clone(), batch.x.clone()
        self.outcomes: list[list[Outcome]] = [[] for _ in batch.x]

    @property
    def standing(self) -> Tensor:
        """The samples that are right and not broken yet."""
        return (self.right & (self.worst >= 0)).nonzero()[:, 0]

    def records(self) -> list[SampleRecord]:
        """Return the records of the samples, after all steps."""
        columns = (column.tolist() for column in (self.batch.index, self.batch.y, self.predicted, self.margin))
        facts = zip(*columns, map(tuple, self.outcomes), strict=True)
        return [SampleRecord(*row) for row in facts]

    def step(self, radius: Fraction) -> None:
        """Attack and bound at a radius not below those before."""
        before = self.standing
        late: tuple[str, ...] = ()
        if len(before) and self._late():
            late = ("attack",)
        elif len(before):
            self._timed("attack", lambda: self._attack(before, radius))
        self.watch.tick(len(self.batch.x))
        bounded = self._bounded(before)
        lower: list[dict[str, float | None]] = [dict.fromkeys(self.protocol.methods) for _ in self.batch.x]
        for method in self.protocol.methods:
            bound = self._timed(method, lambda method=method: self._bound(bounded, radius, method))  # type: ignore[misc]
            if bound is None:
                late = (*late, method)
            else:
                for sample, value in zip(bounded.tolist(), bound.tolist(), strict=True):
                    lower[sample][method] = value if math.isfinite(value) else None
                self._check(bounded, bound, radius, method)
            self.watch.tick(len(self.batch.x))
        fallen = ~self.right | (self.worst < 0)
        columns = zip(self.outcomes, fallen.tolist(), self.worst.tolist(), lower, strict=True)
        for outcomes, attacked, worst, bounds in columns:
            outcomes.append(Outcome(radius, attacked, worst, bounds, late))

    def _attack(self, standing: Tensor, radius: Fraction) -> None:
        def search(samples: Tensor) -> Found:
            ball, spec = self.protocol.ball(self.batch.x[samples], radius), self.spec.take(samples)
            seeds = self.protocol.seeds(self.batch.index[samples.cpu()])
            found = self.protocol.attack(self.batch.model, ball, spec, generator=seeds)
            return found.margin.amin(1), found.witness

        def nothing(samples: Tensor) -> Found:
            return self.worst[samples], self.witness[samples]

        margin, witness = in_halves(search, standing, nothing, self._notice("the attack", radius))
        worse = margin < self.worst[standing]
        self.worst[standing[worse]], self.witness[standing[worse]] = margin[worse], witness[worse]

    def _bounded(self, before: Tensor) -> Tensor:
        """Of the samples that stood before the attack: those that still do, and the ones to audit."""
        fallen = before[self.worst[before] < 0]
        audited = fallen[self.worst[fallen].argsort(descending=True)[:AUDIT]]
        return torch.cat([self.standing, audited]).sort().values

    def _bound(self, samples: Tensor, radius: Fraction, name: str) -> Tensor | None:
        """The certified lower bound of the smallest margin, None where it did not come in time.

        The attack is over, so ``prove`` is given none. A method that keeps time itself and was cut short is late too,
        unless it proved everything before.
        """
        if len(samples) == 0:
            return self.margin[:0]
        if self._late():
            return None
        method, limit = resolve_method(name), math.inf
        if isinstance(method, AlphaCROWN):
            limit = TRUSTED * (self.deadline - time.monotonic())
            method = replace(method, time_limit=limit)
        start = time.monotonic()

        def lower(part: Tensor) -> Found:
            ball, spec = self.protocol.ball(self.batch.x[part], radius), self.spec.take(part)
            proof = prove(self.batch.model, ball, spec, method, arithmetic=self.protocol.arithmetic)
            return (proof.margin.lower.amin(1),)

        def unknown(part: Tensor) -> Found:
            return (torch.full((len(part),), -torch.inf, dtype=torch.float64, device=self.batch.x.device),)

        (bound,) = in_halves(lower, samples, unknown, self._notice(name, radius))
        cut = time.monotonic() - start >= limit and not bool((bound > 0).all())
        return None if cut or self._late() else bound

    def _check(self, samples: Tensor, bound: Tensor, radius: Fraction, method: str) -> None:
        """Stop the run where a certified sample was attacked: one of the two answers is wrong."""
        wrong = (bound > 0) & (self.worst[samples] < 0)
        if self.protocol.arithmetic != "float" or not bool(wrong.any()):
            return  # real-number bounds may differ from float networks by their rounding; the witness counts
        sample = int(samples[wrong.nonzero()[0, 0]])
        place = int(self.batch.index[sample])
        saved = "no folder was given for the sample"
        if self.watch.dump is not None:
            saved = f"the sample is in {self._dump(self.watch.dump / f'alarm-{place}.npz', sample, radius, method)}"
        raise SoundnessAlarm(
            f"sample {place} is both certified by {method} and attacked at radius {radius}",
            "certified <= attacked: one of the two is wrong, and the run stops",
            f"report it as a bug; {saved}",
        )

    def _dump(self, file: Path, sample: int, radius: Fraction, method: str) -> Path:
        batch = self.batch
        facts = {"label": int(batch.y[sample]), "index": int(batch.index[sample]), "radius": float(radius)}
        points = {"image": batch.x[sample].cpu().numpy(), "witness": self.witness[sample].cpu().numpy()}
        return save_arrays(file, {**points, **facts, "p": self.protocol.p, "method": method})

    def _late(self) -> bool:
        return time.monotonic() > self.deadline

    def _timed(self, task: str, action: Callable[[], T]) -> T:
        start = time.perf_counter()
        found = action()
        self.seconds[task] += time.perf_counter() - start
        return found

    def _notice(self, task: str, radius: Fraction) -> Callable[[Tensor], None]:
        def notice(samples: Tensor) -> None:
            what = f"{len(samples)} samples at once, which were halved"
            if len(samples) == 1:
                what = f"sample {int(self.batch.index[samples[0]])} alone, which {task} leaves unknown"
            self.shortages[f"memory ran out in {task} at radius {radius} on {what}"] = None

        return notice
