"""Smooth activations: ``Smooth`` derives range and lines from a curve; the usual functions give theirs in closed form.

Each curve states f, f', f'' and a bound of |f''''| that decays in the tails; enclose.py makes certified lines of it.
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
from certify.activations.envelope import moving
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
        """Of our choice: on each side the line of smallest area, or the parallel to the chord if that burdens less.

        They move with the ends of z and the parameters of f where gradients are wanted, one line per element.
        """
        if not self.moves(z) or (slopes is not None and slopes[0].ndim > z.lower.ndim):
            return self._search(z, slopes)
        with torch.no_grad():
            found, curve = self._search(z, slopes), self.curve(z.lower.shape, z.lower.device)
        return moving(self.forward, lambda s: curve.values(s.flatten(1))[0].view(s.shape), z, found, slopes)

    def moves(self, z: Interval) -> bool:
        """Whether bounds over z are to be differentiated: in z, or in parameters of f."""
        if not torch.is_grad_enabled():
            return False
        return z.lower.requires_grad or z.upper.requires_grad or self.forward(z.lower).requires_grad

    def _search(self, z: Interval, slopes: tuple[Tensor, Tensor] | None, *, least_area: bool = False) -> Relaxation:
        shape, dtype, n = z.lower.shape, z.lower.dtype, z.lower.numel()
        curve = self.curve(shape, z.lower.device)
        if slopes is not None:  # leading dimensions of the slopes share the grids of z
            shape = torch.broadcast_shapes(shape, slopes[0].shape, slopes[1].shape)
            lower_slope, upper_slope = (slope.to(dtype).double().expand(shape).reshape(-1, n) for slope in slopes)
            slopes = lower_slope, upper_slope
        ends = z.lower.double().reshape(-1), z.upper.double().reshape(-1)
        low, up = certified_lines(curve, *ends, slopes, least_area=least_area)
        return outward(dtype, *((slope.view(shape), offset.view(shape)) for slope, offset in (low, up)))


@dataclass(frozen=True)
class Formula(Curve):
    """f, f' and f'' in closed form; ``bound`` of |f''''|, of (distance of a cell to 0, its upper end)."""

    value: Callable[[Tensor], Tensor]
    first: Callable[[Tensor], Tensor]
    second: Callable[[Tensor], Tensor]
    bound: Callable[[Tensor, Tensor], Tensor]
    breakpoints: tuple[float, ...] = ()

    def values(self, s: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        f, second = self.value(s), self.second(s)
        size = f.abs().amax(0)
        return f, second, FLOAT64_ERROR * size + 1e-300, FLOAT64_ERROR * (size + second.abs().amax(0))

    def slope(self, s: Tensor) -> Tensor:
        return self.first(s)

    def fourth(self, lower: Tensor, upper: Tensor) -> Tensor:
        return self.bound(torch.maximum(lower, -upper).clamp(min=0), upper)


class ClosedForm(Smooth):
    """A smooth activation without parameters per neuron: everything from formulas of one variable.

    ``formula`` is f with its derivatives; ``extrema`` and ``inflections`` are the points, to 1e-8, where f and f' have
    their local extremes. ``units`` bounds the error of the float evaluation in units of u max(|f|, |s f'|).
    """

    extrema: tuple[float, ...] = ()
    inflections: tuple[float, ...] = ()
    units: float = 16.0

    @abstractmethod
    def formula(self) -> Formula:
        """Return f with its derivatives, in float64."""

    @classmethod
    def from_call(cls, call: Call) -> ClosedForm:
        return cls()

    @classmethod
    def examples(cls) -> list[tuple[Activation, int]]:
        return [(cls(), 1)]

    def second_lines(self, z: Interval) -> Relaxation:
        """The lines of smallest area, also where ``lines`` has chosen others."""
        return self._search(z, None, least_area=True)

    def curve(self, shape: torch.Size, device: torch.device) -> Curve:
        return self.formula()

    def range(self, z: Interval) -> Interval:
        """f is monotone between its extrema, so the ends and the extrema inside decide."""
        z64 = Interval(z.lower.double().clamp(min=-1e300), z.upper.double().clamp(min=-1e300))  # 0 times inf is NaN
        low, up = _extremes(self.formula().value, z64, self.extrema)
        dtype, pad = z.lower.dtype, 1e-14 if self.extrema else 1e-300  # f is flat at its extrema
        return Interval(
            round_down(low - FLOAT64_ERROR * low.abs() - pad, dtype),
            round_up(up + FLOAT64_ERROR * up.abs() + pad, dtype),
        )

    def slope_range(self, z: Interval) -> Interval:
        """[m, M] of f': it is monotone between its inflections, so the ends and the inflections inside decide."""
        near = Interval(z.lower.double().clamp(-1e4, 1e4), z.upper.double().clamp(-1e4, 1e4))
        low, up = _extremes(self.formula().first, near, self.inflections)
        return Interval(round_down(low - 1e-11, z.lower.dtype), round_up(up + 1e-11, z.lower.dtype))

    def rounding_error(self, z: Interval) -> Tensor:
        """A few units in the last place of the largest intermediate: |f|, and the argument's own rounding |s f'|."""
        value, slope = self.range(z).magnitude, self.slope_range(z).magnitude
        reach = torch.minimum(z.magnitude, torch.full_like(z.lower, 100.0)) * slope
        return self.units * unit_roundoff(z.lower.dtype) * torch.maximum(value, reach) + torch.finfo(z.lower.dtype).tiny


def _extremes(f: Callable[[Tensor], Tensor], z: Interval, points: tuple[float, ...]) -> tuple[Tensor, Tensor]:
    """Return min and max of f over the ends of z and the ``points``, moved into z."""
    inside = [torch.minimum(z.upper, z.lower.clamp(min=point)) for point in points]
    values = torch.stack([f(point) for point in (z.lower, z.upper, *inside)])
    return values.amin(0), values.amax(0)


def _sigmoid_slope(s: Tensor) -> Tensor:
    y = torch.sigmoid(s)
    return y * (1 - y)


def _sigmoid_second(s: Tensor) -> Tensor:
    y = torch.sigmoid(s)
    return y * (1 - y) * (1 - 2 * y)


@register_activation(nn.Sigmoid, torch.sigmoid, F.sigmoid, "sigmoid")
class Sigmoid(ClosedForm):
    """1 / (1 + exp(-x)) = y; |f''''| = |d (1 - 2 y) (1 - 12 d)| <= min(0.128, exp(-|x|)), d = y (1 - y)."""

    inflections = (0.0,)

    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(x)

    def formula(self) -> Formula:
        return Formula(torch.sigmoid, _sigmoid_slope, _sigmoid_second, lambda r, _: torch.exp(-r).clamp(max=0.128))


