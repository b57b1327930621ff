"""Layers ranked by what they cost the bounds, and a sentence for each of the first: what it does, what would help."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

from analysis.layer_records import LayerRow, Shape

#: Layers that get a sentence.
TOP = 3
#: A certified stretch so many times the met one is more than samples need.
LOOSE = 2.0
#: Either takes a quarter to two thirds off what the relaxed layers of a 64-64 network on digits cost at .05, with
#: ReLU, tanh or KAFs, for at most 3 points of clean accuracy, as training on bounds does. A tenth of it does little.
SMALLER = "--weight-decay 0.01 or --set penalties.lipschitz=0.1"
PLACES = ("costs most", "comes second", "comes third")


@dataclass(frozen=True)
class Findings:
    """What sentences are made of: the layers in order, learned functions by layer, and where it was measured."""

    rows: Sequence[LayerRow]
    shapes: Mapping[str, Shape]
    radius: Fraction
    norm: str

    @property
    def threat(self) -> str:
        """What to train against, as options of ``certify train``."""
        return f"--radius {self.radius} --norm {self.norm}"

    @property
    def ranked(self) -> list[LayerRow]:
        """The layers that loosen the bounds: largest gain first, then largest share."""
        return sorted((row for row in self.rows if row.share > 0), key=lambda row: (-row.gain, -row.share))


def sentences(found: Findings) -> list[str]:
    """Return a sentence per top layer, and one about the layer in which bounds grow most."""
    said = _costs(found.ranked[:TOP], found) or ["No layer loosens the bounds: all of them are exact here."]
    growing = max((row for row in found.rows if row.growth is not None), key=lambda row: row.growth or 0, default=None)
    if growing is not None and growing.growth is not None and growing.growth > 1:
        said.append(
            f"Bounds grow most in {growing.name} ({growing.kind}): its output's bounds are {growing.growth:.1f} times "
            f"as wide as its input's; {_narrower(growing, found)}."
        )
    return said


def _costs(ranked: Sequence[LayerRow], found: Findings) -> list[str]:
    """What each of these layers costs, why, and what would help, the last said once."""
    said: list[str] = []
    known: set[str] = set()
    for row, place in zip(ranked, PLACES, strict=False):
        gain = "exact bounds for it alone would raise the margins' bounds by up to" if not said else "up to"
        remedy = _remedy(row, found)
        because = f"{_reason(row, found)}: {'the same helps' if remedy in known else remedy}"
        known.add(remedy)
        said.append(f"{row.name} ({row.kind}) {place}: {gain} {row.gain:.2g} on average. {because}.")
    return said


def _reason(row: LayerRow, found: Findings) -> str:
    """Why a relaxed layer loosens the bounds."""
    size = math.prod(row.shape)
    if _pools(row):
        return f"Which element is the largest is not decided in its {size} windows"
    if row.unstable is not None:
        return (
            f"On average {100 * row.unstable:.0f} % of its {size} neurons are unstable, with a kink inside their "
            "bounds and one straight line for both sides of it"
        )
    width, shape = row.width_crown / row.growth if row.growth else 0.0, found.shapes.get(row.name)
    apart = (
        f"Each of its {size} functions lies between two straight lines, {row.gap:.2g} apart on average for inputs "
        f"known up to {width:.2g}"
    )
    if not _is_steep(row, shape):
        return apart
    return f"{apart}; certified slopes reach {_steepest(shape):.2g}, and samples met {row.lipschitz_lower:.2g}"


def _remedy(row: LayerRow, found: Findings) -> str:
    """What would tighten the bounds at a relaxed layer."""
    shape = found.shapes.get(row.name)
    if _pools(row):
        return "an average or a strided convolution in its place is exact"
    if row.unstable is not None:
        return f"training on bounds (--method crown-ibp {found.threat}) or smaller weights ({SMALLER}) leave fewer"
    narrower = f"smaller weights ({SMALLER}) narrow its inputs"
    if shape is None:
        return f"{narrower}, training on bounds (--method crown-ibp {found.threat}) too"
    if _is_steep(row, shape):
        return f"{narrower}, and a slope penalty (--set penalties.slope=0.1) lowers certified slopes"
    if shape.curvature is not None:
        return f"{narrower}, and a curvature penalty (--set penalties.curvature=0.1) straightens its functions"
    return narrower


def _steepest(shape: Shape | None) -> float:
    """The largest certified slope of learned functions."""
    return 0.0 if shape is None else max(map(abs, shape.slope))


def _is_steep(row: LayerRow, shape: Shape | None) -> bool:
    """Whether certified slopes are far above those that samples met."""
    return row.lipschitz_lower is not None and _steepest(shape) > LOOSE * row.lipschitz_lower


def _pools(row: LayerRow) -> bool:
    return "pool" in row.kind.lower()


def _narrower(row: LayerRow, found: Findings) -> str:
    """What makes a layer widen bounds less."""
    low, high = row.lipschitz_lower, row.lipschitz_upper
    if low is not None and high is not None and high > LOOSE * low:
        return (
            f"its certified stretch {high:.2g} is far above the {low:.2g} that samples met, and a norm penalty (--set "
            "penalties.lipschitz=0.1) takes away what they do not need"
        )
    first = next((other for other in found.rows if not other.moves_only), None)
    if row is first:
        return (
            f"the first layer adds up the radius of all pixels, and smaller weights (--weight-decay 0.01) or training "
            f"on interval bounds (--method ibp {found.threat}) help"
        )
    return f"smaller weights ({SMALLER}) narrow all that follows"
