"""Certified ranges of the derivatives of a sum of Gaussians, by branch and bound on where they turn.

g = f^(n) has its extremes over [l, u] at l, at u, or at a point between where g' = 0. All such points are found, once
per channel, in cells of width h that cover the line. With T >= sup |g'''| on a cell,

    no zero of g'        if g' has one sign at both ends and min |g'| > h^2/8 T;
    at most one zero t   if |g''(middle)| - h/2 T = c > 0; for every t0 in the cell |t - t0| <= |g'(t0)| / c = r
                         and |g(t) - g(t0)| <= |g'(t0)| r, as |g'| falls from t0 to t;
    otherwise            |g - g(middle)| <= h/2 (max |g'| at the ends + h^2/8 T) on the cell: small, or it is split.

Newton's method moves t0 until |g'(t0)| is rounding error, which every inequality above includes: ranges are attained
up to rounding, by values of g and not by those of a table.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields

import torch
from jaxtyping import Float64, Int
from torch import Tensor

from certify.rounding import gamma as gamma_n
from models.kaf_table import REACH, Gaussians, hermite

CELLS = 12  # cells of the first grid per unit of v = s sqrt(2 gamma)
MOST = 1 << 20  # cells at most: dictionaries that are long compared with their kernels get wider ones
SPLIT = 4  # parts of a cell that is split
ROUNDS = 10  # of splitting; then a cell is taken as it is, a little looser
STEPS = 4  # of Newton's method, from the secant's zero in a cell in which g'' hardly varies
FLAT = 1e-10  # a cell is not split where g varies by less than this, relative to its value there
BLOCK = 1 << 16  # numbers in a block of scratch memory
OUT = 1 + 1e-9  # outward: more than what a few operations round


@dataclass(frozen=True, eq=False)
class Extremes:
    """low <= g <= up over each interval, and points of it where g is within rounding of them; float64."""

    low: Float64[Tensor, "n"]
    up: Float64[Tensor, "n"]
    least: Float64[Tensor, "n"]
    most: Float64[Tensor, "n"]


@dataclass(frozen=True, eq=False)
class Turns:
    """Where g = f^(order) may have extremes, sorted by channel: g(t) is in [low, up] for every turn t in [left, right].

    ``place`` is a point there, ``first`` and ``count`` are each channel's part of the list. Beyond the ``span`` of the
    grid |g| <= ``tail`` [channels].
    """

    f: Gaussians
    order: int
    span: tuple[float, float]
    tail: Tensor
    first: Tensor
    count: Tensor
    left: Tensor
    right: Tensor
    low: Tensor
    up: Tensor
    place: Tensor

    @classmethod
    def of(cls, f: Gaussians, order: int) -> Turns:
        """Find the turns of all channels, some at a time: scratch memory does not grow with their number."""
        reach, device = REACH / f.unit, f.alpha.device
        low, high = float(f.dictionary.min()) - reach, float(f.dictionary.max()) + reach
        count = min(MOST, math.ceil((high - low) * f.unit * CELLS))
        grid = _Grid(f, order, torch.linspace(low, high, count + 1, dtype=torch.float64, device=device))
        every = torch.arange(len(f.alpha), device=device)
        found = [_turns(f, order, grid.cells(part)) for part in every.split(max(1, 4 * BLOCK // count))]
        channel, *columns = (torch.cat(column) for column in zip(*found, strict=True))
        rank, per_channel = channel.argsort(stable=True), channel.bincount(minlength=len(every))
        tail = f.bound(order) * math.exp(-(REACH**2) / 4)
        first = per_channel.cumsum(0) - per_channel
        return cls(f, order, (low, high), tail, first, per_channel, *(column[rank] for column in columns))

    def extremes(self, lower: Float64[Tensor, "n"], upper: Float64[Tensor, "n"], channel: Int[Tensor, "n"]) -> Extremes:
        """Return the range of g on [lower, upper], outward; ends that are infinite or NaN are no limits."""
        lower, upper = lower.nan_to_num(nan=-torch.inf), upper.nan_to_num(nan=torch.inf)
        ends = lower.clamp(*self.span), upper.clamp(*self.span)
        first, last = (evaluate(self.f, (self.order,), end, channel)[0] for end in ends)
        slip, slack = (errors(self.f, self.order, end, channel) for end in ends)
        low, up = torch.minimum(first - slip, last - slack), torch.maximum(first + slip, last + slack)
        least, most = (torch.where(chosen, *ends) for chosen in (first <= last, first >= last))
        outside = (lower < self.span[0]) | (upper > self.span[1])
        tail = torch.where(outside, self.tail[channel], 0)
        low, up = (
            torch.where(outside, torch.minimum(low, -tail), low),
            torch.where(outside, torch.maximum(up, tail), up),
        )
        for turn, live in self._turns(channel):
            met = (self.left[turn] <= upper[live]) & (self.right[turn] >= lower[live])
            turn, mine = turn[met], live[met]
            place = torch.minimum(torch.maximum(self.place[turn], lower[mine]), upper[mine])
            below, above = self.low[turn] < low[mine], self.up[turn] > up[mine]
            least[mine[below]], most[mine[above]] = place[below], place[above]
            low[mine[below]], up[mine[above]] = self.low[turn[below]], self.up[turn[above]]
        return Extremes(low, up, least, most)

    def _turns(self, channel: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the k-th turn of every element that has one, with that element, for all k."""
        live = torch.arange(len(channel), device=channel.device)
        first, count = self.first[channel], self.count[channel]
        for k in range(int(count.max()) if len(channel) else 0):
            live = live[count[live] > k]
            yield first[live] + k, live