@register_activation(nn.Tanh, torch.tanh, F.tanh, "tanh")
class Tanh(ClosedForm):
    """tanh(x) = 2 sigmoid(2 x) - 1; |f''''| <= 32 min(0.128, exp(-2 |x|))."""

    inflections = (0.0,)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x)

    def formula(self) -> Formula:
        return Formula(
            torch.tanh,
            lambda s: 4 * _sigmoid_slope(2 * s),
            lambda s: -8 * torch.tanh(s) * _sigmoid_slope(2 * s),
            lambda r, _: 32 * torch.exp(-2 * r).clamp(max=0.128),
        )


@register_activation(nn.Softplus, F.softplus)
class Softplus(ClosedForm):
    """log(1 + exp(b x)) / b; |f''''| <= b^3 min(1/8, exp(-b |x|)).

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

    def formula(self) -> Formula:
        b = self.beta
        return Formula(
            lambda s: (s * b).clamp(min=0) / b + torch.log1p(torch.exp(-(s * b).abs())) / b,
            lambda s: torch.sigmoid(b * s),
            lambda s: b * _sigmoid_slope(b * s),
            lambda r, _: b**3 * torch.exp(-b * r).clamp(max=0.125),
        )

    def rounding_error(self, z: Interval) -> Tensor:
        switch = torch.where(
            z.upper * self.beta > 0.99 * self.threshold, math.exp(-0.99 * self.threshold) / self.beta, 0
        )
        return super().rounding_error(z) + switch


@register_activation(nn.ELU, F.elu)
class ELU(ClosedForm):
    """x above 0, a (exp(x) - 1) below; a kink at 0 unless a = 1; |f''''| <= a exp(x) below 0.

    f'' at the kink is the left one, a too much for the cell [0, q] on its right, where q^2/8 (8 a / q^2) returns it.
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
            lambda s: torch.where(s > 0, 1.0, a * torch.exp(s.clamp(max=0))),
            lambda s: torch.where(s > 0, 0.0, a * torch.exp(s.clamp(max=0))),
            lambda r, upper: torch.where(
                upper > 0,
                torch.where(r == 0, 8 * a / upper.clamp(min=1e-150).square(), 0.0),
                a * torch.exp(-r),
            ),
            (0.0,),
        )

    def rounding_error(self, z: Interval) -> Tensor:
        """exp(x) - 1 may cancel near 0: the error is one of a, not of f."""
        return super().rounding_error(z) + 4 * unit_roundoff(z.lower.dtype) * self.alpha


@register_activation(nn.SiLU, F.silu)
class SiLU(ClosedForm):
    """x s(x), s the sigmoid, also called Swish; |f''''| = |4 s''' + x s''''| <= min(0.501, (4 + |x|) exp(-|x|))."""

    extrema = (-1.27846454276107,)
    inflections = (-2.399357280520, 2.399357280520)

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(x)

    def formula(self) -> Formula:
        return Formula(
            lambda s: s * torch.sigmoid(s),
            lambda s: torch.sigmoid(s) * (1 + s * torch.sigmoid(-s)),
            lambda s: 2 * _sigmoid_slope(s) + s * _sigmoid_second(s),
            lambda r, _: ((4 + r) * torch.exp(-r)).clamp(max=0.501),
        )


@register_activation(nn.GELU, F.gelu)
class GELU(ClosedForm):
    """x Phi(x) with the normal distribution Phi; f'''' = phi(x) (7 x^2 - 4 - x^4), at most 1.596."""

    extrema = (-0.751791524693565,)
    inflections = (-math.sqrt(2), math.sqrt(2))
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

    def formula(self) -> Formula:
        return Formula(
            lambda s: 0.5 * s * torch.special.erfc(-s / math.sqrt(2)),
            lambda s: 0.5 * torch.special.erfc(-s / math.sqrt(2)) + s * _normal(s),
            lambda s: _normal(s) * (2 - s.square()),
            # r^4 + 7 r^2 + 4 times the density falls beyond sqrt(2)
            lambda r, _: torch.where(r > 1.5, (r.pow(4) + 7 * r.square() + 4) * _normal(r), 1.596).clamp(max=1.596),
        )

    def rounding_error(self, z: Interval) -> Tensor:
        """1 + erf cancels for negative x: the error is one of |x|, not of f."""
        reach = torch.minimum(z.magnitude, torch.full_like(z.lower, 12.0))
        return super().rounding_error(z) + 8 * unit_roundoff(z.lower.dtype) * reach


