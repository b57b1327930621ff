"""Gates: shares of images that a network must reach, for a machine that decides whether a change goes in."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar, Literal, get_args

from analysis.plain import Record
from analysis.records import Evaluation, Rate
from certify.errors import InvalidInput

#: What can be asked for: right unchanged, right after the attack, proved right.
Quantity = Literal["clean", "attacked", "certified"]
QUANTITIES: tuple[Quantity, ...] = get_args(Quantity)


@dataclass(frozen=True)
class Gate(Record):
    """At least the share ``wanted`` of ALL images, in [0, 1], must be ``quantity``."""

    quantity: Quantity
    wanted: Fraction

    def __post_init__(self) -> None:
        if not 0 <= self.wanted <= 1:  # NaN, too
            raise InvalidInput(f"a threshold of {self.wanted}", "a share from 0 to 1", "Fraction(3, 5)")


@dataclass(frozen=True)
class GateResult(Record):
    """What one network was measured to reach at one radius, None for ``clean``, which has none."""

    network: str
    radius: Fraction | None
    quantity: Quantity
    wanted: Fraction
    measured: Rate
    derived: ClassVar[tuple[str, ...]] = ("passed",)

    @property
    def passed(self) -> bool:
        """Whether count / total >= wanted: exact numbers, and equality is enough."""
        return Fraction(self.measured.count, self.measured.total) >= self.wanted


def judge(network: str, found: Evaluation, gates: Sequence[Gate]) -> tuple[GateResult, ...]:
    """Return a result per gate and radius, the gates in the order given; one of ``clean`` accuracy stands first, once.

    A misclassified image is neither robust nor certified; it is certified if any method proved it so. Raises
    ``InvalidInput`` where certificates are wanted and nothing was bounded.
    """
    if not found.methods and any(gate.quantity == "certified" for gate in gates):
        raise InvalidInput("a gate of certified accuracy without a method", "a bound method", "--methods crown")
    return tuple(_results(network, found, gates))


def _results(network: str, found: Evaluation, gates: Sequence[Gate]) -> Iterator[GateResult]:
    for gate in gates:
        if gate.quantity == "clean":
            yield GateResult(network, None, gate.quantity, gate.wanted, found.clean)
    for place, row in enumerate(found.rows):
        for gate in gates:
            if gate.quantity != "clean":
                measured = row.attacked if gate.quantity == "attacked" else _certified(found, place)
                yield GateResult(network, row.radius, gate.quantity, gate.wanted, measured)


def _certified(found: Evaluation, place: int) -> Rate:
    """The rate of images that some method proved."""
    return Rate(sum(sample.outcomes[place].verdict == "holds" for sample in found.samples), found.count)
