"""What was measured of layers, neurons, learned functions and pixels. Frozen, plain data on request."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

from analysis.plain import Record
from certify.notebook import table


@dataclass(frozen=True)
class LayerRow(Record):
    """One node of the network; means are over samples and neurons, None stands for "has no such number".

    ``lipschitz_upper`` is certified for the whole space, ``lipschitz_lower`` the largest ratio met on sampled pairs
    (l2 both). ``width_ibp`` and ``width_crown`` are mean widths of the output's bounds; ``growth`` is the CROWN
    width over that of the inputs. ``unstable`` is the share of neurons with a kink inside their bounds (piecewise
    linear), ``gap`` the mean distance of the two lines around a smooth function. ``share`` of the looseness of the
    margins adds up to 1 over the layers; ``gain`` is what the margins' lower bounds would rise by, at most and on
    average, with this layer alone exact. ``distance_mean`` and ``distance_p95`` are l2 distances between the clean
    and the attacked activations. ``gradient`` is the mean l2 norm of the smallest margin's gradient in the layer's
    output, at the clean samples: what a small l2 change there can do to the margin.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    parameters: int
    lipschitz_upper: float | None
    lipschitz_lower: float | None
    width_ibp: float
    width_crown: float
    growth: float | None
    unstable: float | None
    gap: float | None
    share: float
    gain: float
    distance_mean: float
    distance_p95: float
    gradient: float
    moves_only: bool = False


@dataclass(frozen=True)
class Histogram(Record):
    """How often pre-activations fall between ``edges``, on clean and on attacked images: shares that sum to 1."""

    layer: str
    edges: tuple[float, ...]
    clean: tuple[float, ...]
    attacked: tuple[float, ...]


@dataclass(frozen=True)
class Shape(Record):
    """A layer's learned functions: ``values`` [functions][points] at ``places``; certified ranges over all channels.

    ``slope`` and ``curvature`` hold [min, max] of f' and f'' on the whole line (curvature is None with a base).
    """

    layer: str
    places: tuple[float, ...]
    values: tuple[tuple[float, ...], ...]
    slope: tuple[float, float]
    curvature: tuple[float, float] | None


@dataclass(frozen=True)
class Pixels(Record):
    """What each input element's own interval takes from the smallest bound: ``values`` of ``shape``, flat, >= 0."""

    shape: tuple[int, ...]
    values: tuple[float, ...]


@dataclass(frozen=True)
class Neuron(Record):
    """One neuron of a layer, or one channel of its maps; all numbers are means over samples (and places).

    ``low_in`` and ``high_in`` are the bounds of what goes in (None where the layer mixes its inputs), ``low_out`` and
    ``high_out`` of what comes out. ``unstable`` is how often a kink lies inside the bounds, ``gap`` the distance of
    the two lines around a smooth function; ``share`` is its part of the layer's looseness, ``weight`` the sum of
    |coefficients| with which the margins take it.
    """

    place: int
    low_in: float | None
    high_in: float | None
    low_out: float
    high_out: float
    unstable: float | None
    gap: float | None
    share: float
    weight: float


@dataclass(frozen=True)
class Neurons(Record):
    """The most costly ``rows`` of ``total`` neurons or channels (``unit``) of one layer; shares are of this layer.

    ``share`` is the layer's own part of the looseness of the margins' bounds.
    """

    layer: str
    kind: str
    unit: str
    total: int
    share: float
    rows: tuple[Neuron, ...]


@dataclass(frozen=True)
class Sensitivity(Record):
    """A row per layer at one radius, measured on ``count`` correctly classified samples.

    ``ranking`` names the layers that cost the bounds something, the worst first; ``sentences`` say of the first of
    them, one each, what they do and what would help, then what else is worth a word. ``neurons`` looks into every
    layer; ``histograms`` are those of pre-activations, ``shapes`` of learned functions (some of each layer's),
    ``pixels`` of the input.
    """

    radius: Fraction
    norm: str
    method: str
    arithmetic: str
    count: int
    rows: tuple[LayerRow, ...]
    sentences: tuple[str, ...]
    ranking: tuple[str, ...] = ()
    neurons: tuple[Neurons, ...] = ()
    histograms: tuple[Histogram, ...] = ()
    shapes: tuple[Shape, ...] = ()
    pixels: Pixels | None = None

    def _repr_html_(self) -> str:
        head = "layer", "kind", "width by CROWN", "share of the looseness", "gain if exact", "moved by the attack (l2)"
        rows = [(r.name, r.kind, r.width_crown, r.share, r.gain, r.distance_mean) for r in self.rows]
        caption = f"Layers at radius {self.radius} ({self.norm}), {self.method}, {self.count} samples"
        return table(caption, head, rows)
