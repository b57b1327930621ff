"""Proofs and attacks laid side by side per sample: clean >= PGD >= ensemble >= certified, in accuracy and in radius."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from analysis.evaluation import evaluate, fit
from analysis.plain import Record
from analysis.protocol import Protocol
from analysis.records import Evaluation, Rate
from certify import certified_radius, class_margins
from certify.attacks import FMN, Ensemble
from certify.errors import InvalidInput, SoundnessAlarm


@dataclass(frozen=True)
class RadiusPair(Record):
    """One image: the radius up to which it was proved, and the distance of the nearest adversarial example found.

    ``certified`` is 0 where nothing was proved, ``adversarial`` None where none was found. The true distance lies
    between the two.
    """

    index: int
    certified: float
    adversarial: float | None


@dataclass(frozen=True)
class Sandwich(Record):
    """One network: accuracies per radius after PGD alone (``first``), after all attacks and certified (``last``).

    ``pairs`` are the radii of the images that are right unchanged. Per image, what the ensemble leaves whole PGD leaves
    whole too, and what is certified the ensemble leaves whole: anything else is a ``SoundnessAlarm``.
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
    The radii are those of the protocol's last method and of FMN. Raises ``SoundnessAlarm`` where a proof and an attack
    contradict each other.
    """
    if not protocol.methods:
        raise InvalidInput("a comparison without bound methods", "at least one", "methods=('crown',)")
    x, y, classes = fit(model, x, y)
    whole = Ensemble(attacks=(protocol.attack, *Ensemble().attacks))
    first = evaluate(model, x, y, replace(protocol, methods=()), index=index, tick=tick)
    last = evaluate(model, x, y, replace(protocol, attack=whole), index=index, dump=dump, tick=tick)
    right = torch.tensor([sample.correct for sample in last.samples], device=x.device).nonzero()[:, 0]
    method = protocol.methods[-1]
    pairs: list[RadiusPair] = []
    for part in right.split(protocol.batch):
        places = index[part.cpu()]
        pairs += _pairs(model, x[part], y[part], classes, protocol, places)
        tick(len(part))
    return Sandwich(name, first, last, method, tuple(pairs))


def work(samples: int, protocol: Protocol) -> int:
    """Return how many pairs of image and task ``sandwich`` ticks off, at most."""
    return protocol.work(samples) + samples * (len(protocol.radii) + 1)


def _pairs(model: nn.Module, x: Tensor, y: Tensor, classes: int, protocol: Protocol, index: Tensor) -> list[RadiusPair]:
    """The radii of a batch of images that are right."""
    method, options = protocol.methods[-1], {"clip": protocol.clip, "arithmetic": protocol.arithmetic}
    proved = certified_radius(model, x, y, protocol.p, method, **options)  # type: ignore[arg-type]
    ball = protocol.ball(x, _widest(x, protocol))
    spec = class_margins(y, classes, x.dtype)
    found = FMN()(model, ball, spec, generator=protocol.seeds(index))
    distance = ball.distance(found.witness)
    _check(proved, distance, found.success, index, protocol)
    return [
        RadiusPair(place, radius, met if broken else None)
        for place, radius, met, broken in zip(
            index.tolist(), proved.tolist(), distance.tolist(), found.success.tolist(), strict=True
        )
    ]


def _widest(x: Tensor, protocol: Protocol) -> Fraction:
    """A radius within which every image of the data range lies."""
    low, high = protocol.clip or (float(x.min()) - 1, float(x.max()) + 1)
    features = x[0].numel()
    longest = features if protocol.p == 1 else features**0.5 if protocol.p == 2 else 1.0
    return Fraction((high - low) * longest)


def _check(
    proved: Float[Tensor, "n"],
    distance: Float[Tensor, "n"],
    broken: Bool[Tensor, "n"],
    index: Tensor,
    protocol: Protocol,
) -> None:
    """An adversarial example nearer than the proof allows: one of the two is wrong."""
    wrong = (broken & (distance < proved)).nonzero()[:, 0]
    if protocol.arithmetic == "float" and len(wrong):
        i = int(wrong[0])
        raise SoundnessAlarm(
            f"image {int(index[i])} is certified up to {float(proved[i]):.6g} and broken at {float(distance[i]):.6g}",
            "certified radius <= distance of every adversarial example: one of the two is wrong, and the run stops",
            "report it as a bug, with the network and the image",
        )
