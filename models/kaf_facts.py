"""What the bound engine knows of a KAF: the facts behind its certified lines.

With v = u sqrt(2 gamma), the n-th derivative of the kernel is (-sqrt(2 gamma))^n He_n(v) exp(-v^2 / 2), He_n the
probabilists' Hermite polynomial; |He_n(v)| exp(-v^2 / 2) has its extremes at the roots of He_{n+1} and falls beyond
the last one. Global bounds such as sqrt(2 gamma / e) sum|alpha| are sound and useless after ridge initialisation
(sum|alpha| is about 700): bounds of the third derivative are taken per channel, from a fine grid with its own sag.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from functools import cache

import numpy as np
import torch
from jaxtyping import Float64, Int
from torch import Tensor

from certify import Activation, Curve, Interval, Smooth, register_activation
from certify.activations.enclose import certified_lines
from certify.activations.piecewise import PiecewiseLinear
from certify.activations.smooth import Formula
from certify.errors import UnsupportedOperation
from certify.graph import Call, build_rule
from certify.ops.base import Elementwise
from certify.rounding import gamma as gamma_n
from certify.rounding import round_down, round_up, step_down, step_up, unit_roundoff
from models.kaf import KAF

GRID = 4096  # points of the grid behind the global bound of a derivative
STEEPEST = 1e3  # largest gamma: the error of f'' is counted as 1e4 that of f, and is 2 gamma times it
FAR = 40.0  # beyond this many units of 1 / sqrt(2 gamma), the kernel is below 1e-340


@cache
def _hermite_facts(n: int) -> tuple[float, float]:
    """Return sup |He_n(v)| exp(-v^2/2), rounded up, and the v beyond which it falls."""
    roots = np.polynomial.hermite_e.hermeroots([0.0] * (n + 1) + [1.0])
    heights = np.abs(np.polynomial.hermite_e.hermeval(roots, [0.0] * n + [1.0])) * np.exp(-(roots**2) / 2)
    return float(heights.max()) * (1 + 1e-9), float(roots.max()) + 1e-6


def _hermite(n: int, v: Tensor) -> Tensor:
    """He_n(v) by its recurrence."""
    previous, value = torch.ones_like(v), v
    if n == 0:
        return previous
    for k in range(1, n):
        previous, value = value, v * value - k * previous
    return value


@dataclass(frozen=True)
class GaussianCurve(Curve):
    """The ``order``-th derivative of sum_i alpha_i exp(-gamma (s - d_i)^2), one alpha per channel.

    ``channel`` [n] says which row of ``alpha`` each element has; everything is float64.
    """

    alpha: Float64[Tensor, "channels size"]
    dictionary: Float64[Tensor, "size"]
    gamma: float
    channel: Int[Tensor, "n"]
    order: int = 0
    ceiling: Tensor = field(default_factory=lambda: torch.empty(0))  # sup |f^(order+3)| per channel

    @classmethod
    def of(cls, kaf: KAF, channel: Tensor, order: int = 0) -> GaussianCurve:
        """Make the curve of a module for the channels of n elements."""
        alpha, dictionary, gamma = kaf.gaussian()
        plain = cls(alpha.double(), dictionary.double(), float(gamma), channel, order)
        return cls(plain.alpha, plain.dictionary, plain.gamma, channel, order, plain.supremum(order + 3))

    @property
    def unit(self) -> float:
        """sqrt(2 gamma): v = unit * (s - d)."""
        return math.sqrt(2 * self.gamma)

    @property
    def mass(self) -> Float64[Tensor, "channels"]:
        """sum |alpha| per channel."""
        return self.alpha.abs().sum(1)

    def derivative(self, n: int, s: Tensor, channel: Tensor) -> Tensor:
        """Return f^(n)(s), s [k, m] with the channels [m] of its columns."""
        total = torch.zeros_like(s)
        for i in range(len(self.dictionary)):
            v = (s - self.dictionary[i]) * self.unit
            total += self.alpha[channel, i] * _hermite(n, v) * torch.exp(-v.square() / 2)
        return total * (-self.unit) ** n

    def values(self, s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """f^(order), f^(order+2) with the exponentials computed once, and the evaluation error."""
        low, high = torch.zeros_like(s), torch.zeros_like(s)
        n = self.order
        for i in range(len(self.dictionary)):
            v = (s - self.dictionary[i]) * self.unit
            weight = torch.exp(v.square() * -0.5).mul_(self.alpha[self.channel, i])
            if n == 0:
                low += weight
                high.addcmul_(weight, v.square().sub_(1))
            else:
                low.addcmul_(weight, _hermite(n, v))
                high.addcmul_(weight, _hermite(n + 2, v))
        low, high = low * (-self.unit) ** n, high * (-self.unit) ** (n + 2)
        terms = gamma_n(4 * len(self.dictionary) + 10 + 10 * n, torch.float64)
        return low, high, terms * self._bound(n, self._distance(s, s))

    def third(self, lower: Tensor, upper: Tensor) -> Tensor:
        """The channel's ceiling near the dictionary; sum|alpha| times the kernel's own bound far outside it."""
        near = self.ceiling[self.channel].expand_as(lower)
        return torch.minimum(near, self._bound(self.order + 3, self._distance(lower, upper)))

    def take(self, index: Tensor) -> GaussianCurve:
        """The curves of some elements."""
        return GaussianCurve(self.alpha, self.dictionary, self.gamma, self.channel[index], self.order, self.ceiling)

    def supremum(self, n: int) -> Float64[Tensor, "channels"]:
        """Return a bound of sup |f^(n)| over the line, per channel: a grid, the sag between its points, the tails."""
        reach = 6.0 / self.unit
        low, high = float(self.dictionary.min()) - reach, float(self.dictionary.max()) + reach
        s = torch.linspace(low, high, GRID, dtype=torch.float64, device=self.alpha.device)[:, None]
        channels = torch.arange(len(self.alpha), device=self.alpha.device)
        on_grid = self.derivative(n, s.expand(-1, len(channels)), channels).abs().amax(0)
        half = (high - low) / (GRID - 1) / 2 * (1 + 1e-9)
        sag = half * self.mass * self.unit ** (n + 1) * _hermite_facts(n + 1)[0]
        tail = self.mass * self._kernel(n, torch.tensor(reach, dtype=torch.float64))
        return torch.maximum(on_grid + sag, tail) * (1 + 1e-9)

    def _distance(self, lower: Tensor, upper: Tensor) -> Tensor:
        """Distance of a cell to the span of the dictionary."""
        return torch.maximum(lower - self.dictionary.max(), self.dictionary.min() - upper).clamp(min=0)

    def _kernel(self, n: int, distance: Tensor) -> Tensor:
        """sup of |k^(n)| at least ``distance`` away from its centre."""
        height, falls = _hermite_facts(n)
        v = distance * self.unit
        beyond = _hermite(n, v).abs() * torch.exp(-v.square() / 2)
        return torch.where(v > falls, beyond, height) * (self.unit**n * (1 + 1e-9))

    def _bound(self, n: int, distance: Tensor) -> Tensor:
        return self.mass[self.channel] * self._kernel(n, distance) + 1e-300


@dataclass(frozen=True)
class SumCurve(Curve):
    """f + g of two curves, with the kinks of both."""

    first: Curve
    second: Curve

    @property
    def breakpoints(self) -> tuple[float, ...]:  # type: ignore[override]
        """The kinks of both."""
        return (*self.first.breakpoints, *self.second.breakpoints)

    def values(self, s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        parts = zip(self.first.values(s), self.second.values(s), strict=True)
        f, second, error = (a + b for a, b in parts)
        return f, second, error + 2.0**-52 * f.abs()

    def third(self, lower: Tensor, upper: Tensor) -> Tensor:
        return self.first.third(lower, upper) + self.second.third(lower, upper)

    def take(self, index: Tensor) -> SumCurve:
        return SumCurve(self.first.take(index), self.second.take(index))


@register_activation(KAF)
class KAFFacts(Smooth):
    """f(s) = sum_i alpha_i exp(-gamma (s - d_i)^2) (+ base(s)), per channel: dimension 1 of the input."""

    def __init__(self, kaf: KAF, base: Activation | None, sample_dims: int) -> None:
        self.kaf, self.base, self.sample_dims = kaf, base, sample_dims
        self._curve = GaussianCurve.of(kaf, torch.zeros(0, dtype=torch.long))
        self._slope = GaussianCurve.of(kaf, torch.zeros(0, dtype=torch.long), order=1)

    @classmethod
    def from_call(cls, call: Call) -> KAFFacts:
        """Read the module; a base must itself be a registered activation."""
        kaf, base = call.module, None
        assert isinstance(kaf, KAF)
        if float(kaf.gaussian()[2]) > STEEPEST:
            raise UnsupportedOperation(
                f"a KAF with gamma above {STEEPEST:g} at {call.name!r}",
                "kernels that float64 can bound",
                "a smaller gamma",
            )
        if kaf.base is not None:
            rule = build_rule(replace(call, name=f"{call.name}.base", target=type(kaf.base), module=kaf.base))
            base = rule.facts if isinstance(rule, Elementwise) else None
            if base is None or not _same_everywhere(base):
                raise UnsupportedOperation(
                    f"a KAF at {call.name!r} with a base of type {type(kaf.base).__name__}",
                    "an activation that is the same function for every channel",
                    "nn.ReLU(), nn.SiLU() or another activation of `certify ops`",
                )
        return cls(kaf, base, len(call.input_shape))

    @classmethod
    def examples(cls) -> list[tuple[Activation, int]]:
        """Random, ridge-fitted, shared, free and with a base."""
        generator = torch.Generator().manual_seed(0)
        kafs = [KAF(4), KAF(4, convention="authors"), KAF(4, init="elu"), KAF(1, size=5, trainable=True)]
        for kaf in kafs:
            kaf.alpha.data.add_(0.1 * torch.randn(kaf.alpha.shape, generator=generator))
        found: list[tuple[Activation, int]] = [(cls(kaf.eval(), None, 2), len(kaf.alpha)) for kaf in kafs]
        small = KAF(4, base=torch.nn.ReLU())
        small.alpha.data.copy_(0.1 * torch.randn(small.alpha.shape, generator=generator))
        return [*found, (cls(small.eval(), PiecewiseLinear((0.0,), (0.0, 1.0)), 2), 4)]

    def forward(self, x: Tensor) -> Tensor:
        """The sum as written, in the dtype of x: an evaluation of its own, beside the module's."""
        y = self._curve.derivative(0, x.double().reshape(1, -1), self._channels(x.shape)).view(x.shape).to(x.dtype)
        return y if self.base is None else self.base.forward(x) + y

    def curve(self, shape: torch.Size, device: torch.device) -> Curve:
        gaussian = self._on(self._curve, shape)
        if self.base is None:
            return gaussian
        return SumCurve(gaussian, _curve_of(self.base, shape, device))

    def range(self, z: Interval) -> Interval:
        """The branch and bound; a bounded function needs no bounded interval."""
        return super().range(z if self.base is not None else self._near(z))

    def slope_range(self, z: Interval) -> Interval:
        """Certified extremes of f' on z (on the whole line if z is), plus the base's."""
        near, dtype = self._near(z), z.lower.dtype
        lower, upper = (end.double().reshape(-1) for end in (near.lower, near.upper))
        zero = torch.zeros_like(lower)
        curve = self._on(self._slope, z.lower.shape)
        (_, low), (_, up) = certified_lines(curve, lower, upper, (zero, zero))
        slope = Interval(*(end.view(z.lower.shape) for end in (low, up)))
        slope = Interval(round_down(slope.lower, dtype), round_up(slope.upper, dtype))
        if self.base is None:
            return slope
        other = self.base.slope_range(z)
        return Interval(
            round_down(step_down(slope.lower.double() + other.lower.double()), dtype),
            round_up(step_up(slope.upper.double() + other.upper.double()), dtype),
        )

    def rounding_error(self, z: Interval) -> Tensor:
        """gamma_{4D+10} sum|alpha|, whatever the order of the D terms; one rounding more for a base."""
        dtype = z.lower.dtype
        terms = gamma_n(4 * len(self._curve.dictionary) + 10, dtype)
        mass = self._curve.mass[self._channels(z.lower.shape)].view(z.lower.shape)
        error = round_up(terms * mass, dtype)
        if self.base is None:
            return error
        size = self.base.range(z).magnitude + round_up(mass, dtype)
        return error + self.base.rounding_error(z) + unit_roundoff(dtype) * size * 2

    def _near(self, z: Interval) -> Interval:
        """Clip z to where the kernels are not zero: beyond, f and f' are below 1e-300 in size."""
        reach = FAR / self._curve.unit
        low = float(self._curve.dictionary.min()) - reach
        high = float(self._curve.dictionary.max()) + reach
        return Interval(z.lower.clamp(low, high), z.upper.clamp(low, high))

    def _channels(self, shape: torch.Size) -> Tensor:
        """The channel of every element of a tensor [..., channels, *spatial]."""
        count = len(self._curve.alpha)
        tail = [1] * (self.sample_dims - 1)
        return torch.arange(count, device=self._curve.alpha.device).view(-1, *tail).expand(shape).reshape(-1)

    def _on(self, curve: GaussianCurve, shape: torch.Size) -> GaussianCurve:
        return GaussianCurve(
            curve.alpha, curve.dictionary, curve.gamma, self._channels(shape), curve.order, curve.ceiling
        )


def _same_everywhere(base: Activation) -> bool:
    """Whether a base is one function for all elements: lines are made on flattened cells."""
    slopes = base.slopes if isinstance(base, PiecewiseLinear) else ()
    one = all(not isinstance(slope, Tensor) or slope.numel() == 1 for slope in slopes)
    return one and isinstance(base, (Smooth, PiecewiseLinear))


def _curve_of(base: Activation, shape: torch.Size, device: torch.device) -> Curve:
    """The curve of a base: its own, or that of a piecewise linear function, which has no curvature."""
    if isinstance(base, Smooth):
        return base.curve(shape, device)
    assert isinstance(base, PiecewiseLinear)
    return Formula(base.forward, torch.zeros_like, lambda r, _: torch.zeros_like(r), base.kinks)
