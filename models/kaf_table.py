"""A sum of Gaussians as a certified table: cubic pieces with a proven error, read instead of D exponentials.

With v = u sqrt(2 gamma), the n-th derivative of the kernel is (-sqrt(2 gamma))^n He_n(v) exp(-v^2 / 2), He_n the
probabilists' Hermite polynomial, and |He_n(v)| exp(-v^2 / 2) <= 1.0865 sqrt(n!) exp(-v^2 / 4) (Cramer's inequality,
Abramowitz and Stegun 22.14.17). Such bounds times sum|alpha| are sound and useless after ridge initialisation
(sum|alpha| is about 700): near the dictionary, bounds of derivatives come from the nodes, with the sag between them.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from jaxtyping import Float64, Int
from torch import Tensor

from certify import Curve
from certify.rounding import gamma as gamma_n

T = TypeVar("T")

FINE = 192  # nodes per unit of v; the cubic is within FINE^-4 / 384 of a function with a fourth derivative of 1
NODES = 1 << 14  # nodes at most, for narrow kernels far apart: the pieces are longer then, and their errors larger
REACH = 13.0  # units of v beyond the dictionary; exp(-v^2 / 4) is below 5e-19 there


def hermite(n: int, v: Tensor, sign: float = -1.0) -> Tensor:
    """He_n(v) by its recurrence; with ``sign`` = 1 its coefficients are taken without their signs."""
    previous, value = torch.ones_like(v), v
    if n == 0:
        return previous
    for k in range(1, n):
        previous, value = value, v * value + sign * k * previous
    return value


@dataclass(frozen=True)
class Gaussians:
    """f(s) = sum_i alpha_i exp(-gamma (s - d_i)^2), one alpha per channel, in float64."""

    alpha: Float64[Tensor, "channels size"]
    dictionary: Float64[Tensor, "size"]
    gamma: float

    @property
    def unit(self) -> float:
        """sqrt(2 gamma): v = unit * (s - d)."""
        return math.sqrt(2 * self.gamma)

    @property
    def mass(self) -> Float64[Tensor, "channels"]:
        """sum |alpha|."""
        return self.alpha.abs().sum(1)

    def derivative(self, n: int, s: Float64[Tensor, "m"]) -> Float64[Tensor, "channels m"]:
        """Return f^(n)(s) for every channel."""
        v = (s - self.dictionary[:, None]) * self.unit
        return self.alpha @ (hermite(n, v) * torch.exp(v.square() * -0.5)) * (-self.unit) ** n

    def bound(self, n: int) -> Float64[Tensor, "channels"]:
        """Return C with |f^(n)| <= C exp(-v^2 / 4) at every s that is v units away from the dictionary or more."""
        return 1.0865 * math.sqrt(math.factorial(n)) * self.unit**n * self.mass + 1e-300

    def supremum(self, n: int, nodes: Float64[Tensor, "m"]) -> Float64[Tensor, "channels"]:
        """Return a bound of sup |f^(n)| over the line: |f^(n)| on even nodes, h^2/8 sup |f^(n+2)| between, the tail."""
        step, tail = float(nodes[1] - nodes[0]), self.bound(n) * math.exp(-(REACH**2) / 4)
        sag = step**2 / 8 * self.bound(n + 2)
        return torch.maximum(self.derivative(n, nodes).abs().amax(1) + sag, tail) * (1 + 1e-6)

    def rounding(self, n: int) -> Float64[Tensor, "channels"]:
        """Return a bound of the evaluation error of ``derivative(n, s)`` for n <= 2."""
        terms = gamma_n(4 * len(self.dictionary) + 10 + 10 * n, torch.float64)
        return terms * self.mass * self.unit**n


@dataclass(frozen=True)
class Table(Curve):
    """f, a sum of Gaussians: cubic Hermite pieces between even nodes, constant beyond them.

    |f - cubic| <= h^4/384 sup|f''''| and |f'' - cubic''| <= h^2/12 sup|f''''|; to these come the errors of the nodes'
    values, e and e' in f and f', as e + h e'/4 and (12 e + 6 h e')/h^2, that of the position of s, and the tails.

    Reference: Birkhoff and Priver, Hermite interpolation errors for derivatives, J. Math. Phys. 46 (1967).
    """

    low: float
    step: float
    pieces: int
    coefficients: tuple[Tensor, ...]  # of t^0 .. t^3, [channels * pieces], t in [0, 1] on each piece
    turns: tuple[Tensor, Tensor]  # points where a cubic is level, and the values there, [k, channels]
    #: Bounds of the errors of f and f'', and of |f''''|; times exp(-v^2 / 4), with sup|f^(n)| replaced by Cramer's
    #: inequality; and what is left of all of them beyond the nodes.
    near: Float64[Tensor, "3 channels"]
    far: Float64[Tensor, "3 channels"]
    rest: Float64[Tensor, "3 channels"]
    span: tuple[float, float]  # of the dictionary
    unit: float
    channel: Int[Tensor, "n"]  # of the elements

    @classmethod
    def of(cls, f: Gaussians, *, coarser: int = 1) -> Table:
        """Tabulate, with ``coarser`` times fewer nodes; the table has no elements yet (see ``at``)."""
        span, reach = (float(f.dictionary.min()), float(f.dictionary.max())), REACH / f.unit
        low, high = span[0] - reach, span[1] + reach
        pieces = min(NODES, math.ceil((high - low) * f.unit * FINE / coarser))
        nodes = torch.linspace(low, high, pieces + 1, dtype=torch.float64, device=f.alpha.device)
        h = (high - low) / pieces
        y, d = f.derivative(0, nodes), f.derivative(1, nodes) * h
        (y0, y1), (d0, d1) = ((x[:, :-1], x[:, 1:]) for x in (y, d))
        cubic = (y0, d0, 3 * (y1 - y0) - 2 * d0 - d1, 2 * (y0 - y1) + d0 + d1)

        def limits(top: Callable[[int], Tensor]) -> Tensor:
            e0, e1, slip = f.rounding(0), f.rounding(1), 2.0**-50 * pieces * h
            error = h**4 / 384 * top(4) + e0 + h * e1 / 4 + slip * top(1) + 2.0**-48 * top(0)
            blur = h**2 / 12 * top(4) + (12 * e0 + 6 * h * e1) / h**2 + slip * top(3) + 2.0**-44 * top(2)
            return torch.stack([error, blur, top(4)]) * (1 + 1e-6)

        near, far = limits(lambda n: f.supremum(n, nodes)), limits(f.bound)
        rest = 3 * math.exp(-(REACH**2) / 4) * torch.stack([f.bound(0), f.bound(2), 0 * f.mass])
        flat = tuple(c.reshape(-1) for c in cubic)
        none = torch.zeros(0, dtype=torch.long, device=f.alpha.device)
        return cls(low, h, pieces, flat, _turns(low, h, cubic), near, far, rest, span, f.unit, none)

    def at(self, channel: Int[Tensor, "m"]) -> Table:
        """The table for elements of these channels."""
        return replace(self, channel=channel)

    def take(self, index: Int[Tensor, "m"]) -> Table:
        return self.at(self.channel[index])

    def values(self, s: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        t, (c0, c1, c2, c3) = self._piece(s)
        f = torch.addcmul(c2, c3, t).mul_(t).add_(c1).mul_(t).add_(c0)
        second = torch.addcmul(c2, c3, t, value=3).mul_(2 / self.step**2)
        lower, upper = torch.aminmax(s, dim=0)
        return f, second, self._limit(0, lower, upper), self._limit(1, lower, upper)

    def slope(self, s: Tensor) -> Tensor:
        t, (_, c1, c2, c3) = self._piece(s)
        return (c1 + t * (2 * c2 + 3 * t * c3)) / self.step

    def fourth(self, lower: Tensor, upper: Tensor) -> Tensor:
        return self._limit(2, lower, upper)

    def _limit(self, row: int, lower: Tensor, upper: Tensor) -> Tensor:
        """A row of the bounds, for s in [lower, upper]; pieces there may begin one step nearer to the dictionary."""
        away = torch.maximum(lower - self.span[1], self.span[0] - upper) - self.step
        v = away.clamp_(min=0).mul_(self.unit)
        far = v.square_().mul_(-0.25).exp_().mul_(self.far[row, self.channel])
        return torch.minimum(far, self.near[row, self.channel]).add_(self.rest[row, self.channel])

    def _piece(self, s: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The position of s in its piece, and the coefficients of that."""
        t = (s - self.low).mul_(1 / self.step).clamp_(0, self.pieces - 1e-9)
        piece = t.long()
        t -= piece
        index = (piece + self.channel * self.pieces).view(-1)
        return t, tuple(c.index_select(0, index).view(s.shape) for c in self.coefficients)

    def extremes(self, lower: Float64[Tensor, "n"], upper: Float64[Tensor, "n"]) -> tuple[Tensor, Tensor]:
        """Return [min, max] of f on [lower, upper], outward: the ends, and the extremes of the cubics inside."""
        ends = [self.values(end[None])[0][0] for end in (lower, upper)]
        low, up = torch.minimum(*ends), torch.maximum(*ends)
        for _, v, inside in self._inner(lower, upper):
            low, up = torch.where(inside, torch.minimum(low, v), low), torch.where(inside, torch.maximum(up, v), up)
        error = self._limit(0, lower, upper)
        return low - error, up + error

    def _inner(self, lower: Tensor, upper: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield turning points of every element with the values there, and whether they are in [lower, upper]."""
        for place, value in zip(*self.turns, strict=True):
            p, v = place[self.channel], value[self.channel]
            yield p, v, (lower <= p) & (p <= upper)


def _turns(low: float, step: float, cubic: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """Return the points [k, channels] where a cubic is level, with their values; NaN where a channel has fewer.

    A root is kept when it lies within 1e-6 of its piece, so that rounding loses none between two pieces; one too many
    is only one more value of f.
    """
    c0, c1, c2, c3 = cubic
    square = c2.square() - 3 * c1 * c3
    root = torch.sqrt(square.clamp(min=0))
    q = -(c2 + torch.where(c2 < 0, -root, root))
    t = torch.stack([q / (3 * c3), c1 / q])
    kept = (t > -1e-6) & (t < 1 + 1e-6) & (square >= -1e-12 * c2.square())
    t = t.clamp(0, 1)
    value = c0 + t * (c1 + t * (c2 + t * c3))
    place = low + step * (torch.arange(c0.shape[1], dtype=c0.dtype, device=c0.device) + t)
    place, value = (torch.where(kept, x, torch.nan).transpose(0, 1).flatten(1) for x in (place, value))
    place, order = place.sort(1)
    count = int(kept.sum((0, 2)).max())
    return place[:, :count].t().contiguous(), value.gather(1, order)[:, :count].t().contiguous()


KEPT = 64  # values at most, of some 100 KB each
_kept: OrderedDict[tuple[object, ...], Any] = OrderedDict()


def kept(make: Callable[[Gaussians], T], f: Gaussians) -> T:
    """Return ``make(f)``, made once for equal parameters: every proof traces its network anew."""
    numbers = (tuple(part.cpu().numpy().tobytes() for part in (f.alpha, f.dictionary)), f.gamma)
    key = (*numbers, f.alpha.shape, f.alpha.device, make)
    found = _kept.pop(key, None)
    _kept[key] = make(f) if found is None else found
    if len(_kept) > KEPT:
        _kept.popitem(last=False)
    return _kept[key]
