"""Accuracy of the smoothed classifier, certified with high probability: beside the proofs, never among them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from analysis.evaluation import fit
from analysis.plain import Record
from analysis.protocol import Protocol
from analysis.records import Rate
from certify.notebook import table
from certify.smoothing import ABSTAIN, Smoothing, certify_smoothed


@dataclass(frozen=True)
class SmoothedSample(Record):
    """One sample: ``predicted`` is None where the smoothed classifier abstains, ``radius`` (l2) then 0."""

    index: int
    label: int
    predicted: int | None
    radius: float


@dataclass(frozen=True)
class SmoothedAccuracy(Record):
    """Over all samples: ``clean`` right, ``abstained``, and ``certified`` right within each of ``radii`` (l2).

    Each certificate holds with probability 1 - ``alpha`` at least, for the smoothed classifier and not for the network
    itself. Intervals are over samples.
    """

    sigma: float
    alpha: float
    count: int
    clean: Rate
    abstained: Rate
    radii: tuple[Fraction, ...]
    certified: tuple[Rate, ...]
    samples: tuple[SmoothedSample, ...]

    def _repr_html_(self) -> str:
        caption = f"PROBABLE, not proved: smoothed with sigma {self.sigma:g}, each to {100 * (1 - self.alpha):g} %"
        rows: list[tuple[str, Rate]] = [("clean", self.clean), ("abstained", self.abstained)]
        rows += [
            (f"certified within {radius} (l2)", rate) for radius, rate in zip(self.radii, self.certified, strict=True)
        ]
        return table(caption, ("of all samples", "percent (95 % interval)"), rows)


def smoothed_accuracy(
    model: nn.Module,
    x: Float[Tensor, "n *shape"],
    y: Int[Tensor, "n"],
    smoothing: Smoothing,
    protocol: Protocol,
    *,
    index: Int[Tensor, "n"],
    tick: Callable[[int], None] = lambda _: None,
) -> SmoothedAccuracy:
    """Return the accuracies at the protocol's radii; ``index`` are the samples' places in their data set.

    ``tick`` is told of every sample done. Raises what ``certify_smoothed`` raises, and ``InvalidInput`` for labels that
    the network has no class for.
    """
    x, y, _ = fit(model, x, y)
    radii, seeds = protocol.radii, protocol.seeds(index)
    samples: list[SmoothedSample] = []
    right = torch.zeros((len(radii), len(x)), dtype=torch.bool)
    for i in range(len(x)):
        found = certify_smoothed(model, x[i : i + 1], smoothing, generator=seeds[i : i + 1])
        predicted = int(found.predicted)
        known = None if predicted == ABSTAIN else predicted
        samples.append(SmoothedSample(int(index[i]), int(y[i]), known, float(found.radius)))
        for place, radius in enumerate(radii):
            right[place, i] = bool(found.certified(y[i : i + 1], float(radius)))
        tick(1)
    total = len(x)
    return SmoothedAccuracy(
        sigma=smoothing.sigma,
        alpha=smoothing.alpha,
        count=smoothing.count,
        clean=Rate(sum(sample.predicted == sample.label for sample in samples), total),
        abstained=Rate(sum(sample.predicted is None for sample in samples), total),
        radii=radii,
        certified=tuple(Rate(int(row.sum()), total) for row in right),
        samples=tuple(samples),
    )
