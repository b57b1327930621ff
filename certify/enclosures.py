"""What a bound is: ``Interval``, ``Relaxation``, ``LinearBounds``. All frozen, all elementwise."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from certify.rounding import step_up

if TYPE_CHECKING:
    from certify.sets import PerturbationSet


@dataclass(frozen=True, eq=False)
class Interval:
    """lower <= y <= upper, elementwise. A NaN end carries no information."""

    lower: Float[Tensor, "*shape"]
    upper: Float[Tensor, "*shape"]

    def __and__(self, other: Interval) -> Interval:
        """Intersect: both enclosures hold, so the tighter end holds. A NaN end gives way to the other one."""
        return Interval(torch.fmax(self.lower, other.lower), torch.fmin(self.upper, other.upper))

    def __or__(self, other: Interval) -> Interval:
        """Hull: the smallest interval around both."""
        return Interval(torch.minimum(self.lower, other.lower), torch.maximum(self.upper, other.upper))

    def __getitem__(self, index: object) -> Interval:
        return Interval(self.lower[index], self.upper[index])  # type: ignore[index]  # any torch index

    @property
    def width(self) -> Float[Tensor, "*shape"]:
        """upper - lower."""
        return self.upper - self.lower

    @property
    def magnitude(self) -> Float[Tensor, "*shape"]:
        """max |y| over the interval."""
        return torch.maximum(self.lower.abs(), self.upper.abs())

    def widen(self, error: Float[Tensor, "*shape"]) -> Interval:
        """Return an interval that holds for y + delta, |delta| <= error; the two subtractions round outward."""
        return Interval(-step_up(error - self.lower), step_up(self.upper + error))

    def sanitized(self) -> Interval:
        """Replace ends that overflowed: NaN (inf - inf), a lower end of +inf and an upper one of -inf know nothing."""
        inf = torch.inf
        return Interval(
            self.lower.nan_to_num(nan=-inf, posinf=-inf, neginf=-inf),
            self.upper.nan_to_num(nan=inf, posinf=inf, neginf=inf),
        )

    def double(self) -> Interval:
        """The same interval in float64, exactly."""
        return Interval(self.lower.double(), self.upper.double())


@dataclass(frozen=True, eq=False)
class Relaxation:
    """lower_slope z + lower_offset <= f(z) <= upper_slope z + upper_offset on the interval it was made for.

    Slopes have the shape of the offsets; those of max-pooling one dimension more, over the taps of a window.
    """

    lower_slope: Float[Tensor, "*slopes"]
    lower_offset: Float[Tensor, "*shape"]
    upper_slope: Float[Tensor, "*slopes"]
    upper_offset: Float[Tensor, "*shape"]

    def gap(self, z: Interval) -> Float[Tensor, "*shape"]:
        """Return the mean distance of the two lines over ``z``: the area between them divided by the width."""
        middle = z.lower + (z.upper - z.lower) / 2
        return (self.upper_slope - self.lower_slope) * middle + (self.upper_offset - self.lower_offset)


@dataclass(frozen=True, eq=False)
class LinearBounds:
    """lA x + lb <= row(x) <= uA x + ub for every x of ``domain``; one coefficient tensor per row and image."""

    lA: Float[Tensor, "batch rows *shape"]
    lb: Float[Tensor, "batch rows"]
    uA: Float[Tensor, "batch rows *shape"]
    ub: Float[Tensor, "batch rows"]
    domain: PerturbationSet

    def concretize(self) -> Interval:
        """Return the best constants: min of the lower and max of the upper function over the domain."""
        batch, rows = self.lb.shape
        index = torch.arange(batch, device=self.lb.device).repeat_interleave(rows)
        domain = self.domain.take(index)
        lower = self.lb.double() - domain.support(-self.lA.flatten(0, 1)).view(batch, rows)
        upper = self.ub.double() + domain.support(self.uA.flatten(0, 1)).view(batch, rows)
        return Interval(lower, upper)
