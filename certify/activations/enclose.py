"""Certified branch and bound on one-dimensional functions, batched over elements.

For f on a cell [p, q] of width h and any slope a, g(s) = f(s) - a s satisfies

    g(s) <= chord of g + 4 sag t (1 - t),   t = (s - p)/h,   sag = h^2/8 max(0, sup -f''),
    -f'' <= -(f''(p) + f''(q))/2 + h/2 sup|f'''|,

so a grid with that sag is a bound (where the chord is steeper than the parabola, the chord's end is), and splitting
the cells that decide the maximum converges like h^2 (the sag alone) or h^3 (where f is convex). A grid without the
sag is not a bound.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, fields

import torch
from jaxtyping import Float64, Int
from torch import Tensor

from certify.activations.base import middle_slope

CELLS = 16  # cells of the first grid
SPLIT = 4  # cells split per round, each into as many parts
ROUNDS = 14  # rounds at most; elements that have not converged by then are a little looser, never unsound
TOLERANCE = 5e-5  # accepted distance of a bound from an attained value, relative to max f - min f
SHARE = 0.01  # or, where the slope is ours to choose, relative to the mean distance of the line from f
CHUNK = 1 << 15  # elements handled at once, bounds the memory


class Curve(ABC):
    """n functions of one variable, twice differentiable between ``breakpoints``; everything is float64."""

    #: Points at which f may have a kink (between them |f'''| is bounded).
    breakpoints: tuple[float, ...] = ()

    @abstractmethod
    def values(self, s: Float64[Tensor, "k n"]) -> tuple[Tensor, Tensor, Tensor]:
        """Return f(s), f''(s) and a bound of the evaluation error of f(s), each [k, n]."""

    @abstractmethod
    def third(self, lower: Float64[Tensor, "k n"], upper: Float64[Tensor, "k n"]) -> Float64[Tensor, "k n"]:
        """Return a bound of |f'''| on [lower, upper], cells that hold no breakpoint inside."""

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
    sag_up: Tensor  # how far f can rise above its chord
    sag_down: Tensor  # how far f can fall below its chord
    noise: Tensor  # evaluation error of the values
    end: Tensor  # index of the cell that holds the right end

    @classmethod
    def between(cls, curve: Curve, points: Tensor, end: Tensor) -> _Cells:
        """Cells of consecutive ``points`` [k + 1, ..., n], flattened to [cells, n]."""
        k, n = len(points) - 1, points.shape[-1]
        f, second, error = (x.view(points.shape) for x in curve.values(points.reshape(-1, n)))
        p, q, fp, fq = (x.reshape(-1, n) for x in (points[:k], points[1:], f[:k], f[1:]))
        h = q - p
        bend = ((second[:k] + second[1:]) / 2).reshape(-1, n)
        noise = torch.maximum(error[:k], error[1:]).reshape(-1, n)
        spread = curve.third(p, q) * h / 2 * (1 + 1e-9) + 1e4 * noise
        sag = h.square() / 8 * (1 + 1e-12)
        up, down = (sag * (spread + side).clamp(min=0) for side in (-bend, bend))
        return cls(p, q, fp, fq, up, down, noise, end)

    def map(self, pick: Tensor) -> _Cells:
        """The cells of the elements ``pick``."""
        return _Cells(*(getattr(self, f.name)[..., pick] for f in fields(self)))

    def mirrored(self) -> _Cells:
        """The cells of -f."""
        return _Cells(self.p, self.q, -self.fp, -self.fq, self.sag_down, self.sag_up, self.noise, self.end)

    def ceiling(self, slope: Tensor) -> Tensor:
        """A bound of f(s) - slope s on every cell: the top of the parabola over the chord, or the chord's end."""
        gp, gq = self.fp - slope * self.p, self.fq - slope * self.q
        rise, sag = (gq - gp).abs(), self.sag_up
        inside = (gp + gq) / 2 + sag + rise * (rise / (16 * sag).clamp(min=1e-300))
        return torch.where(rise < 4 * sag, inside, torch.maximum(gp, gq)) + self.noise

    def vertices(self) -> tuple[Tensor, Tensor]:
        """Points and attained values; the first and last are the ends of the interval."""
        last = self.end[None]
        return torch.cat([self.p, self.q.gather(0, last)]), torch.cat([self.fp, self.fq.gather(0, last)])

    def split(self, curve: Curve, worst: Tensor) -> _Cells:
        """Split the cells ``worst`` [m, n] into SPLIT parts: the first stays in place, the others are appended."""
        p, q = self.p.gather(0, worst), self.q.gather(0, worst)
        steps = torch.linspace(0, 1, SPLIT + 1, dtype=p.dtype, device=p.device).view(-1, 1, 1)
        points = torch.where(steps == 1, q, p + (q - p) * steps)
        count, m = len(self.p), len(worst)
        parts = _Cells.between(curve, points, self.end)
        columns: list[Tensor] = []
        for field in fields(self)[:-1]:
            old, new = getattr(self, field.name), getattr(parts, field.name)
            columns.append(torch.cat([old.scatter(0, worst, new[:m]), new[m:]]))
        moved = worst == self.end  # the right end now lies in the last part of that cell
        place = count + (SPLIT - 2) * m + moved.long().argmax(0)
        columns.append(torch.where(moved.any(0), place, self.end))
        return _Cells(*columns)


def _grid(curve: Curve, lower: Tensor, upper: Tensor) -> Tensor:
    """Points from lower to upper [k + 1, n]: even in asinh(s), so that far tails cost few cells; kinks included."""
    a, b = torch.asinh(lower), torch.asinh(upper)
    t = torch.linspace(0, 1, CELLS + 1, dtype=lower.dtype, device=lower.device)[:, None]
    points = torch.sinh(a + (b - a) * t)
    points = torch.minimum(torch.maximum(points, lower), upper)
    points = torch.cat([lower[None], points[1:-1], upper[None]])
    if curve.breakpoints:
        kinks = torch.tensor(curve.breakpoints, dtype=lower.dtype, device=lower.device)[:, None]
        inside = torch.minimum(torch.maximum(kinks, lower), upper)
        points = torch.cat([points, inside]).sort(0).values
    return points


def _upper_line(curve: Curve, cells: _Cells, slope: Tensor | None, sign: float) -> tuple[Tensor, Tensor]:
    """Return (slope, offset) with f(s) <= slope s + offset on every cell; f is ``sign`` times the curve."""
    n = cells.p.shape[1]
    out_slope, out_offset = cells.p.new_zeros(n), cells.p.new_full((n,), torch.inf)
    todo = torch.arange(n, device=cells.p.device)
    for round_ in range(ROUNDS + 1):
        points, values = cells.vertices()
        a = middle_slope(points, values) if slope is None else slope
        a = a.float().double() if slope is None else a  # exact in either network dtype
        ceiling = cells.ceiling(a)
        top = ceiling.amax(0)
        attained = (values - a * points).amax(0)
        noise = 2.0**-50 * (values.abs().amax(0) + a.abs() * torch.maximum(points[0].abs(), points[-1].abs()))
        out_slope[todo], out_offset[todo] = a, top + noise
        span = values.amax(0) - values.amin(0)
        accepted = TOLERANCE * span + 4 * (noise + cells.noise.amax(0))
        if slope is None:
            accepted = torch.maximum(accepted, SHARE * (top - (values - a * points).mean(0)))
        converged = top - attained <= accepted
        rest = (~converged).nonzero()[:, 0]
        if round_ == ROUNDS or len(rest) == 0:
            return out_slope, out_offset
        todo, cells, curve = todo[rest], cells.map(rest), curve.take(rest)
        slope = None if slope is None else slope[rest]
        worst = ceiling[:, rest].topk(SPLIT, dim=0).indices
        cells = cells.split(curve, worst) if sign > 0 else cells.mirrored().split(curve, worst).mirrored()
    raise AssertionError("unreachable")


def certified_lines(
    curve: Curve,
    lower: Float64[Tensor, "n"],
    upper: Float64[Tensor, "n"],
    slopes: tuple[Tensor, Tensor] | None = None,
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Return (slope, offset) of a line below and of a line above each f on [lower, upper], all float64 [n].

    With ``slopes`` = (lower, upper) given, the offsets are the best for them; zeros give the range of f. Without,
    the lines are those of smallest area. Intervals that are not finite get infinite offsets. Sound because every
    cell's sag is added; within TOLERANCE of optimal where the branch and bound converged.
    """
    parts = [
        _chunk_lines(
            curve.take(torch.arange(i, min(i + CHUNK, len(lower)), device=lower.device)),
            lower[i : i + CHUNK],
            upper[i : i + CHUNK],
            None if slopes is None else (slopes[0][i : i + CHUNK], slopes[1][i : i + CHUNK]),
        )
        for i in range(0, len(lower), CHUNK)
    ]
    low_slope, low, up_slope, up = (torch.cat(column) for column in zip(*parts, strict=True))
    return (low_slope, low), (up_slope, up)


def _chunk_lines(
    curve: Curve, lower: Tensor, upper: Tensor, slopes: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    finite = (lower.abs() < 1e30) & (upper.abs() < 1e30) & (lower <= upper)
    lower, upper = torch.where(finite, lower, 0), torch.where(finite, upper, 0)
    points = _grid(curve, lower, upper)
    end = points.new_full((points.shape[1],), len(points) - 2, dtype=torch.long)
    cells = _Cells.between(curve, points, end)
    up_slope, up = _upper_line(curve, cells, None if slopes is None else slopes[1], 1.0)
    low_slope, low = _upper_line(curve, cells.mirrored(), None if slopes is None else -slopes[0], -1.0)
    return -low_slope, torch.where(finite, -low, -torch.inf), up_slope, torch.where(finite, up, torch.inf)
