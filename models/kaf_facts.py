"""What the bound engine knows of a KAF: a certified table per channel, made once, and a base on top of it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from jaxtyping import Float64
from torch import Tensor

from certify import Activation, Curve, Interval, Smooth, register_activation
from certify.activations.envelope import at_end
from certify.activations.piecewise import PiecewiseLinear
from certify.activations.smooth import Formula
from certify.errors import UnsupportedOperation
from certify.graph import Call, build_rule
from certify.ops.base import Elementwise
from certify.rounding import gamma as gamma_n
from certify.rounding import round_down, round_up, step_down, step_up, unit_roundoff
from models.gaussian import gaussian_sum
from models.kaf import KAF
from models.kaf_table import Gaussians, Table, hermite, kept
from models.kaf_turns import Extremes, Turns, curvatures, slopes
from models.plan import HEAVIEST

STEEPEST = 1e3  # largest gamma: a table of steeper kernels would be long or coarse
COARSER = 8  # times fewer nodes where a point within 1e-6 of a turning point will do


@dataclass(frozen=True)
class SumCurve(Curve):
    """f + g of two curves, with the kinks of both."""

    first: Curve
    second: Curve

    @property
    def breakpoints(self) -> tuple[float, ...]:  # type: ignore[override]
        """The kinks of both."""
        return (*self.first.breakpoints, *self.second.breakpoints)

    def values(self, s: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        parts = zip(self.first.values(s), self.second.values(s), strict=True)
        f, second, error, blur = (a + b for a, b in parts)
        return f, second, error + 2.0**-52 * f.abs().amax(0), blur + 2.0**-44 * second.abs().amax(0)

    def slope(self, s: Tensor) -> Tensor:
        return self.first.slope(s) + self.second.slope(s)

    def fourth(self, lower: Tensor, upper: Tensor) -> Tensor:
        return self.first.fourth(lower, upper) + self.second.fourth(lower, upper)

    def take(self, index: Tensor) -> SumCurve:
        return SumCurve(self.first.take(index), self.second.take(index))


@dataclass(frozen=True)
class Ends:
    """f at two ends, per channel: its slopes, bounds of |f''|, the slopes' error, and the larger sum|alpha_i k_i'|."""

    slopes: tuple[Float64[Tensor, "channels"], Float64[Tensor, "channels"]]
    bends: tuple[Float64[Tensor, "channels"], Float64[Tensor, "channels"]]
    blur: Float64[Tensor, "channels"]
    steep: Float64[Tensor, "channels"]


@register_activation(KAF)
class KAFFacts(Smooth):
    """f(s) = sum_i alpha_i exp(-gamma (s - d_i)^2) (+ base(s)), per channel: dimension 1 of the input."""

    def __init__(self, kaf: KAF, base: Activation | None, sample_dims: int, *, live: bool = False) -> None:
        self.kaf, self.base, self.sample_dims = kaf, base, sample_dims
        self._live = tuple((value if live else value.detach()).double() for value in kaf.gaussian())
        alpha, dictionary, gamma = (value.detach() for value in self._live)
        self._sum = Gaussians(alpha, dictionary, float(gamma))

    @cached_property
    def _table(self) -> Table:
        return kept(Table.of, self._sum)

    @cached_property
    def _coarse(self) -> Table:
        return Table.of(self._sum, coarser=COARSER)

    @cached_property
    def _slopes(self) -> Turns:
        return kept(slopes, self._sum)

    @cached_property
    def _curvatures(self) -> Turns:
        return kept(curvatures, self._sum)

    @classmethod
    def from_call(cls, call: Call) -> Smooth:
        """Read the module; a base must itself be a registered activation."""
        kaf, base = call.module, None
        assert isinstance(kaf, KAF)
        if kaf.kernel != "gaussian":
            raise UnsupportedOperation(
                f"a KAF with the kernel {kaf.kernel!r} at {call.name!r}",
                "the gaussian kernel: there are no certified facts about others",
                "KAF(channels, kernel='gaussian'), or attack it (`certify attack`)",
            )
        if float(kaf.gaussian()[2].detach()) > STEEPEST:
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
        from models.kaf_tails import TailedFacts  # which builds on this class

        facts = cls(kaf, base, len(call.input_shape), live=torch.is_grad_enabled())  # see ``certify.graph.held``
        return facts if kaf.tails == "fall" else TailedFacts(facts)

    @classmethod
    def examples(cls) -> list[tuple[Activation, int]]:
        """Random, ridge-fitted, shared, free and with a base; the same ones every time."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            kafs = [KAF(4), KAF(4, convention="authors"), KAF(4, init="elu"), KAF(1, size=5, trainable=True)]
            for kaf in kafs:
                kaf.alpha.data.add_(0.1 * torch.randn(kaf.alpha.shape))
            small = KAF(4, base=torch.nn.ReLU())
            small.alpha.data.copy_(0.1 * torch.randn(small.alpha.shape))
        found: list[tuple[Activation, int]] = [(cls(kaf.eval(), None, 2), len(kaf.alpha)) for kaf in kafs]
        return [*found, (cls(small.eval(), PiecewiseLinear((0.0,), (0.0, 1.0)), 2), 4)]

    def forward(self, x: Tensor) -> Tensor:
        """The sum as written, in float64, then in the dtype of x: an evaluation of its own, beside the module's.

        That is for checks; where gradients are wanted it is the module's, which recomputes the terms.
        """
        if torch.is_grad_enabled() and any(value.requires_grad for value in (x, *self._live)):
            flat = x.double().flatten(0, x.ndim - self.sample_dims - 1)
            alpha, dictionary, gamma = self._live
            y = gaussian_sum(flat, alpha, dictionary, gamma).view(x.shape).to(x.dtype)
            return y if self.base is None else self.base.forward(x) + y
        s, row = x.double().reshape(-1), self.channels(x.shape)
        y = torch.zeros_like(s)
        for alpha, d in zip(self._sum.alpha.t(), self._sum.dictionary, strict=True):
            y += alpha[row] * torch.exp(-self._sum.gamma * (s - d).square())
        y = y.view(x.shape).to(x.dtype)
        return y if self.base is None else self.base.forward(x) + y

    def curve(self, shape: torch.Size, device: torch.device) -> Curve:
        table = self._table.at(self.channels(shape))
        return table if self.base is None else SumCurve(table, _curve_of(self.base, shape, device))

    def range(self, z: Interval) -> Interval:
        """The ends and the turning points of the table; with a base, the branch and bound.

        Where gradients are wanted, f itself at its extreme points, with no margin for errors: a coarse table finds
        them, for f is level there.
        """
        if self.base is not None:
            return super().range(z)
        if not self.moves(z):
            ends = (end.double().reshape(-1) for end in (z.lower, z.upper))
            return _outward(*self._table.at(self.channels(z.lower.shape)).extremes(*ends), z)
        low, up = (self.kaf_values(at_end(s, z)) for s in self.extremal(z))
        return Interval(round_down(low, z.lower.dtype), round_up(up, z.lower.dtype))

    @torch.no_grad()
    def extremal(self, z: Interval) -> tuple[Tensor, Tensor]:
        """Return where f is smallest and where it is largest on z, up to rounding: ends, or turning points inside."""
        first, last = (self.kaf_values(end) for end in (z.lower, z.upper))
        low, up = (torch.where(first * sign <= last * sign, z.lower, z.upper) for sign in (1, -1))
        least, most = torch.minimum(first, last), torch.maximum(first, last)
        tail = [1] * (self.sample_dims - 1)
        for turn in zip(*self._coarse.turns, strict=True):
            place, value = (number.to(z.lower.dtype).view(-1, *tail) for number in turn)  # NaN where there is none
            inside = (z.lower <= place) & (place <= z.upper)
            below, above = inside & (value < least), inside & (value > most)
            low, least = torch.where(below, place, low), torch.where(below, value, least)
            up, most = torch.where(above, place, up), torch.where(above, value, most)
        return low, up

    def kaf_values(self, x: Tensor) -> Tensor:
        """Return the module's own values, without its base, on [*leading, *sample]."""
        flat = x.flatten(0, x.ndim - self.sample_dims - 1)
        return self.kaf.expansion(flat).view(x.shape)

    def slope_range(self, z: Interval) -> Interval:
        """Certified extremes of f' on z (on the whole line if z is), plus the base's."""
        slope, dtype = self._turned(self._slopes, z), z.lower.dtype
        if self.base is None:
            return slope
        other = self.base.slope_range(z)
        return Interval(
            round_down(step_down(slope.lower.double() + other.lower.double()), dtype),
            round_up(step_up(slope.upper.double() + other.upper.double()), dtype),
        )

    def curvature(self, z: Interval) -> Interval:
        """Return [m, M], attained up to rounding, that holds f'' on z (on the whole line if z is); none with a base."""
        if self.base is not None:
            raise UnsupportedOperation(
                f"the curvature of a KAF with a base of type {type(self.kaf.base).__name__}",
                "a KAF without a base",
                "KAF(channels, init=...) to start as that function",
            )
        return self._turned(self._curvatures, z)

    def extremes(self, order: int, lower: Float64[Tensor, "channels"], upper: Float64[Tensor, "channels"]) -> Extremes:
        """Return the certified range of f' (order 1) or f'' (order 2) on one interval per channel, without the base."""
        turns = {1: lambda: self._slopes, 2: lambda: self._curvatures}[order]()
        return turns.extremes(lower, upper, torch.arange(len(self._sum.alpha), device=lower.device))

    def ends(self, bound: float) -> Ends:
        """Return what linear tails from -bound and bound need, in float64."""
        places = self._sum.alpha.new_tensor([-bound, bound])
        slopes, bends = (self._sum.derivative(order, places) for order in (1, 2))
        away = (places[:, None] - self._sum.dictionary) * self._sum.unit
        steep = self._sum.alpha.abs() @ (self._sum.unit * away.abs() * torch.exp(away.square() * -0.5)).t()
        rough = bends.abs() + self._sum.rounding(2)[:, None]
        return Ends(
            (slopes[:, 0], slopes[:, 1]), (rough[:, 0], rough[:, 1]), self._sum.rounding(1), steep.amax(1) * (1 + 1e-9)
        )

    def end_slopes(self, bound: float) -> tuple[Float64[Tensor, "channels"], Float64[Tensor, "channels"]]:
        """Return f' at -bound and bound; differentiable where facts are live."""
        place = self._sum.alpha.new_full((len(self._sum.alpha),), bound)
        return self.derivative(1, -place), self.derivative(1, place)

    def derivative(self, order: int, s: Float64[Tensor, "channels"]) -> Float64[Tensor, "channels"]:
        """Return f^(order) at one point per channel, without the base; differentiable where facts are live."""
        alpha, dictionary, gamma = self._live
        unit = (2 * gamma).sqrt()
        v = (s[:, None] - dictionary) * unit
        return (alpha * hermite(order, v) * torch.exp(v.square() * -0.5)).sum(1) * (-unit) ** order

    def rounding_error(self, z: Interval) -> Tensor:
        """gamma_{4D+10} sum|alpha|, for every form of the sum and any order of its D terms; one more for a base.

        Term by term and by powers, eager and compiled: models/plan.py allows powers only where they err by no more.
        Weights whose powers may overflow have no bound.
        """
        dtype = z.lower.dtype
        terms = gamma_n(4 * len(self._sum.dictionary) + 10, dtype)
        mass = self._sum.mass[self.channels(z.lower.shape)].view(z.lower.shape)
        error = round_up(torch.where(mass > HEAVIEST, torch.inf, terms * mass), dtype)
        if self.base is None:
            return error
        size = self.base.range(z).magnitude + round_up(mass, dtype)
        return error + self.base.rounding_error(z) + unit_roundoff(dtype) * size * 2

    def _turned(self, turns: Turns, z: Interval) -> Interval:
        """The range of a derivative over z; a bounded function needs no bounded interval."""
        lower, upper = (end.double().reshape(-1) for end in (z.lower, z.upper))
        found = turns.extremes(lower, upper, self.channels(z.lower.shape))
        return _outward(found.low, found.up, z)

    def channels(self, shape: torch.Size) -> Tensor:
        """Return the channel of every element of a tensor [..., channels, *spatial]."""
        count = len(self._sum.alpha)
        tail = [1] * (self.sample_dims - 1)
        return torch.arange(count, device=self._sum.alpha.device).view(-1, *tail).expand(shape).reshape(-1)


def _outward(low: Tensor, up: Tensor, z: Interval) -> Interval:
    """The interval [low, up], given flat in float64, in the dtype and shape of z."""
    dtype, shape = z.lower.dtype, z.lower.shape
    return Interval(round_down(low, dtype).view(shape), round_up(up, dtype).view(shape))


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
    return Formula(
        base.forward,
        lambda s: base.slope_range(Interval(s, s)).lower,
        torch.zeros_like,
        lambda r, _: torch.zeros_like(r),
        base.kinks,
    )
