"""Certified branch and bound on one-dimensional functions, batched over elements.

On a cell [p, q] of width h with t = (s - p) / h,

    |f(s) - chord(s) - 4 t (1 - t) sag| <= 4 t (1 - t) slack,
    sag = -h^2/8 (f''(p) + f''(q)) / 2,    slack = h^2/8 (|f''(q) - f''(p)| / 6 + h^2/8 sup|f''''|),

because f'' is within h^2/8 sup|f''''| of its chord, whose double integral is that parabola but for the 1/6. So the
top of the steeper parabola bounds f(s) - a s for any slope a, and splitting the cells that decide the maximum converges
like h^3. A grid without the slack is not a bound.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from dataclasses import dataclass, fields
from functools import cached_property

import torch
from jaxtyping import Float64, Int
from torch import Tensor

from certify.activations.base import middle_edge

CELLS = 12  # cells of the first grid, even: the middle of the interval is one of its points
SPLIT = 4  # cells split per round, each into as many parts
ROUNDS = 14  # rounds at most; elements that have not converged by then are a little looser, never unsound
TOLERANCE = 5e-5  # accepted distance of a bound from an attained value, relative to max f - min f,
SHARE = 0.001  # and relative to the mean distance of the line from f;
FLOAT32 = 1e-7  # but at least this much of max f - min f, for slopes are rounded to float32
CHUNK = 8192  # elements handled at once: a field of the first grid then stays in the cache


class Curve(ABC):
    """n functions of one variable, four times differentiable between ``breakpoints``; everything is float64."""

    #: Points at which f may have a kink (between them |f''''| is bounded).
    breakpoints: tuple[float, ...] = ()

    @abstractmethod
    def values(self, s: Float64[Tensor, "k n"]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return f(s) and f''(s), each [k, n], and for each a bound [n] of its evaluation error on these points.

        The second bound is at least 2^-45 |f''(s)|, which covers the rounding of what is computed from f''.
        """

    @abstractmethod
    def slope(self, s: Float64[Tensor, "n"]) -> Float64[Tensor, "n"]:
        """Return f'(s) approximately: it guides the search, no bound depends on it."""

    @abstractmethod
    def fourth(self, lower: Float64[Tensor, "k n"], upper: Float64[Tensor, "k n"]) -> Float64[Tensor, "#k n"]:
        """Return a bound of |f''''| on [lower, upper], cells that hold no breakpoint inside."""

    def take(self, index: Int[Tensor, "m"]) -> Curve:
        """Return the functions of the elements ``index``."""
        return self


