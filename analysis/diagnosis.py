"""The diagnosis of a network: gradients, gains, pre-activations clean and attacked, and the learned functions."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from analysis.layer_records import Histogram, Shape
from analysis.plain import Record
from certify import Interval, LpBall, class_margins
from certify.attacks import PGD
from certify.errors import UnsupportedOperation
from certify.graph import trace
from certify.ops.base import Elementwise
from models import KAF, KAFFacts
from models.diagnosis import activations, channels_of, gain, nan_origin, watched
from models.kaf_tails import TailedFacts
from models.training.gradients import gradient_norms, gradient_ratio

#: Bins of a histogram, points of a drawn function, images of a batch of gradients.
BINS, POINTS, BATCH = 60, 401, 128
Ends = tuple[float, float]


@dataclass(frozen=True)
class Diagnosis(Record):
    """What is known of a network; ``start`` are gradient norms at initialisation, ``now`` at the present weights.

    ``ratio_start`` and ``ratio_now`` are first-to-last ratios of these; ``gains`` are E f'^2 / Var f by activation;
    ``origin`` names the first value that is not finite.
    """

    start: dict[str, float]
    now: dict[str, float]
    ratio_start: float
    ratio_now: float
    gains: dict[str, float | None]
    origin: str | None
    histograms: tuple[Histogram, ...]
    shapes: tuple[Shape, ...]


def diagnose(
    start: nn.Module,
    model: nn.Module,
    x: Float[Tensor, "n *shape"],
    y: Int[Tensor, "n"],
    *,
    radius: float = 0.0,
    seed: int = 0,
) -> Diagnosis:
    """Return the diagnosis of ``model``, in eval mode, beside ``start``, the same network at its initialisation.

    Gradients are those of at most 128 of the images; pre-activations are compared at ``radius`` (linf, PGD of 20
    steps), or not at all at 0 or where values are not finite.
    """
    part = x[:BATCH], y[:BATCH]
    origin = nan_origin(model, *part)
    norms = gradient_norms(start, *part), gradient_norms(model, *part)
    channels = channels_of(model, x[:1])
    found = activations(model)
    return Diagnosis(
        start=norms[0],
        now=norms[1],
        ratio_start=gradient_ratio(norms[0]),
        ratio_now=gradient_ratio(norms[1]),
        gains={name: gain(found[name], channels[name]) for name in channels},
        origin=origin,
        histograms=_histograms(model, x, y, radius, seed) if radius and origin is None else (),
        shapes=learned_shapes(model),
    )


def _histograms(model: nn.Module, x: Tensor, y: Tensor, radius: float, seed: int) -> tuple[Histogram, ...]:
    """Pre-activations of every activation, clean and attacked, in common bins."""
    ball = LpBall(x, radius, clip=(0.0, 1.0))
    with torch.no_grad():
        classes = model(x[:1]).shape[1]
    attack, draw = PGD(steps=20), torch.Generator().manual_seed(seed)
    witness = attack(model, ball, class_margins(y, classes, x.dtype), generator=draw).witness
    with torch.no_grad(), watched(activations(model)) as clean:
        model(x)
    with torch.no_grad(), watched(activations(model)) as moved:
        model(witness)
    return tuple(histogram(name, clean[name][0], moved[name][0]) for name in clean)


def histogram(name: str, clean: Tensor, moved: Tensor) -> Histogram:
    """Return how often the values of a layer fall into common bins, before and after an attack."""
    both = torch.cat([clean.flatten(), moved.flatten()]).double().cpu()
    low, high = float(both.min()), float(both.max())
    edges = torch.linspace(low, high if high > low else low + 1, BINS + 1, dtype=torch.float64)
    shares = []
    for values in (clean, moved):
        counts = torch.histogram(values.flatten().double().cpu(), edges)[0]
        shares.append(tuple((counts / counts.sum()).tolist()))
    return Histogram(name, tuple(edges.tolist()), shares[0], shares[1])


def learned_shapes(model: nn.Module, *, points: int = POINTS, curves: int | None = None) -> tuple[Shape, ...]:
    """Return the functions of every KAF layer, or ``curves`` evenly chosen ones; the ranges are always those of all."""
    found = activations(model).items()
    return tuple(_shape(name, kaf, points, curves) for name, kaf in found if isinstance(kaf, KAF))


def _shape(name: str, kaf: KAF, points: int, curves: int | None) -> Shape:
    """The functions of a KAF layer over its dictionary and a third beyond, and their certified ranges.

    Where nothing certifies it, as with most kernels, all that is known of its slopes is that they are numbers.
    """
    channels = len(kaf.alpha)
    shown = sorted({i * channels // (curves or channels) for i in range(min(curves or channels, channels))})
    end = 4 / 3 * float(kaf.dictionary.detach().abs().max())
    places = torch.linspace(-end, end, points)
    with torch.no_grad():
        values = kaf(places[:, None].expand(-1, channels).to(kaf.alpha)).t()
    try:
        slope, bent = _ranges(kaf)
    except UnsupportedOperation:
        slope, bent = (-math.inf, math.inf), None
    return Shape(name, tuple(places.tolist()), tuple(map(tuple, values[shown].tolist())), slope, bent)


def _ranges(kaf: KAF) -> tuple[Ends, Ends | None]:
    """Certified ranges of f' and f'' on the whole line, of f'' where there is no base."""
    channels = len(kaf.alpha)
    twin = trace(kaf, kaf.alpha.new_zeros((1, channels)))
    rule = twin.nodes[twin.output].rule
    assert isinstance(rule, Elementwise)
    assert isinstance(rule.facts, (KAFFacts, TailedFacts))
    line = Interval(*(kaf.alpha.detach().new_full((1, channels), sign * torch.inf) for sign in (-1, 1)))
    slope = rule.facts.slope_range(line)
    bent = None if kaf.base is not None else rule.facts.curvature(line)
    ends = (float(slope.lower.min()), float(slope.upper.max()))
    return ends, None if bent is None else (float(bent.lower.min()), float(bent.upper.max()))
