"""Reports made up for tests of what renders them: any size, any names, no network."""

from __future__ import annotations

import random
from fractions import Fraction

from analysis.layer_records import Histogram, LayerRow, Neuron, Neurons, Pixels, Sensitivity, Shape
from analysis.records import Course, Evaluation, NetworkReport, Outcome, RadiusRow, Rate, Report, SampleRecord

RADII = (Fraction(2, 255), Fraction(1, 20), Fraction(1, 10))
METHODS = ("ibp", "crown")


def made_up(names: tuple[str, ...] = ("relu", "kaf"), count: int = 300, *, layers: int = 2) -> Report:
    """Return a report on so many samples; networks have that many layers of each kind."""
    draw = random.Random(0)
    return Report(
        command="report",
        arguments={"radius": "2/255,0.05,0.1", "methods": "ibp,crown", "seed": 0, "out": None},
        samples=f"{count} of {count} test images of nothing (seed 0)",
        seed=0,
        versions={"python": "3.11", "torch": "2.15"},
        networks=tuple(_network(name, count, draw, layers) for name in names),
        warnings=("a warning that was noted",),
        course=Course("a machine of 2 cores", {name: {"attack": 12.5, "crown": 0.25} for name in names}),
    )


def _network(name: str, count: int, draw: random.Random, layers: int) -> NetworkReport:
    samples = tuple(_sample(index, draw) for index in range(count))
    rows = tuple(_row(samples, place) for place in range(len(RADII)))
    found = Evaluation(
        clean=Rate(sum(sample.correct for sample in samples), count),
        rows=rows,
        norm="linf",
        clip=(0.0, 1.0),
        methods=METHODS,
        attack="PGD(steps=40, restarts=5)",
        arithmetic="float32-any-order",
        seed=0,
        samples=samples,
    )
    source, parameters = f"runs/{name}", 12345
    return NetworkReport(name, source, "mlp", parameters, "none", found, _layers(layers, draw) if layers else None)


def _sample(index: int, draw: random.Random) -> SampleRecord:
    margin, label = draw.gauss(1.5, 1.0), 7 * index % 10
    outcomes, fallen = [], margin <= 0
    worst = margin
    for radius in RADII:
        worst = min(worst, margin - 15 * float(radius) * draw.uniform(0.8, 1.0))
        fallen = fallen or worst < 0
        lower = {"ibp": worst - draw.expovariate(1.0), "crown": worst - draw.expovariate(8.0)}
        outcomes.append(Outcome(radius, fallen, worst, dict.fromkeys(METHODS) if fallen else lower))
    return SampleRecord(index, label, label if margin > 0 else (label + 1) % 10, margin, tuple(outcomes))


def _row(samples: tuple[SampleRecord, ...], place: int) -> RadiusRow:
    found = [sample.outcomes[place] for sample in samples]
    rates = {method: Rate(sum(outcome.certified(method) for outcome in found), len(found)) for method in METHODS}
    attacked = Rate(sum(not outcome.attacked for outcome in found), len(found))
    spare = {"seconds": {}} if "seconds" in RadiusRow.__dataclass_fields__ else {}
    return RadiusRow(RADII[place], attacked, rates, **spare)


def _layers(count: int, draw: random.Random) -> Sensitivity:
    rows = tuple(row for place in range(1, count + 1) for row in _pair(place, count, draw))
    names = tuple(row.name for row in rows if row.share > 0)
    edges = tuple(place / 10 for place in range(-30, 31))
    return Sensitivity(
        radius=RADII[1],
        norm="linf",
        method="crown",
        arithmetic="float32-any-order",
        count=50,
        rows=rows,
        sentences=(*(f"{name} (KAF) costs something." for name in names[:3]), "Bounds grow."),
        ranking=names,
        neurons=tuple(_neurons(row) for row in rows),
        histograms=tuple(Histogram(name, edges, _shares(draw), _shares(draw)) for name in names),
        shapes=tuple(_shape(name, draw) for name in names),
        pixels=Pixels((1, 8, 8), tuple(draw.random() for _ in range(64))),
    )


def _pair(place: int, count: int, draw: random.Random) -> tuple[LayerRow, LayerRow]:
    """A dense layer and its activation."""
    numbers = {name: draw.random() for name in ("width_ibp", "width_crown", "distance_mean", "distance_p95")}
    common = {"shape": (64,), "lipschitz_upper": 2.0, "lipschitz_lower": 1.0, "growth": 1.5, "gradient": 1.0, **numbers}
    affine = {"parameters": 4160, "unstable": None, "gap": None, "share": 0.0, "gain": 0.0}
    bent = {"parameters": 1280, "unstable": None, "gap": 0.01, "share": 1 / count, "gain": draw.random()}
    dense = LayerRow(name=f"linear{place}", kind="Linear", **common, **affine)  # type: ignore[arg-type]
    return dense, LayerRow(name=f"act{place}", kind="KAF", **common, **bent)  # type: ignore[arg-type]


def _neurons(row: LayerRow) -> Neurons:
    neuron = Neuron(3, -1.0, 1.0, -0.5, 0.5, None, row.gap, row.share, 1.25)
    return Neurons(row.name, row.kind, "neuron", 64, row.share, (neuron,))


def _shares(draw: random.Random) -> tuple[float, ...]:
    values = [draw.random() for _ in range(60)]
    return tuple(value / sum(values) for value in values)


def _shape(name: str, draw: random.Random) -> Shape:
    places = tuple(place / 25 for place in range(-50, 51))
    bends = [draw.uniform(0.5, 2.0) for _ in range(16)]
    return Shape(name, places, tuple(tuple(bend * x * abs(x) for x in places) for bend in bends), (0.0, 8.0), None)
