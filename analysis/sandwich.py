"""Proofs and attacks laid side by side per sample: clean >= PGD >= ensemble >= certified, in accuracy and in radius."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from analysis.chunk import Batch, Keep
from analysis.evaluation import evaluate, fit, tally
from analysis.plain import Record
from analysis.protocol import Protocol
from analysis.records import Evaluation, Rate, SampleRecord
from certify import certified_radius, class_margins
from certify.attacks import FMN, Bisection, Ensemble
from certify.errors import InvalidInput, SoundnessAlarm
from certify.notebook import table

#: Rows that the search for the nearest adversarial example aims at, those that look nearest.
ROWS = 9


@dataclass(frozen=True)
class RadiusPair(Record):
    """One image: the radius up to which it was proved, and the distance of the nearest adversarial example found.

    ``certified`` is the larger of the last method's radius, bisected, and of the radii asked for at which any method
    proved it; ``adversarial`` is the distance of the nearest of all that the attacks found, FMN's and bisected ones.

    ``certified`` is 0 where nothing was proved, ``adversarial`` None where none was found. The true distance lies
    between the two.
    """

    index: int
    certified: float
    adversarial: float | None


@dataclass(frozen=True)
class Sandwich(Record):
    """One network: accuracies per radius after PGD alone (``first``), after all attacks and certified (``last``).

    ``pairs`` are the radii of the images that are right unchanged. Per image, ``last`` counts as broken what either
    broke, so what it leaves whole PGD leaves whole too; what is certified no attack breaks, at any radius up to that:
    anything else is a ``SoundnessAlarm``.
    """

    name: str
    first: Evaluation
    last: Evaluation
    method: str
    pairs: tuple[RadiusPair, ...]

    def layers(self, place: int) -> tuple[Rate, Rate, Rate, Rate]:
        """Return clean, after PGD, after the ensemble, and certified by any method, at the radius of that place."""
        held = sum(sample.outcomes[place].verdict == "holds" for sample in self.last.samples)
        attacked = self.first.rows[place].attacked, self.last.rows[place].attacked
        return self.last.clean, *attacked, Rate(held, self.last.count)

    def _repr_html_(self) -> str:
        caption = f"{self.name}: accuracy in percent (95 % interval) on {self.last.count} samples, {self.last.norm}"
        head = "radius", "clean", "after the first attack", "after all", "certified"
        return table(caption, head, [(row.radius, *self.layers(place)) for place, row in enumerate(self.last.rows)])


def sandwich(
    name: str,
    model: nn.Module,
    x: Float[Tensor, "n *shape"],
    y: Int[Tensor, "n"],
    protocol: Protocol,
    *,
    index: Int[Tensor, "n"],
    dump: Path | None = None,
    tick: Callable[[int], None] = lambda _: None,
) -> Sandwich:
    """Return what PGD, the ensemble and the protocol's methods say of the same images.

    The protocol's attack is the first layer, PGD or another; the ensemble runs it first, with the same random numbers.
    The radii are found by the protocol's last method and by FMN, beside what both attacks met on the way. Raises
    ``SoundnessAlarm`` where a proof and an attack contradict each other.
    """
    if not protocol.methods:
        raise InvalidInput("a comparison without bound methods", "at least one", "methods=('crown',)")
    x, y, classes = fit(model, x, y)
    whole = Ensemble(attacks=(protocol.attack, *Ensemble().attacks))
    met = x.clone(), x.clone()
    asked, everything = replace(protocol, methods=()), replace(protocol, attack=whole)
    first = evaluate(model, x, y, asked, index=index, tick=tick, keep=_keeper(met[0], index))
    last = evaluate(model, x, y, everything, index=index, dump=dump, tick=tick, keep=_keeper(met[1], index))
    samples = [_joined(*pair, protocol) for pair in zip(first.samples, last.samples, strict=True)]
    last = tally(samples, everything.conditions(x.dtype))
    proved = torch.tensor([_proved(sample) for sample in samples], dtype=torch.float64, device=x.device)
    right = torch.tensor([sample.correct for sample in samples], device=x.device).nonzero()[:, 0]
    pairs: list[RadiusPair] = []
    for part in right.split(protocol.batch) if len(right) else ():
        batch = Batch(model, x[part], y[part], classes, index[part.cpu()])
        pairs += _pairs(batch, protocol, proved[part], [points[part] for points in met])
        tick(len(part))
    return Sandwich(name, first, last, protocol.methods[-1], tuple(pairs))


def work(samples: int, protocol: Protocol) -> int:
    """Return how many pairs of image and task ``sandwich`` ticks off, at most."""
    return protocol.work(samples) + samples * (len(protocol.radii) + 1)


def _keeper(points: Tensor, index: Tensor) -> Keep:
    """Puts the worst points met where their images stand; a broken one's is that of the smallest radius it fell at."""
    places = {number: place for place, number in enumerate(index.tolist())}

    def keep(_: Fraction, numbers: Tensor, found: Tensor) -> None:
        points[[places[number] for number in numbers.tolist()]] = found

    return keep