def _normal(s: Tensor) -> Tensor:
    return torch.exp(-s.square() / 2) / math.sqrt(2 * math.pi)


@dataclass(frozen=True)
class _Parabola(Formula):
    """x clamp(x + 3, 0, 6) / 6: f'' is 1/3 between the breakpoints and 0 outside.

    At a breakpoint f'' is the inner one, 1/3 too much for the cell outside it, where q^2/8 (8/3 / q^2) returns it.
    """

    def fourth(self, lower: Tensor, upper: Tensor) -> Tensor:
        outside = (lower == self.breakpoints[1]) | (upper == self.breakpoints[0])
        return torch.where(outside, 8 / 3 / (upper - lower).clamp(min=1e-150).square(), 0.0)


@register_activation(nn.Hardswish, F.hardswish)
class Hardswish(ClosedForm):
    """x clamp(x + 3, 0, 6) / 6; its slope jumps from 0 to -1/2 at -3 and from 3/2 to 1 at 3."""

    extrema = (-1.5,)
    inflections = (-3.0, 3.0)

    def forward(self, x: Tensor) -> Tensor:
        return F.hardswish(x)

    def formula(self) -> Formula:
        inner = (-3.0, 3.0)
        return _Parabola(
            lambda s: s * (s + 3).clamp(0, 6) / 6,
            lambda s: torch.where(s > 3, 1.0, torch.where(s < -3, 0.0, (2 * s + 3) / 6)),
            lambda s: torch.where(s.abs() > 3, 0.0, 1 / 3).to(s.dtype),
            lambda r, _: torch.zeros_like(r),
            inner,
        )

    def slope_range(self, z: Interval) -> Interval:
        """Both slopes at a breakpoint that z touches."""
        found = super().slope_range(z)
        zero, one = torch.zeros_like(z.lower), torch.ones_like(z.lower)
        lower = torch.where((z.lower <= -3) & (z.upper >= -3), torch.minimum(found.lower, zero), found.lower)
        upper = torch.where((z.lower <= -3) & (z.upper >= -3), torch.maximum(found.upper, zero), found.upper)
        right = (z.lower <= 3) & (z.upper >= 3)
        return Interval(
            torch.where(right, torch.minimum(lower, one), lower), torch.where(right, torch.maximum(upper, one), upper)
        )