@dataclass(frozen=True, eq=False)
class _Cells:
    """Cells [p, q] with g' at their ends, bounds of the errors of g, g', g'' [3, k], and a bound of |g'''|; all [k]."""

    channel: Tensor
    p: Tensor
    q: Tensor
    at_p: Tensor
    at_q: Tensor
    noise: Tensor
    third: Tensor

    def __getitem__(self, index: Tensor) -> _Cells:
        return _Cells(*(getattr(self, f.name)[..., index] for f in fields(self)))

    @property
    def h(self) -> Tensor:
        """Width."""
        return self.q - self.p

    @property
    def bend(self) -> Tensor:
        """How far g' can be from the chord of its computed values."""
        return self.h.square() * self.third * (OUT / 8) + self.noise[1]

    @property
    def same(self) -> Tensor:
        """Where g' certainly has one sign at both ends."""
        return (self.at_p.sign() == self.at_q.sign()) & (self._least > self.noise[1])

    @property
    def clear(self) -> Tensor:
        """Where g' has no zero."""
        return self.same & (self._least > self.bend)

    @property
    def _least(self) -> Tensor:
        return torch.minimum(self.at_p.abs(), self.at_q.abs())

    def split(self, f: Gaussians, order: int) -> _Cells:
        """Every cell in SPLIT parts; g' is f^(order)."""
        steps = torch.linspace(0, 1, SPLIT + 1, dtype=self.p.dtype, device=self.p.device)[1:-1, None]
        inner = (self.p + self.h * steps).flatten()
        (values,) = evaluate(f, (order,), inner, self.channel.repeat(SPLIT - 1))
        points = torch.cat([self.p, inner, self.q]).view(SPLIT + 1, -1)
        values = torch.cat([self.at_p, values, self.at_q]).view(SPLIT + 1, -1)
        p, q, at_p, at_q = (x.flatten() for x in (points[:-1], points[1:], values[:-1], values[1:]))
        return _Cells(
            self.channel.repeat(SPLIT), p, q, at_p, at_q, self.noise.repeat(1, SPLIT), self.third.repeat(SPLIT)
        )


