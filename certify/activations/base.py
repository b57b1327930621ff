"""What the engine knows of an activation: ``Activation``, and the line through a set of vertices.

An activation is a batch of univariate functions, one per element of [batch, *shape] (a KAF has its own per neuron).
The engine asks for its range, its slope range, its float error and two lines; it never asks which function it is.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from certify.activations.fan import Fan, spread
from certify.enclosures import Interval, Relaxation
from certify.rounding import round_down, round_up

if TYPE_CHECKING:
    from certify.graph import Call

#: alpha of ``relax``: (lower, upper) in [0, 1]; slope = m + alpha (M - m) with the slope range [m, M].
Alpha = tuple[Tensor, Tensor]


class Activation(ABC):
    """Facts about y = f(z), elementwise; all tensors are [batch, *shape] unless said otherwise.

    Authors write ``forward``, ``range``, ``slope_range``, ``rounding_error``, ``lines``, ``examples`` and
    ``from_call``; ``Smooth`` and ``PiecewiseLinear`` derive most of them from less.
    """

    #: Whether the relaxation is exact on intervals that hold no kink (see ``undecided``).
    piecewise: bool = False

    #: Lines per side of a ``fan``.
    fan_size: int = 9

    @classmethod
    @abstractmethod
    def from_call(cls, call: Call) -> Activation:
        """Make the facts of one place in a traced model (see ``certify.graph.Call``)."""

    @classmethod
    @abstractmethod
    def examples(cls) -> list[tuple[Activation, int]]:
        """Return instances for the shipped checks, each with the channel count that it expects (1 = any)."""

    @abstractmethod
    def forward(self, x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Return f(x) in the dtype of x; shape [..., channels, *spatial] as the network has it."""

    @abstractmethod
    def range(self, z: Interval) -> Interval:
        """Return an interval that holds f(s) for every real s in z, in the dtype of z."""

    @abstractmethod
    def slope_range(self, z: Interval) -> Interval:
        """Return [m, M] with m (s - t) <= f(s) - f(t) <= M (s - t) for t <= s in z; ends may be infinite."""

    @abstractmethod
    def rounding_error(self, z: Interval) -> Float[Tensor, "*shape"]:
        """Return a bound of |float f(s) - f(s)| over z, for the network's arithmetic in the dtype of z."""

    @abstractmethod
    def lines(self, z: Interval, slopes: tuple[Tensor, Tensor] | None) -> Relaxation:
        """Return sound lines over z: with the given (lower, upper) slopes, or with slopes of the activation's choice.

        The choice is of smallest area, or nearly so with less distance at the ends (see ``Smooth.lines``).
        """

    def undecided(self, z: Interval) -> Tensor:
        """Return where a tighter z could give a tighter relaxation (piecewise: a kink strictly inside)."""
        return z.lower < z.upper

    def relax(self, z: Interval, alpha: Alpha | None = None) -> Relaxation:
        """Return lower_slope s + lower_offset <= f(s) <= upper_slope s + upper_offset for every real s in z.

        Sound for EVERY alpha = (lower, upper), each in [0, 1] and broadcastable against z with optional leading
        dimensions; None gives one good pair of lines, usually that with the smallest area between them.
        """
        if alpha is None:
            return self.lines(z, None)
        m = self.slope_range(z)
        lower, upper = (m.lower + a * (m.upper - m.lower) for a in alpha)
        return self.lines(z, (lower, upper))

    def fan(self, z: Interval) -> Fan:
        """Return a family of sound lines over z, among them those of ``relax(z)``: see ``Fan``."""
        return spread(z, self.slope_range(z), self.lines, self.fan_size)

    def second_lines(self, z: Interval) -> Relaxation | None:
        """Return another good pair of lines, if there is one that is cheap: a row may be bounded better by it."""
        return None

    def describe(self) -> dict[str, Any]:
        """Return extra facts for reports (none by default)."""
        return {}


def middle_edge(s: Float[Tensor, "k *n"], v: Float[Tensor, "k *n"]) -> tuple[Tensor, Tensor]:
    """Return the slope of the line above all vertices (s, v) that is lowest at the middle of their span, and how low.

    Of all lines above a function on [l, u] the one with the smallest area below it is the lowest at (l + u) / 2:
    the edge of the concave hull there. Found by cutting planes: replace the left or right support by the vertex
    farthest above the line, until none is; a stop at the limit is still a slope, for which offsets are sound.
    ``s[0]`` and ``s[-1]`` must be the ends of the span; the other vertices may stand in any order.
    """
    middle = (s[0] + s[-1]) / 2
    left_s, left_v, right_s, right_v = s[0], v[0], s[-1], v[-1]
    slope = slope_between(left_s, left_v, right_s, right_v)
    for _ in range(min(len(s) - 1, 12)):
        top, index = torch.addcmul(v, s, slope, value=-1).max(0)
        line = torch.maximum(left_v - slope * left_s, right_v - slope * right_s)
        above = top > line + 1e-15 * (line.abs() + top.abs())
        if not bool(above.any()):
            break
        new_s, new_v = s.gather(0, index[None])[0], v.gather(0, index[None])[0]
        left = above & (new_s <= middle)
        right = above & (new_s > middle)
        left_s, left_v = torch.where(left, new_s, left_s), torch.where(left, new_v, left_v)
        right_s, right_v = torch.where(right, new_s, right_s), torch.where(right, new_v, right_v)
        slope = slope_between(left_s, left_v, right_s, right_v)
    return slope, left_v + slope * (middle - left_s)


def slope_between(s0: Tensor, v0: Tensor, s1: Tensor, v1: Tensor) -> Tensor:
    """Return the slope of the line through two points; 0 where they are one."""
    run = s1 - s0
    slope = (v1 - v0) / torch.where(run > 0, run, 1)
    return torch.where((run > 0) & torch.isfinite(slope), slope, 0)


def outward(dtype: torch.dtype, lower: tuple[Tensor, Tensor], upper: tuple[Tensor, Tensor]) -> Relaxation:
    """Make a ``Relaxation`` in ``dtype`` from float64 (slope, offset) pairs; slopes are exact in ``dtype`` already."""
    return Relaxation(lower[0].to(dtype), round_down(lower[1], dtype), upper[0].to(dtype), round_up(upper[1], dtype))