def _joined(first: SampleRecord, last: SampleRecord, protocol: Protocol) -> SampleRecord:
    """The last record, with what the first attack alone broke: in other batches it rounds otherwise."""
    outcomes = list(last.outcomes)
    for place, (one, other) in enumerate(zip(first.outcomes, last.outcomes, strict=True)):
        if one.attacked and not other.attacked:
            if other.verdict == "holds" and protocol.arithmetic == "float":
                raise _alarm(last.index, float(other.radius), float(one.radius))
            outcomes[place] = replace(other, attacked=True, worst=min(one.worst, other.worst))
    return replace(last, outcomes=tuple(outcomes))


def _proved(sample: SampleRecord) -> float:
    """The largest radius asked for at which some method proved the image."""
    proved = max((outcome.radius for outcome in sample.outcomes if outcome.verdict == "holds"), default=Fraction(0))
    rounded = float(proved)
    return rounded if Fraction(rounded) <= proved else math.nextafter(rounded, 0.0)


def _pairs(batch: Batch, protocol: Protocol, held: Float[Tensor, "n"], met: Sequence[Tensor]) -> list[RadiusPair]:
    """The radii of a batch of images that are right; ``held`` are those already proved, ``met`` the worst points."""
    model, x, options = batch.model, batch.x, {"clip": protocol.clip, "arithmetic": protocol.arithmetic}
    proved = certified_radius(model, x, batch.y, protocol.p, protocol.methods[-1], **options)  # type: ignore[arg-type]
    proved = torch.maximum(proved, held)
    ball, spec = protocol.ball(x, _widest(x, protocol)), class_margins(batch.y, batch.classes, x.dtype)
    distance = torch.full_like(proved, torch.inf)
    for attack in (FMN(targets=ROWS), *(Bisection(far=points) for points in met)):
        found = attack(model, ball, spec, generator=protocol.seeds(batch.index))
        distance = torch.where(found.success, torch.minimum(distance, ball.distance(found.witness)), distance)
    if protocol.arithmetic == "float":
        for i in (distance < proved).nonzero()[:1, 0].tolist():
            raise _alarm(int(batch.index[i]), float(proved[i]), float(distance[i]))
    return [
        RadiusPair(place, radius, nearest if nearest < torch.inf else None)
        for place, radius, nearest in zip(batch.index.tolist(), proved.tolist(), distance.tolist(), strict=True)
    ]


def _widest(x: Tensor, protocol: Protocol) -> Fraction:
    """A radius within which every image of the data range lies."""
    low, high = protocol.clip or (float(x.min()) - 1, float(x.max()) + 1)
    features = x[0].numel()
    longest = features if protocol.p == 1 else features**0.5 if protocol.p == 2 else 1.0
    return Fraction((high - low) * longest)


def _alarm(index: int, certified: float, broken: float) -> SoundnessAlarm:
    """An adversarial example nearer than the proof allows: one of the two is wrong."""
    return SoundnessAlarm(
        f"image {index} is certified up to {certified:.6g} and broken at {broken:.6g}",
        "certified radius <= distance of every adversarial example: one of the two is wrong, and the run stops",
        "report it as a bug, with the network and the image",
    )