class _Grid:
    """What channels share, term by term: g' and g''' on the nodes, bounds of errors and derivatives between them."""

    def __init__(self, f: Gaussians, order: int, nodes: Float64[Tensor, "m"]) -> None:
        self.f, self.nodes = f, nodes
        self.bow = (float(nodes[1] - nodes[0]) * OUT) ** 2 / 8
        v = (nodes - f.dictionary[:, None]) * f.unit
        decay = torch.exp(v.square() * -0.5)
        self.first, self.third = (hermite(order + n, v) * decay * (-f.unit) ** (order + n) for n in (1, 3))
        middle, half = ((v[:, 1:] + v[:, :-1]) / 2).abs(), float(nodes[1] - nodes[0]) / 2 * f.unit * OUT
        near, far = (middle - half).clamp(min=0), middle + half
        self.errors = [_error_terms(f, order + n, near, far) for n in range(4)]
        self.fifth = _steepest_terms(order + 5, near) * f.unit ** (order + 5)

    def cells(self, channels: Tensor) -> _Cells:
        """The cells of some channels in which g' may have a zero."""
        alpha = self.f.alpha[channels]
        first, third = alpha @ self.first, (alpha @ self.third).abs()
        between = alpha.abs() @ (self.fifth * self.bow + self.errors[3])
        top = torch.maximum(third[:, 1:], third[:, :-1]) + between
        least = torch.minimum(first[:, 1:].abs(), first[:, :-1].abs())
        clear = (least > top * self.bow * OUT + alpha.abs() @ (self.errors[1] * OUT)) & (
            first[:, 1:].sign() == first[:, :-1].sign()
        )
        clear |= self.f.mass[channels, None] == 0  # a channel without any mass is 0: it turns nowhere
        row, column = (~clear).nonzero(as_tuple=True)
        size = alpha[row].abs()
        noise = torch.stack([(size * part.t()[column]).sum(1) for part in self.errors[:3]]) * OUT + 1e-300
        ends = self.nodes[column], self.nodes[column + 1], first[row, column], first[row, column + 1]
        return _Cells(channels[row], *ends, noise, top[row, column] * OUT + 1e-300)


def evaluate(
    f: Gaussians, orders: tuple[int, ...], s: Float64[Tensor, "n"], channel: Int[Tensor, "n"]
) -> list[Float64[Tensor, "n"]]:
    """Return f^(n)(s) of each element's channel for n in ``orders``."""
    found = [torch.empty_like(s) for _ in orders]
    for part in _blocks(f, s):
        v = (s[part, None] - f.dictionary).mul_(f.unit)
        weight = v.square().mul_(-0.5).exp_().mul_(f.alpha[channel[part]])
        for n, value in zip(orders, found, strict=True):
            value[part] = (hermite(n, v) * weight).sum(1) * (-f.unit) ** n
    return found


def errors(f: Gaussians, order: int, s: Float64[Tensor, "n"], channel: Int[Tensor, "n"]) -> Float64[Tensor, "n"]:
    """Return a bound of the error of what ``evaluate`` returns for f^(order)(s)."""
    found = torch.empty_like(s)
    for part in _blocks(f, s):
        v = (s[part, None] - f.dictionary).abs().mul_(f.unit)
        found[part] = (_error_terms(f, order, v, v) * f.alpha[channel[part]].abs()).sum(1)
    return found * OUT + 1e-300


