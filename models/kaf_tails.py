"""What the bound engine knows of a KAF with linear tails: the KAF's facts on [-B, B], straight lines outside."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float64
from torch import Tensor

from certify import Activation, Curve, Interval, Smooth
from certify.activations.envelope import at_end
from certify.graph import Call
from certify.rounding import gamma as gamma_n
from certify.rounding import round_down, round_up, unit_roundoff
from models.kaf import KAF
from models.kaf_facts import KAFFacts

#: Beyond this a bound is that of an infinite end, which stands at 1e300 while f is evaluated.
HUGE = 1e270
Ends = tuple[Float64[Tensor, "n"], Float64[Tensor, "n"]]


@dataclass(frozen=True)
class Tailed(Curve):
    """``inner`` on [-bound, bound]; outside f(e) + f'(e) (s - e) from the nearer end e, with slopes known to ``blur``.

    f'' jumps at the ends. There it is the inner one, |f''(e)| too much for the cell outside, where q^2/8 (8 |f''(e)| /
    q^2) returns it.
    """

    inner: Curve
    bound: float
    slopes: Ends
    bends: Ends  # bounds of |f''| at both ends
    blur: Float64[Tensor, "n"]

    @property
    def breakpoints(self) -> tuple[float, ...]:  # type: ignore[override]
        """Both ends."""
        return (-self.bound, self.bound)

    def values(self, s: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        near = s.clamp(-self.bound, self.bound)
        f, second, error, rough = self.inner.values(near)
        away = s - near
        f = f + torch.where(s > 0, self.slopes[1], self.slopes[0]) * away
        second = torch.where(away == 0, second, 0.0)
        return f, second, error + self.blur * away.abs().amax(0) + 2.0**-50 * f.abs().amax(0), rough

    def slope(self, s: Tensor) -> Tensor:
        return self.inner.slope(s.clamp(-self.bound, self.bound))

    def fourth(self, lower: Tensor, upper: Tensor) -> Tensor:
        jump = torch.where(lower > 0, self.bends[1], self.bends[0])
        touching = (lower == self.bound) | (upper == -self.bound)
        returned = torch.where(touching, 8 * jump / (upper - lower).clamp(min=1e-150).square(), 0.0)
        outside = (lower >= self.bound) | (upper <= -self.bound)
        ends = (end.clamp(-self.bound, self.bound) for end in (lower, upper))
        return torch.where(outside, returned, self.inner.fourth(*ends))

    def take(self, index: Tensor) -> Tailed:
        left, right = self.slopes
        low, high = self.bends
        return replace(
            self,
            inner=self.inner.take(index),
            slopes=(left[index], right[index]),
            bends=(low[index], high[index]),
            blur=self.blur[index],
        )


class TailedFacts(Smooth):
    """f of ``inner`` on [-B, B], continued along its tangents."""

    def __init__(self, inner: KAFFacts) -> None:
        self.inner, self.bound = inner, inner.kaf.bound
        ends = inner.ends(self.bound)
        self._slopes, self._bends, self._blur, self._steep = ends.slopes, ends.bends, ends.blur, ends.steep

    @classmethod
    def from_call(cls, call: Call) -> Smooth:
        """Read the module, as ``KAFFacts`` does for all KAFs."""
        return KAFFacts.from_call(call)

    @classmethod
    def examples(cls) -> list[tuple[Activation, int]]:
        """Fitted, random and short."""
        found: list[tuple[Activation, int]] = []
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            for kaf in (KAF(3, init="elu", tails="linear"), KAF(4, tails="linear"), KAF(1, bound=1.0, tails="linear")):
                kaf.alpha.data.add_(0.1 * torch.randn(kaf.alpha.shape))
                found.append((cls(KAFFacts(kaf.eval(), None, 2)), len(kaf.alpha)))
        return found

    def forward(self, x: Tensor) -> Tensor:
        """In float64, then in the dtype of x; differentiable where the inner facts are live."""
        near = self._near(x)
        left, right = self.inner.end_slopes(self.bound)
        slope = torch.where(x > 0, self._spread(right), self._spread(left))
        return (self.inner.forward(near.double()) + slope * (x.double() - near.double())).to(x.dtype)

    def curve(self, shape: torch.Size, device: torch.device) -> Curve:
        channel = self.inner.channels(shape)
        left, right = (slope[channel] for slope in self._slopes)
        low, high = (bend[channel] for bend in self._bends)
        return Tailed(self.inner.curve(shape, device), self.bound, (left, right), (low, high), self._blur[channel])

    def range(self, z: Interval) -> Interval:
        """The inner range where z meets [-B, B], and the ends of z: outside f is monotone."""
        dtype = z.lower.dtype
        if self.moves(z):
            places = (*self.inner.extremal(self._inside(z)), z.lower, z.upper)
            values = torch.stack([self.inner.kaf_values(at_end(s, z)) for s in places])
            return Interval(round_down(values.amin(0), dtype), round_up(values.amax(0), dtype))
        shape = z.lower.shape
        curve = self.curve(shape, z.lower.device)
        ends = torch.stack([z.lower.double().reshape(-1), z.upper.double().reshape(-1)]).nan_to_num(0.0)
        finite = ends.clamp(-1e300, 1e300)
        f, _, error, _ = curve.values(finite)
        error = error.view(shape)
        low, up = (f.amin(0).view(shape) - error, f.amax(0).view(shape) + error)
        low, up = torch.where(low < -HUGE, -torch.inf, low), torch.where(up > HUGE, torch.inf, up)
        inner, meets = self.inner.range(self._inside(z)).double(), (z.lower <= self.bound) & (z.upper >= -self.bound)
        return Interval(
            round_down(torch.where(meets, torch.minimum(low, inner.lower), low), dtype),
            round_up(torch.where(meets, torch.maximum(up, inner.upper), up), dtype),
        )

    def slope_range(self, z: Interval) -> Interval:
        """That of the inner function where z is cut to [-B, B]: outside the slope is that of the nearer end."""
        return self.inner.slope_range(self._inside(z))

    def curvature(self, z: Interval) -> Interval:
        """Return [m, M] that holds f'' on z wherever it exists: the inner one's, and 0 if z leaves [-B, B]."""
        found = self.inner.curvature(self._inside(z))
        leaves = (z.lower < -self.bound) | (z.upper > self.bound)
        return Interval(
            torch.where(leaves, found.lower.clamp(max=0), found.lower),
            torch.where(leaves, found.upper.clamp(min=0), found.upper),
        )

    def rounding_error(self, z: Interval) -> Tensor:
        """That of the sum; outside also the slope's, gamma_{4D+40} sum|alpha_i k_i'|, times the distance, and three."""
        dtype = z.lower.dtype
        terms = gamma_n(4 * len(self.inner.kaf.dictionary) + 40, dtype)
        reach = (z.magnitude.double() - self.bound).clamp(min=0)
        steep = self._spread(self._steep) * terms
        size = self.range(z).magnitude.double()
        error = self.inner.rounding_error(z).double() + reach * steep + 6 * unit_roundoff(dtype) * size
        return round_up(error, dtype)

    def _near(self, x: Tensor) -> Tensor:
        """x cut to [-B, B]; its gradient passes at the ends, which those of clamp does not."""
        return torch.where(x > self.bound, self.bound, torch.where(x < -self.bound, -self.bound, x))

    def _inside(self, z: Interval) -> Interval:
        return Interval(self._near(z.lower), self._near(z.upper))

    def _spread(self, values: Tensor) -> Tensor:
        """One value per channel, in a shape that broadcasts against [..., channels, *space]."""
        return values.view(-1, *[1] * (self.inner.sample_dims - 1))