@dataclass(frozen=True, eq=False)
class _Cells:
    """Cells [p, q] of n functions; every vertex is the p of one cell, but for the right end of all."""

    p: Tensor
    q: Tensor
    fp: Tensor
    fq: Tensor
    rise: Tensor  # sag + slack: how far f can rise above its chord
    slack: Tensor
    right: Tensor  # [n], the right end
    f_right: Tensor
    noise: Tensor  # [n], evaluation error of the values

    @classmethod
    def between(cls, curve: Curve, points: Tensor, sign: float = 1.0) -> _Cells:
        """Cells of consecutive ``points`` [k + 1, ..., n], flattened to [cells, n], for ``sign`` times the curve."""
        k = len(points) - 1
        f, second, noise, blur = curve.values(points.flatten(0, -2))
        f, second = sign * f.view(points.shape), sign * second.view(points.shape)
        p, q, fp, fq, bp, bq = (x.flatten(0, -2) for y in (points, f, second) for x in (y[:k], y[1:]))
        area = (q - p).square_().mul_(0.125 * (1 + 1e-12))
        slack = (bq - bp).abs_().mul_(1 / 6).addcmul_(area, curve.fourth(p, q)).mul_(1 + 1e-9).add_(blur).mul_(area)
        rise = torch.addcmul(slack, area, bp + bq, value=-0.5)
        return cls(p, q, fp, fq, rise, slack, q[-1], fq[-1], noise)

    def pick(self, index: Tensor) -> _Cells:
        """The cells of the elements ``index``."""
        return _Cells(*(getattr(self, f.name).index_select(-1, index) for f in fields(self)))

    def mirrored(self) -> _Cells:
        """The cells of -f."""
        fall = 2 * self.slack - self.rise
        return _Cells(self.p, self.q, -self.fp, -self.fq, fall, self.slack, self.right, -self.f_right, self.noise)

    def vertices(self) -> tuple[Tensor, Tensor]:
        """Points and attained values; the first and last are the ends of the interval."""
        return torch.cat([self.p, self.right[None]]), torch.cat([self.fp, self.f_right[None]])

    @cached_property
    def middle(self) -> Tensor:
        """The middle of the interval."""
        return (self.p[0] + self.right) / 2

    @cached_property
    def span(self) -> Tensor:
        """max f - min f over the vertices."""
        low, high = torch.aminmax(self.fp, dim=0)
        return torch.maximum(high, self.f_right) - torch.minimum(low, self.f_right)

    @cached_property
    def size(self) -> Tensor:
        """max |f| over the vertices."""
        return torch.maximum(self.fp.abs().amax(0), self.f_right.abs())

    def ceiling(self, slope: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return what bounds g(s) = f(s) - slope s on every cell; an attained value of g, and its mean."""
        gp, gq = torch.addcmul(self.fp, self.p, slope, value=-1), torch.addcmul(self.fq, self.q, slope, value=-1)
        mean, end = gp.mean(0), torch.maximum(gp, gq)
        # max over t of gp + (gq - gp) t + 4 t (1 - t) rise, in a form without cases
        over = gq.sub_(gp).abs_().mul_(-0.25).add_(self.rise).clamp_(min=0)
        ceiling = over.square_().div_(self.rise.clamp(min=1e-300)).add_(end)
        attained = torch.maximum(end.amax(0), torch.sub(ceiling, self.slack, alpha=2).amax(0))
        return ceiling, attained, mean

    def split(self, curve: Curve, worst: Tensor, sign: float) -> _Cells:
        """Split the cells ``worst`` [m, n] into SPLIT parts: the first stays in place, the others are appended."""
        p, q = self.p.gather(0, worst), self.q.gather(0, worst)
        steps = torch.linspace(0, 1, SPLIT + 1, dtype=p.dtype, device=p.device).view(-1, 1, 1)
        parts = _Cells.between(curve, torch.where(steps == 1, q, p + (q - p) * steps), sign)
        m = len(worst)
        columns = []
        for field in fields(self)[:6]:
            old, new = getattr(self, field.name), getattr(parts, field.name)
            columns.append(torch.cat([old.scatter(0, worst, new[:m]), new[m:]]))
        columns += [self.right, self.f_right, torch.maximum(self.noise, parts.noise)]
        return _Cells(*columns)


def _grid(curve: Curve, lower: Tensor, upper: Tensor) -> Tensor:
    """Points from lower to upper [k + 1, n]: even in asinh(s), so that far tails cost few cells; middle and kinks."""
    middle = (lower + upper) / 2
    a, m, b = torch.asinh(lower), torch.asinh(middle), torch.asinh(upper)
    t = torch.linspace(0, 1, CELLS // 2 + 1, dtype=lower.dtype, device=lower.device)[1:-1, None]
    left, right = torch.sinh(a + (m - a) * t), torch.sinh(m + (b - m) * t)
    kinks = [torch.minimum(upper, lower.clamp(min=kink)) for kink in curve.breakpoints]
    points = torch.cat([left, middle[None], right])
    points = torch.minimum(torch.maximum(points, lower), upper)
    points = torch.cat([lower[None], points, *(kink[None] for kink in kinks), upper[None]])
    return points.sort(0).values if kinks else points


def _middle(curve: Curve, cells: _Cells, sign: float) -> tuple[Tensor, Tensor]:
    """f and f' at the middle of the interval, for f = ``sign`` times the curve."""
    return sign * curve.values(cells.middle[None])[0][0], sign * curve.slope(cells.middle)


def _search(cells: _Cells, f: Tensor, tangent: Tensor) -> tuple[Tensor, Tensor]:
    """Return the slope of the line above the vertices with the least area, and a height.

    No line above f is lower than that height at the middle of the interval, and the lowest one there has the least
    area: the edge of the concave hull. Where the middle is a vertex of the hull, the slope is that of the tangent,
    moved between the edges on its left and right.
    """
    s, v = cells.vertices()
    slope, height = middle_edge(s, v)
    run = s - cells.middle
    edges = (v - f) / torch.where(run == 0, 1, run)
    left, right = torch.where(run < 0, edges, torch.inf).amin(0), torch.where(run > 0, edges, -torch.inf).amax(0)
    return _representable(torch.where(height > f, slope, tangent.clamp(right, left))), torch.maximum(height, f)


def _offset(cells: _Cells, slope: Tensor, height: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Return the least offset that the ceilings allow for a line of that slope, one that no line of its kind beats,
    and whether they are close. The kind: lines of that slope, or all lines above f if ``height`` bounds those.
    """
    ceiling, attained, mean = cells.ceiling(slope)
    top = ceiling.amax(0)
    noise = cells.noise + 2.0**-50 * (cells.size + slope.abs() * torch.maximum(cells.p[0].abs(), cells.right.abs()))
    if height is not None:
        attained = height - slope * cells.middle
    accepted = torch.minimum(SHARE * (top - mean), TOLERANCE * cells.span) + FLOAT32 * cells.span + 4 * noise
    return top + noise, attained, top - attained <= accepted


def _burden(cells: _Cells, slope: Tensor, offset: Tensor) -> Tensor:
    """The mean distance of a line from f, up to a constant, plus half the larger one at the ends of the interval."""
    ends = [offset + slope * s - f for s, f in ((cells.p[0], cells.fp[0]), (cells.right, cells.f_right))]
    return offset + slope * cells.middle + torch.maximum(*ends) / 2


def _representable(slope: Tensor) -> Tensor:
    """A slope of our choice, exact in either network dtype."""
    return slope.float().double()


def _guess(cells: _Cells, f: Tensor, tangent: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Return lines above the cells (slope, and what ``_offset`` says of it): of least area, and parallel to the chord.

    The first has f at the middle on it as a tangent, or is the chord if that is higher there; else it is searched for.
    """
    run, middle = cells.right - cells.p[0], (cells.fp[0] + cells.f_right) / 2
    chord = _representable((cells.f_right - cells.fp[0]) / torch.where(run > 0, run, 1))
    slope = torch.where(middle >= f, chord, _representable(tangent))
    area = slope, *_offset(cells, slope, torch.maximum(middle, f))
    hard = (~area[-1]).nonzero()[:, 0]
    mine = cells.pick(hard)
    slope, height = _search(mine, f[hard], tangent[hard])
    for old, new in zip(area, (slope, *_offset(mine, slope, height)), strict=True):
        old[hard] = new
    return area, (chord, *_offset(cells, chord))


def _first(
    curve: Curve, lower: Tensor, upper: Tensor, slopes: Float64[Tensor, "2 k n"] | None, least_area: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return from one grid, [2, k, n] for lines above -f and above f: slopes, offsets, whether these are good enough,
    and whether the slopes are settled, as given ones are and those of chords.
    """
    cells = _Cells.between(curve, _grid(curve, lower, upper))
    found = []
    for side, sign, mine in ((0, -1.0, cells.mirrored()), (1, 1.0, cells)):
        if slopes is None:
            area, chord = _guess(mine, *_middle(curve, mine, sign))
            settled = _burden(mine, chord[0], chord[2]) < _burden(mine, area[0], area[2])
            settled = torch.zeros_like(settled) if least_area else settled
            slope, offset, _, done = (torch.where(settled, *pair)[None] for pair in zip(chord, area, strict=True))
            found.append((slope, offset, done, settled[None]))
        else:
            offsets, _, done = (torch.stack(x) for x in zip(*(_offset(mine, a) for a in slopes[side]), strict=True))
            found.append((slopes[side], offsets, done, torch.ones_like(done)))
    slope, offset, done, settled = (torch.stack(column) for column in zip(*found, strict=True))
    return slope, offset, done, settled


def _refine(
    curve: Curve, ends: tuple[Tensor, Tensor], slope: Tensor, offset: Tensor, sign: float, settled: bool
) -> None:
    """Improve the offsets of lines above ``sign`` times the curve in place, and the slopes unless they are settled."""
    cells, height = _Cells.between(curve, _grid(curve, *ends), sign), None
    middle, rest = _middle(curve, cells, sign), torch.arange(len(slope), device=slope.device)
    trial = slope if settled else _search(cells, *middle)[0]
    for _ in range(ROUNDS):
        cells = cells.split(curve, cells.ceiling(trial)[0].topk(SPLIT, dim=0).indices, sign)
        if not settled:
            trial, height = _search(cells, *middle)
        bound, _, done = _offset(cells, trial, height)
        better = bound + trial * cells.middle < offset[rest] + slope[rest] * cells.middle
        slope[rest[better]], offset[rest[better]] = trial[better], bound[better]
        left = (~done).nonzero()[:, 0]
        if len(left) == 0:
            break
        cells, curve, rest, trial = cells.pick(left), curve.take(left), rest[left], trial[left]
        middle = middle[0][left], middle[1][left]


def certified_lines(
    curve: Curve,
    lower: Float64[Tensor, "n"],
    upper: Float64[Tensor, "n"],
    slopes: tuple[Tensor, Tensor] | None = None,
    *,
    least_area: bool = False,
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Return (slope, offset) of k lines below and of k lines above each f on [lower, upper], all float64 [k, n].

    With ``slopes`` = (lower, upper) given, each [k, n], the offsets are the best for them; zeros give the range of f.
    Without, k is 1 and a line is that of smallest area or, unless ``least_area`` is asked for, the one parallel to the
    chord where that is nearer to f in the mean and at the worse end (``_burden``). Intervals that are not finite get
    infinite offsets.
    Sound because every cell's slack is added; close to optimal where the branch and bound converged (see the head).
    """
    finite = (lower.abs() < 1e30) & (upper.abs() < 1e30) & (lower <= upper)
    lower, upper = torch.where(finite, lower, 0), torch.where(finite, upper, 0)
    given = None if slopes is None else torch.stack([-slopes[0], slopes[1]])
    chunks = torch.arange(len(lower), device=lower.device).split(CHUNK)
    found = [
        _first(curve.take(i), lower[i], upper[i], None if given is None else given[..., i], least_area) for i in chunks
    ]
    slope, offset, done, settled = (torch.cat(column, -1) for column in zip(*found, strict=True))
    for side, kind in itertools.product((0, 1), (False, True)):
        for rest in (~done[side] & (settled[side] == kind)).nonzero().split(CHUNK):
            k, i = rest.unbind(1)
            part = slope[side, k, i], offset[side, k, i]
            _refine(curve.take(i), (lower[i], upper[i]), *part, 2.0 * side - 1, kind)
            slope[side, k, i], offset[side, k, i] = part
    offset = torch.where(finite, offset, torch.inf)
    return (-slope[0], -offset[0]), (slope[1], offset[1])