def _blocks(f: Gaussians, s: Tensor) -> Iterator[slice]:
    size = max(1, BLOCK // len(f.dictionary))
    return (slice(start, start + size) for start in range(0, len(s), size))


def _error_terms(f: Gaussians, n: int, near: Tensor, far: Tensor) -> Tensor:
    """Return e >= 0 such that the sum of |alpha| e over the dictionary bounds the evaluation error of f^(n).

    For near <= |v| <= far. v is off by 3 u |v|, so a term He_n(v) exp(-v^2/2), whose derivative is minus its
    successor, by less than 3 u (v^2 + n) P_n(|v|) exp(-v^2/2), P_n being He_n with positive coefficients; to these
    come 3 n u P_n from the recurrence, (v^2 + 5) u from exp and its argument, (2 n + 2) u from the factors, D u from
    the sum: less than (D + 8 n + 12) u (v^2 + 1) P_n exp(-v^2/2) in all.
    """
    terms = gamma_n(len(f.dictionary) + 8 * n + 12, torch.float64) * OUT * f.unit**n
    return hermite(n, far, 1.0) * (far.square() + 1) * torch.exp(near.square() * -0.5) * terms


def _steepest_terms(n: int, v: Float64[Tensor, "*shape"]) -> Float64[Tensor, "*shape"]:
    """Return a bound of |He_n(w)| exp(-w^2/2) for all |w| >= v >= 0: Cramer's, or the value at v where it falls.

    It falls beyond the zeros of He_{n+1}, which are below sqrt(4 n + 6) (Szego, Orthogonal Polynomials, 6.32).
    """
    cramer = 1.0865 * math.sqrt(math.factorial(n)) * torch.exp(v.square() * -0.25)
    own = hermite(n, v).abs() * torch.exp(v.square() * -0.5)
    return torch.where(v >= math.sqrt(4 * n + 6), torch.minimum(own, cramer), cramer) * OUT + 1e-300


#: What is known of some turns: channel, left, right, low, up, place.
_Found = tuple[Tensor, ...]


def _turns(f: Gaussians, order: int, cells: _Cells) -> _Found:
    """Branch and bound on the cells in which g' may have a zero."""
    found: list[_Found] = []
    for step in range(ROUNDS + 1):
        middle = cells.p + cells.h / 2
        value, second = evaluate(f, (order, order + 2), middle, cells.channel)
        steep = second.abs() - cells.noise[2] - cells.h * cells.third * (OUT / 2)
        single = steep > second.abs() / 2  # not only above 0, so that Newton's method converges
        crossing = single & ~cells.same
        found.append(_newton(f, order, cells[crossing], steep[crossing]))
        change = (torch.maximum(cells.at_p.abs(), cells.at_q.abs()) + cells.bend) * cells.h * (OUT / 2)
        slack = change + cells.noise[0]
        flat = ~single & ((change <= FLAT * value.abs() + cells.noise[0]) | (step == ROUNDS))
        found.append(tuple(x[flat] for x in (cells.channel, cells.p, cells.q, value - slack, value + slack, middle)))
        cells = cells[~single & ~flat]
        if len(cells.p) == 0:
            break
        cells = cells.split(f, order + 1)
        cells = cells[~cells.clear]
    return tuple(torch.cat(column) for column in zip(*found, strict=True))


def _newton(f: Gaussians, order: int, cells: _Cells, steep: Tensor) -> _Found:
    """The only zero of g' in each cell, where |g''| >= ``steep``."""
    run = cells.at_q - cells.at_p
    t = cells.p + cells.h * (-cells.at_p / torch.where(run == 0, 1, run)).clamp(0, 1)
    for _ in range(STEPS):
        first, second = evaluate(f, (order + 1, order + 2), t, cells.channel)
        t = torch.minimum(torch.maximum(t - first / second, cells.p), cells.q)
    value, first = evaluate(f, (order, order + 1), t, cells.channel)
    left = (first.abs() + cells.noise[1]) * OUT
    radius = left / steep * OUT + 1e-300
    slack = left * radius * OUT + cells.noise[0]
    return cells.channel, t - radius, t + radius, value - slack, value + slack, t


def slopes(f: Gaussians) -> Turns:
    """Where f' turns."""
    return Turns.of(f, 1)


def curvatures(f: Gaussians) -> Turns:
    """Where f'' turns."""
    return Turns.of(f, 2)
