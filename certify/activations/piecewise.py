"""Piecewise linear activations: ReLU, LeakyReLU, PReLU, Hardtanh, ReLU6, clamp, abs. Lines through exact vertices."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from certify.activations.base import Activation, middle_edge, outward, slope_between
from certify.enclosures import Interval, Relaxation
from certify.errors import UnsupportedOperation
from certify.graph import Call
from certify.registry import register_activation
from certify.rounding import round_down, round_up, unit_roundoff


class PiecewiseLinear(Activation):
    """f continuous with slopes[0] before kinks[0], slopes[i] after kinks[i-1]; f(kinks[0]) = ``value``.

    ``kinks`` are increasing floats. ``slopes`` are floats or tensors that broadcast from the right against
    [batch, *shape] (a PReLU's weight as [channels, 1, 1]).
    """

    piecewise = True

    def __init__(self, kinks: tuple[float, ...], slopes: tuple[float | Tensor, ...], value: float = 0.0) -> None:
        self.kinks, self.slopes, self.value = kinks, slopes, value
        if len(kinks) == 1:  # convex or concave: the chord on one side, both pieces on the other
            self.fan_size = 2

    @classmethod
    def from_call(cls, call: Call) -> PiecewiseLinear:
        raise NotImplementedError  # the registered families below know their own parameters

    @classmethod
    def examples(cls) -> list[tuple[Activation, int]]:
        return [
            (PiecewiseLinear((0.0,), (0.0, 1.0)), 1),
            (PiecewiseLinear((0.0,), (0.01, 1.0)), 1),
            (PiecewiseLinear((0.0,), (-1.0, 1.0)), 1),
            (PiecewiseLinear((0.0,), (torch.tensor([0.3, -0.2, 1.5, 0.0]).view(4, 1), 1.0)), 4),
            (PiecewiseLinear((-1.0, 1.0), (0.0, 1.0, 0.0), -1.0), 1),
            (PiecewiseLinear((0.0, 6.0), (0.0, 1.0, 0.0)), 1),
        ]

    def forward(self, x: Tensor) -> Tensor:
        if len(self.kinks) == 1 and self.kinks[0] == 0 and self.value == 0:
            return torch.where(x > 0, x * self.slopes[1], x * self.slopes[0])
        low, high = self.kinks[0], self.kinks[-1]
        return x.clamp(low, high) + (self.value - low)

    def range(self, z: Interval) -> Interval:
        dtype = z.lower.dtype
        if all(isinstance(slope, float) and slope >= 0 for slope in self.slopes):  # f does not fall: the ends decide
            ends = z if self._exact_values else z.double()
            low, up = self._values(ends.lower), self._values(ends.upper)
            return Interval(round_down(low, dtype), round_up(up, dtype)).sanitized()
        _, values = self._vertices(z)
        return Interval(round_down(values.amin(0), dtype), round_up(values.amax(0), dtype)).sanitized()

    def slope_range(self, z: Interval) -> Interval:
        edges = (-torch.inf, *self.kinks, torch.inf)
        low, high = torch.full_like(z.lower, torch.inf), torch.full_like(z.lower, -torch.inf)
        for i, slope in enumerate(self.slopes):
            # A piece counts where z overlaps it; a z that is one point takes every piece it touches.
            met = (z.upper > edges[i]) & (z.lower < edges[i + 1]) | (z.lower == z.upper) & (
                (z.upper >= edges[i]) & (z.lower <= edges[i + 1])
            )
            value = torch.as_tensor(slope, dtype=torch.float64, device=z.lower.device)
            low = torch.where(met, torch.minimum(low, round_down(value, z.lower.dtype)), low)
            high = torch.where(met, torch.maximum(high, round_up(value, z.lower.dtype)), high)
        return Interval(low, high)

    def rounding_error(self, z: Interval) -> Tensor:
        if self._exact_values:
            return torch.zeros_like(z.lower)
        steepest = self.slope_range(Interval(torch.minimum(z.lower, z.lower * 0), z.upper)).magnitude
        size = z.magnitude * steepest + self._size
        return 4 * unit_roundoff(z.lower.dtype) * size + torch.finfo(z.lower.dtype).tiny

    def undecided(self, z: Interval) -> Tensor:
        mask = torch.zeros_like(z.lower, dtype=torch.bool)
        for kink in self.kinks:
            mask |= (z.lower < kink) & (z.upper > kink)
        return mask

    def lines(self, z: Interval, slopes: tuple[Tensor, Tensor] | None) -> Relaxation:
        dtype = z.lower.dtype
        if slopes is None:
            s, v = self._vertices(z)
            straight = self.slope_range(z)
            lower, upper = (_exact(slope, straight, dtype) for slope in self._edges(s, v))
        else:
            shape = torch.broadcast_shapes(z.lower.shape, *(slope.shape for slope in slopes))
            z = Interval(z.lower.expand(shape), z.upper.expand(shape))
            s, v = self._vertices(z)
            lower, upper = (slope.to(dtype).double().expand(shape) for slope in slopes)
        noise = 2.0**-50 * (v.abs().amax(0) + torch.maximum(lower.abs(), upper.abs()) * s.abs().amax(0))
        low_noise, up_noise = (noise if not self._exact_values else torch.where(_simple(a), 0, noise)
                               for a in (lower, upper))  # fmt: skip
        low, up = (v - lower * s).amin(0) - low_noise, (v - upper * s).amax(0) + up_noise  # NaN where z is infinite
        return outward(dtype, (lower, low.nan_to_num(nan=-torch.inf)), (upper, up.nan_to_num(nan=torch.inf)))

    @property
    def _exact_values(self) -> bool:
        """Whether f and its vertices are computed without rounding: slopes -1, 0 or 1 around a kink (0, 0)."""
        plain = all(isinstance(slope, float) and slope in (-1.0, 0.0, 1.0) for slope in self.slopes)
        return plain and self._size == 0

    @property
    def _size(self) -> float:
        """The largest constant of the formula."""
        return max(abs(self.value), *(abs(kink) for kink in self.kinks), 0.0)

    def _edges(self, s: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """The slopes of the edges at the middle of the lower and the upper hull of the vertices."""
        if len(self.kinks) > 1:
            return -middle_edge(s, -v)[0], middle_edge(s, v)[0]
        chord = slope_between(s[0], v[0], s[-1], v[-1])
        left, right = (torch.as_tensor(slope, dtype=torch.float64, device=s.device) for slope in self.slopes)
        piece = torch.where(s[0] + s[-1] >= 2 * self.kinks[0], right, left)
        convex = right >= left
        return torch.where(convex, piece, chord), torch.where(convex, chord, piece)

    def _vertices(self, z: Interval) -> tuple[Tensor, Tensor]:
        """The ends and the kinks inside [k, batch, *shape] with their values; float64, exact up to one rounding."""
        low, high = z.lower.double(), z.upper.double()
        middle = [torch.minimum(high, low.clamp(min=kink)) for kink in self.kinks]
        s = torch.stack([low, *middle, high])
        return s, self._values(s)

    def _values(self, s: Tensor) -> Tensor:
        """f(s) in float64."""
        v = torch.zeros_like(s)
        for piece, slope in enumerate(self.slopes):
            begin = self.kinks[piece - 1] if piece else self.kinks[0]
            run = s - begin
            run = run.clamp(max=0) if piece == 0 else run.clamp(min=0)
            if 0 < piece < len(self.kinks):
                run = run.clamp(max=self.kinks[piece] - begin)
            factor = torch.as_tensor(slope, dtype=torch.float64, device=s.device)
            v = v + torch.where((factor == 0) & run.isinf(), 0, factor * run)
        return self.value + v


def _simple(slope: Tensor) -> Tensor:
    """Where slope * s is exact, and so is the difference of two pieces."""
    return (slope == 0) | (slope.abs() == 1)


def _exact(slope: Tensor, straight: Interval, dtype: torch.dtype) -> Tensor:
    """Round a slope to ``dtype`` and into the slope range: a stable neuron gets its own slope, exactly."""
    rounded = slope.to(dtype)
    return torch.minimum(torch.maximum(rounded, straight.lower), straight.upper).double()


@register_activation(nn.ReLU, F.relu, torch.relu, F.relu_, "relu", "relu_")
class ReLU(PiecewiseLinear):
    """max(x, 0)."""

    @classmethod
    def from_call(cls, call: Call) -> ReLU:
        return cls((0.0,), (0.0, 1.0))

    def forward(self, x: Tensor) -> Tensor:
        return x.clamp(min=0)

    def _values(self, s: Tensor) -> Tensor:
        """Exact."""
        return s.clamp(min=0)


@register_activation(torch.abs, "abs")
class Abs(PiecewiseLinear):
    """|x|."""

    @classmethod
    def from_call(cls, call: Call) -> Abs:
        return cls((0.0,), (-1.0, 1.0))


@register_activation(nn.LeakyReLU, F.leaky_relu)
class LeakyReLU(PiecewiseLinear):
    """max(x, 0) + slope min(x, 0)."""

    @classmethod
    def from_call(cls, call: Call) -> LeakyReLU:
        return cls((0.0,), (float(call.option("negative_slope", 1, 0.01)), 1.0))


@register_activation(nn.PReLU, F.prelu)
class PReLU(PiecewiseLinear):
    """max(x, 0) + w min(x, 0), w per channel (dimension 1) or shared."""

    @classmethod
    def from_call(cls, call: Call) -> PReLU:
        weight = call.constant("weight", 1)
        assert weight is not None
        tail = [1] * (len(call.input_shape) - 1)
        return cls((0.0,), (weight.view(-1, *tail) if tail or weight.numel() > 1 else weight, 1.0))


@register_activation(nn.Hardtanh, F.hardtanh, nn.ReLU6, F.relu6, torch.clamp, "clamp")
class Clamp(PiecewiseLinear):
    """min(max(x, low), high); an absent end is no limit."""

    @classmethod
    def from_call(cls, call: Call) -> Clamp:
        if call.target in (nn.ReLU6, F.relu6):
            low, high = 0.0, 6.0
        elif call.target in (torch.clamp, "clamp"):
            low, high = call.option("min", 1, None), call.option("max", 2, None)
        else:
            low, high = call.option("min_val", 1, -1.0), call.option("max_val", 2, 1.0)
        if any(isinstance(end, Tensor) for end in (low, high)):
            raise UnsupportedOperation(f"clamp with tensor limits at {call.name!r}", "numbers as limits")
        if low is not None and high is not None and low > high:
            raise UnsupportedOperation(f"clamp to [{low}, {high}] at {call.name!r}", "min <= max")
        if high is None:
            return cls((float(low),), (0.0, 1.0), float(low))
        if low is None:
            return cls((float(high),), (1.0, 0.0), float(high))
        return cls((float(low), float(high)), (0.0, 1.0, 0.0), float(low))

    def forward(self, x: Tensor) -> Tensor:
        if len(self.kinks) == 2:
            return x.clamp(*self.kinks)
        return x.clamp(min=self.kinks[0]) if self.slopes[0] == 0.0 else x.clamp(max=self.kinks[0])

    def _values(self, s: Tensor) -> Tensor:
        """A clamp picks: its values are exact."""
        return self.forward(s)

    def rounding_error(self, z: Interval) -> Tensor:
        """Only the limits round: a clamp at 0.1 returns the float nearest to 0.1."""
        error = unit_roundoff(z.lower.dtype) * max(abs(kink) for kink in self.kinks)
        return torch.full_like(z.lower, error)


@register_activation(nn.Hardsigmoid, F.hardsigmoid)
class Hardsigmoid(PiecewiseLinear):
    """min(max(x + 3, 0), 6) / 6."""

    @classmethod
    def from_call(cls, call: Call) -> Hardsigmoid:
        return cls((-3.0, 3.0), (0.0, 1 / 6, 0.0))

    @classmethod
    def examples(cls) -> list[tuple[Activation, int]]:
        return [(cls((-3.0, 3.0), (0.0, 1 / 6, 0.0)), 1)]

    def forward(self, x: Tensor) -> Tensor:
        return F.hardsigmoid(x)
