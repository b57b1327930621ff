"""Smooth activations: ``Smooth`` derives range and lines from a curve; the usual functions give theirs in closed form.

Each curve states f, f'' and a bound of |f'''| that decays in the tails; enclose.py turns that into certified lines.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from certify.activations.base import Activation, outward
from certify.activations.enclose import Curve, certified_lines
from certify.enclosures import Interval, Relaxation
from certify.errors import UnsupportedOperation
from certify.graph import Call
from certify.registry import register_activation
from certify.rounding import round_down, round_up, unit_roundoff

#: Relative evaluation error of the closed forms below in float64, generously.
FLOAT64_ERROR = 2.0**-44


class Smooth(Activation):
    """Activations whose lines come from certified branch and bound on ``curve``.

    Authors write ``forward``, ``curve``, ``slope_range``, ``rounding_error``, ``from_call`` and ``examples``.
    """

    @abstractmethod
    def curve(self, shape: torch.Size, device: torch.device) -> Curve:
        """Return the curve of the elements of a tensor [batch, *sample] of that shape, flattened."""

    def range(self, z: Interval) -> Interval:
        zero = torch.zeros_like(z.lower)
        flat = self.lines(z, (zero, zero))
        return Interval(flat.lower_offset, flat.upper_offset)

    def lines(self, z: Interval, slopes: tuple[Tensor, Tensor] | None) -> Relaxation:
        shape, dtype = z.lower.shape, z.lower.dtype
        if slopes is not None:
            shape = torch.broadcast_shapes(shape, slopes[0].shape, slopes[1].shape)
            lower_slope, upper_slope = (slope.to(dtype).double().expand(shape).reshape(-1) for slope in slopes)
            slopes = lower_slope, upper_slope
        lower, upper = (end.double().expand(shape).reshape(-1) for end in (z.lower, z.upper))
        low, up = certified_lines(self.curve(shape, z.lower.device), lower, upper, slopes)
        return outward(dtype, *((slope.view(shape), offset.view(shape)) for slope, offset in (low, up)))


@dataclass(frozen=True)
class Formula(Curve):
    """A curve in closed form: ``value`` and ``second`` of s, ``bound`` of (distance of a cell to 0, its upper end)."""

    value: Callable[[Tensor], Tensor]
    second: Callable[[Tensor], Tensor]
    bound: Callable[[Tensor, Tensor], Tensor]
    breakpoints: tuple[float, ...] = ()

    def values(self, s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        f = self.value(s)
        return f, self.second(s), FLOAT64_ERROR * f.abs() + 1e-300

    def third(self, lower: Tensor, upper: Tensor) -> Tensor:
        return self.bound(torch.maximum(lower, -upper).clamp(min=0), upper)


class ClosedForm(Smooth):
    """A smooth activation without parameters per neuron: everything from formulas of one variable.

    ``formula`` is f with its derivatives, ``slope`` is f', ``inflections`` the points where f' has its local extremes.
    ``units`` bounds the error of the float evaluation in units of u max(|f|, |s f'|, scale).
    """

    inflections: tuple[float, ...] = ()
    monotone: bool = True
    units: float = 16.0

    @abstractmethod
    def formula(self) -> Formula:
        """Return f, f'' and the bound of |f'''|."""

    @abstractmethod
    def slope(self, s: Tensor) -> Tensor:
        """Return f'(s) in float64."""

    @classmethod
    def from_call(cls, call: Call) -> ClosedForm:
        return cls()

    @classmethod
    def examples(cls) -> list[tuple[Activation, int]]:
        return [(cls(), 1)]

    def curve(self, shape: torch.Size, device: torch.device) -> Curve:
        return self.formula()

    def range(self, z: Interval) -> Interval:
        if not self.monotone:
            return super().range(z)  # the branch and bound
        value, dtype = self.formula().value, z.lower.dtype
        low, up = value(z.lower.double()), value(z.upper.double())
        return Interval(
            round_down(low - FLOAT64_ERROR * low.abs() - 1e-300, dtype),
            round_up(up + FLOAT64_ERROR * up.abs() + 1e-300, dtype),
        )

    def slope_range(self, z: Interval) -> Interval:
        """[m, M] of f' over z: f' is monotone between its inflections, so ends and inflections inside decide."""
        lower, upper = (end.double().clamp(-1e4, 1e4) for end in (z.lower, z.upper))
        points = [
            lower,
            upper,
            *(torch.minimum(torch.maximum(lower, lower.new_tensor(c)), upper) for c in self.inflections),
        ]
        slopes = torch.stack([self.slope(point) for point in points])
        pad = 1e-11  # rounding, and inflections that are known to 1e-7 only
        dtype = z.lower.dtype
        return Interval(round_down(slopes.amin(0) - pad, dtype), round_up(slopes.amax(0) + pad, dtype))

    def rounding_error(self, z: Interval) -> Tensor:
        """A few units in the last place of the largest intermediate: |f|, and the argument's own rounding |s f'|."""
        value, slope = self.range(z).magnitude, self.slope_range(z).magnitude
        reach = torch.minimum(z.magnitude, torch.full_like(z.lower, 100.0)) * slope
        return self.units * unit_roundoff(z.lower.dtype) * torch.maximum(value, reach) + torch.finfo(z.lower.dtype).tiny


def _sigmoid_second(s: Tensor) -> Tensor:
    y = torch.sigmoid(s)
    return y * torch.sigmoid(-s) * (1 - 2 * y)


@register_activation(nn.Sigmoid, torch.sigmoid, F.sigmoid, "sigmoid")
class Sigmoid(ClosedForm):
    """1 / (1 + exp(-x)); |f'''| <= min(1/8, exp(-|x|))."""

    inflections = (0.0,)

    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(x)

    def slope(self, s: Tensor) -> Tensor:
        return torch.sigmoid(s) * torch.sigmoid(-s)

    def formula(self) -> Formula:
        return Formula(torch.sigmoid, _sigmoid_second, lambda r, _: torch.exp(-r).clamp(max=0.125))


@register_activation(nn.Tanh, torch.tanh, F.tanh, "tanh")
class Tanh(ClosedForm):
    """tanh; |f'''| <= min(2, 16 exp(-2 |x|))."""

    inflections = (0.0,)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x)

    def slope(self, s: Tensor) -> Tensor:
        return 1 / torch.cosh(s.clamp(-300, 300)).square()

    def formula(self) -> Formula:
        return Formula(
            torch.tanh,
            lambda s: -2 * torch.tanh(s) * self.slope(s),
            lambda r, _: (16 * torch.exp(-2 * r)).clamp(max=2.0),
        )


@register_activation(nn.Softplus, F.softplus)
class Softplus(ClosedForm):
    """log(1 + exp(b x)) / b; |f'''| <= b^2 min(0.0963, exp(-b |x|)).

    torch returns x itself above its threshold; ``rounding_error`` holds that difference, exp(-threshold) / b.
    """

    units = 32.0

    def __init__(self, beta: float = 1.0, threshold: float = 20.0) -> None:
        self.beta, self.threshold = beta, threshold

    @classmethod
    def from_call(cls, call: Call) -> Softplus:
        beta, threshold = float(call.option("beta", 1, 1.0)), float(call.option("threshold", 2, 20.0))
        if beta <= 0:
            raise UnsupportedOperation(f"softplus with beta={beta} at {call.name!r}", "beta > 0")
        return cls(beta, threshold)

    @classmethod
    def examples(cls) -> list[tuple[Activation, int]]:
        return [(cls(), 1), (cls(2.5, 10.0), 1)]

    def forward(self, x: Tensor) -> Tensor:
        return F.softplus(x, self.beta, self.threshold)

    def slope(self, s: Tensor) -> Tensor:
        return torch.sigmoid(self.beta * s)

    def formula(self) -> Formula:
        b = self.beta
        return Formula(
            lambda s: (s * b).clamp(min=0) / b + torch.log1p(torch.exp(-(s * b).abs())) / b,
            lambda s: b * torch.sigmoid(b * s) * torch.sigmoid(-b * s),
            lambda r, _: b * b * torch.exp(-b * r).clamp(max=0.0963),
        )

    def rounding_error(self, z: Interval) -> Tensor:
        switch = torch.where(
            z.upper * self.beta > 0.99 * self.threshold, math.exp(-0.99 * self.threshold) / self.beta, 0
        )
        return super().rounding_error(z) + switch


@register_activation(nn.ELU, F.elu)
class ELU(ClosedForm):
    """x above 0, a (exp(x) - 1) below; a kink at 0 unless a = 1; |f'''| <= a exp(x) below 0.

    f'' at the kink is the left one, a too much for the cell [0, q] on its right; a / q in place of |f'''| returns it.
    """

    inflections = (0.0,)

    def __init__(self, alpha: float = 1.0) -> None:
        self.alpha = alpha

    @classmethod
    def from_call(cls, call: Call) -> ELU:
        alpha = float(call.option("alpha", 1, 1.0))
        if alpha <= 0:
            raise UnsupportedOperation(f"elu with alpha={alpha} at {call.name!r}", "alpha > 0")
        return cls(alpha)

    @classmethod
    def examples(cls) -> list[tuple[Activation, int]]:
        return [(cls(), 1), (cls(0.4), 1), (cls(2.0), 1)]

    def forward(self, x: Tensor) -> Tensor:
        return F.elu(x, self.alpha)

    def slope(self, s: Tensor) -> Tensor:
        return torch.where(s > 0, 1.0, self.alpha * torch.exp(s.clamp(max=0)))

    def slope_range(self, z: Interval) -> Interval:
        found = super().slope_range(z)
        touches = z.upper >= 0
        one = torch.ones_like(z.lower)
        return Interval(
            torch.where(touches, torch.minimum(found.lower, one), found.lower),
            torch.where(touches, torch.maximum(found.upper, one), found.upper),
        )

    def formula(self) -> Formula:
        a = self.alpha
        return Formula(
            lambda s: torch.where(s > 0, s, a * torch.expm1(s.clamp(max=0))),
            lambda s: torch.where(s > 0, 0.0, a * torch.exp(s.clamp(max=0))),
            lambda r, upper: torch.where(upper > 0, torch.where(r == 0, a / upper, 0.0), a * torch.exp(-r)),
            (0.0,),
        )

    def rounding_error(self, z: Interval) -> Tensor:
        """exp(x) - 1 may cancel near 0: the error is one of a, not of f."""
        return super().rounding_error(z) + 4 * unit_roundoff(z.lower.dtype) * self.alpha


@register_activation(nn.SiLU, F.silu)
class SiLU(ClosedForm):
    """x sigmoid(x), also called Swish; f''' = 3 s'' + x s''' with s the sigmoid, so |f'''| <= (3 + |x|) exp(-|x|)."""

    inflections = (-2.399357280520, 2.399357280520)
    monotone = False

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(x)

    def slope(self, s: Tensor) -> Tensor:
        return torch.sigmoid(s) * (1 + s * torch.sigmoid(-s))

    def formula(self) -> Formula:
        return Formula(
            lambda s: s * torch.sigmoid(s),
            lambda s: 2 * torch.sigmoid(s) * torch.sigmoid(-s) + s * _sigmoid_second(s),
            lambda r, _: ((3 + r) * torch.exp(-r)).clamp(max=0.67),
        )


@register_activation(nn.GELU, F.gelu)
class GELU(ClosedForm):
    """x Phi(x) with the normal distribution Phi; f''' = phi(x) (x^3 - 4 x), at most 0.7788."""

    inflections = (-math.sqrt(2), math.sqrt(2))
    monotone = False
    units = 32.0

    @classmethod
    def from_call(cls, call: Call) -> GELU:
        if call.option("approximate", 1, "none") != "none":
            raise UnsupportedOperation(
                f"gelu(approximate='tanh') at {call.name!r}",
                "the exact GELU",
                "nn.GELU() without approximation",
            )
        return cls()

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(x)

    def slope(self, s: Tensor) -> Tensor:
        return 0.5 * torch.special.erfc(-s / math.sqrt(2)) + s * _normal(s)

    def formula(self) -> Formula:
        return Formula(
            lambda s: 0.5 * s * torch.special.erfc(-s / math.sqrt(2)),
            lambda s: _normal(s) * (2 - s.square()),
            lambda r, _: torch.where(r > 1.25, (r.pow(3) + 4 * r) * _normal(r), 0.78).clamp(max=0.78),
        )

    def rounding_error(self, z: Interval) -> Tensor:
        """1 + erf cancels for negative x: the error is one of |x|, not of f."""
        reach = torch.minimum(z.magnitude, torch.full_like(z.lower, 12.0))
        return super().rounding_error(z) + 8 * unit_roundoff(z.lower.dtype) * reach


def _normal(s: Tensor) -> Tensor:
    return torch.exp(-s.square() / 2) / math.sqrt(2 * math.pi)
