"""What was measured: rates with intervals, evaluations per radius and sample. Frozen, plain data on request."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from fractions import Fraction
from html import escape
from typing import Any, ClassVar, Literal

from analysis.layer_records import Sensitivity
from analysis.plain import Record
from certify.errors import InvalidInput
from certify.notebook import table


@dataclass(frozen=True)
class Rate(Record):
    """``count`` of ``total``; the true rate lies in [low, high] with 95 % confidence.

    Reference: Clopper, Pearson (1934): exact for binomial counts, so the coverage is never below 95 %.
    """

    count: int
    total: int
    derived: ClassVar[tuple[str, ...]] = ("value", "low", "high")

    def __post_init__(self) -> None:
        if not 0 <= self.count <= self.total or self.total == 0:
            raise InvalidInput(f"{self.count} of {self.total}", "0 <= count <= total", "at least one sample")

    def __str__(self) -> str:
        """96.4 (94-98): percent with its 95 % interval, rounded outward."""
        return f"{100 * self.value:.1f} ({math.floor(100 * self.low)}-{math.ceil(100 * self.high)})"

    @property
    def value(self) -> float:
        """The share, count / total."""
        return self.count / self.total

    @property
    def low(self) -> float:
        """The lower end of the 95 % interval."""
        from scipy.stats import beta

        return float(beta.ppf(0.025, self.count, self.total - self.count + 1)) if self.count else 0.0

    @property
    def high(self) -> float:
        """The upper end of the 95 % interval."""
        from scipy.stats import beta

        return float(beta.ppf(0.975, self.count + 1, self.total - self.count)) if self.count < self.total else 1.0


#: What is known about a sample at a radius.
Word = Literal["holds", "violated", "unknown", "timeout"]


@dataclass(frozen=True)
class Outcome(Record):
    """What is known about one sample at one radius.

    ``attacked``: some point of the set is misclassified (the image itself counts).
    ``worst`` is the smallest margin that was met, ``lower`` the certified lower bound of the smallest margin by
    method, None where there is none: the image is misclassified or fell to the attack, or nothing is known.
    ``late`` are the methods, or "attack", that gave no answer within the sample's time.
    """

    radius: Fraction
    attacked: bool
    worst: float
    lower: dict[str, float | None] = field(default_factory=dict)
    late: tuple[str, ...] = ()
    derived: ClassVar[tuple[str, ...]] = ("verdict",)

    def certified(self, method: str) -> bool:
        """Return whether ``method`` proved the sample robust."""
        lower = self.lower.get(method)
        return lower is not None and lower > 0 and not self.attacked

    @property
    def verdict(self) -> Word:
        """Holds (by some method), violated, unknown or timeout; the last two count as not certified.

        A deadline gives timeout, never a better word than its absence would.
        """
        if self.attacked:
            return "violated"
        if any(self.certified(method) for method in self.lower):
            return "holds"
        return "timeout" if self.late else "unknown"


@dataclass(frozen=True)
class SampleRecord(Record):
    """One sample: its place in the data set, true label and prediction, and an outcome per radius.

    ``margin`` is the true label's logit minus the largest other one; it must be positive to be ``correct``.
    """

    index: int
    label: int
    predicted: int
    margin: float
    outcomes: tuple[Outcome, ...]
    derived: ClassVar[tuple[str, ...]] = ("correct",)

    @property
    def correct(self) -> bool:
        """Whether the unchanged sample is classified right."""
        return self.margin > 0


@dataclass(frozen=True)
class RadiusRow(Record):
    """Robust accuracy at one radius, over ALL samples: misclassified ones count as not robust.

    The true robust accuracy on the samples lies between ``certified`` of any method and ``attacked``.
    """

    radius: Fraction
    attacked: Rate
    certified: dict[str, Rate]


@dataclass(frozen=True)
class Conditions(Record):
    """Under which perturbations, attack, methods and arithmetic a network was examined."""

    radii: tuple[Fraction, ...]
    norm: str
    clip: tuple[float, float] | None
    methods: tuple[str, ...]
    attack: str
    arithmetic: str
    seed: int


@dataclass(frozen=True)
class Evaluation(Record):
    """certified <= attacked <= clean per radius, on the same samples, with all that is needed to repeat it."""

    clean: Rate
    rows: tuple[RadiusRow, ...]
    norm: str
    clip: tuple[float, float] | None
    methods: tuple[str, ...]
    attack: str
    arithmetic: str
    seed: int
    samples: tuple[SampleRecord, ...]

    @property
    def count(self) -> int:
        """The number of samples."""
        return self.clean.total

    def _repr_html_(self) -> str:
        head = "radius", "clean", "after attack", *(f"certified ({method})" for method in self.methods)
        rows = [
            (row.radius, self.clean, row.attacked, *(row.certified[method] for method in self.methods))
            for row in self.rows
        ]
        return table(f"Accuracy in percent (95 % interval) on {self.count} samples, {self.norm}", head, rows)


@dataclass(frozen=True)
class PairedRow(Record):
    """Two networks on the same samples: how many only one of them gets right, and how likely that is by chance.

    ``p_value`` is McNemar's exact test: small values say that the difference is no accident of the sample.
    """

    quantity: str
    radius: Fraction | None
    first_only: int
    second_only: int
    p_value: float


@dataclass(frozen=True)
class OutputBounds(Record):
    """The outputs of one sample at one radius: value at the sample, lower and upper bounds over the set.

    ``margin`` is the certified lower bound of the smallest class margin, None for a misclassified sample.
    """

    index: int
    label: int
    predicted: int
    radius: Fraction
    method: str
    verdict: str
    margin: float | None
    value: tuple[float, ...]
    lower: tuple[float, ...]
    upper: tuple[float, ...]


@dataclass(frozen=True)
class NetworkReport(Record):
    """All that was measured of one network; ``layers`` is None where no sample was right, or none was asked for."""

    name: str
    source: str
    network: str
    parameters: int
    normalisation: str
    evaluation: Evaluation
    layers: Sensitivity | None = None


@dataclass(frozen=True)
class Course(Record):
    """How a run went: ``machine`` in words and ``seconds`` by network and task. Never part of what was found."""

    machine: str
    seconds: dict[str, dict[str, float]]


@dataclass(frozen=True)
class Report(Record):
    """All that a page, a table or a file of results shows; nothing else is consulted to render it.

    ``arguments`` are the command's settings as given, ``samples`` a sentence about the samples, ``versions`` those of
    the packages, ``warnings`` what lowers trust in the numbers. ``course`` is None where nobody kept it.
    """

    command: str
    arguments: dict[str, Any]
    samples: str
    seed: int
    versions: dict[str, str]
    networks: tuple[NetworkReport, ...]
    warnings: tuple[str, ...] = ()
    course: Course | None = None

    def _repr_html_(self) -> str:
        parts = (f"<h4>{escape(network.name)}</h4>{network.evaluation._repr_html_()}" for network in self.networks)
        return f"<p>{escape(self.samples)}</p>{''.join(parts)}"
