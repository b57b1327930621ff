"""Derivatives of certified values, by the envelope theorem.

The minimum over s in [l, u] of f(s) - a s is attained at some s*. Moving f, a, l or u a little changes it as if s*
stood still (f(s) - a s is level there) or moved with the end that it is. So a search runs without gradients, its value
stays the certified one, and its derivative is that of f(s*) - a s*.

Reference: J. Danskin, The Theory of Max-Min (1967).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from certify.enclosures import Interval, Relaxation

#: f, elementwise and differentiable (in its parameters too); or its values alone.
Function = Callable[[Tensor], Tensor]

POINTS = 49  # of the grid in which the points s* are looked for; then a finer one between two of them


def attach(value: Tensor, live: Tensor) -> Tensor:
    """Return ``value`` with the derivative of ``live``; none where that is not finite."""
    change = torch.where(torch.isfinite(live), live, 0)
    return value.detach() + (change - change.detach()).to(value.dtype)


def at_end(s: Float[Tensor, "*shape"], z: Interval) -> Float[Tensor, "*shape"]:
    """Return points of z that move with its ends where they stand on them, and stand still elsewhere."""
    return torch.where(s <= z.lower, z.lower, torch.where(s >= z.upper, z.upper, s))


def moving(
    f: Function, values: Function, z: Interval, r: Relaxation, slopes: tuple[Tensor, Tensor] | None
) -> Relaxation:
    """Return the certified lines ``r`` of f over z with their derivatives in f, in z and in the given ``slopes``.

    Slopes of the search's choice are those of the chord, of the tangent at the middle, or of the edge between the two
    points where the line touches f. ``values`` is f for [k, *shape] points, without derivatives.
    """
    known = torch.isfinite(z.lower) & torch.isfinite(z.upper)
    z = Interval(torch.where(known, z.lower, 0).double(), torch.where(known, z.upper, 0).double())
    middle = (z.lower + z.upper) / 2
    lines = []
    for i, sign in enumerate((-1.0, 1.0)):
        slope, offset = ((r.lower_slope, r.lower_offset), (r.upper_slope, r.upper_offset))[i]
        with torch.no_grad():
            left, right = (
                _top(lambda s: sign * (values(s) - slope.double() * s), *ends)  # noqa: B023 - called at once
                for ends in ((z.lower, middle), (middle, z.upper))
            )
            g = values(torch.stack([left, right])) - slope.double() * torch.stack([left, right])
            touch = torch.where(sign * g[0] >= sign * g[1], left, right)
        left, right, touch = (at_end(s, z) for s in (left, right, touch))
        if slopes is None:
            chosen = [_edge(f, z.lower, z.upper), _tangent(f, middle), _edge(f, left, right)]
            slope = attach(slope, _nearest(slope.double(), chosen))
        else:
            slope = slopes[i].to(slope.dtype).expand_as(slope)
        lines += [slope, attach(offset, f(touch) - slope.double() * touch)]
    return Relaxation(*lines)


def _top(g: Function, lower: Tensor, upper: Tensor) -> Tensor:
    """Where g is largest on [lower, upper], to the second order in the cells of a grid even in asinh, refined once."""
    a, b = torch.asinh(lower), torch.asinh(upper)
    t = torch.linspace(0, 1, POINTS, dtype=a.dtype, device=a.device).view(-1, *[1] * a.dim())
    s = torch.sinh(a + (b - a) * t)
    s[0], s[-1] = lower, upper
    for _ in range(2):
        v, i = g(s).max(0)
        near = [s.gather(0, (i + step).clamp(0, len(s) - 1)[None])[0] for step in (-1, 1)]
        best, s = s.gather(0, i[None])[0], near[0] + (near[1] - near[0]) * t[:: POINTS // 8]
    h = (near[1] - near[0]) / 2
    low, high = g(torch.stack(near))
    bend = 2 * v - low - high
    shift = h / 2 * torch.where(bend > 0, (high - low) / torch.where(bend > 0, bend, 1), 0)
    inner = (best > lower) & (best < upper)
    return torch.where(inner, best + shift.clamp(-h, h), best).clamp(lower, upper)


def _edge(f: Function, left: Tensor, right: Tensor) -> Tensor:
    run = right - left
    return (f(right) - f(left)) / torch.where(run > 0, run, torch.inf)


def _tangent(f: Function, s: Tensor) -> Tensor:
    """f'(s), differentiable."""
    s = s if s.requires_grad else s.detach().requires_grad_()
    return torch.autograd.grad(f(s).sum(), s, create_graph=True)[0]


def _nearest(slope: Tensor, chosen: list[Tensor]) -> Tensor:
    found = torch.stack(chosen)
    return found.gather(0, (found.detach() - slope).abs().argmin(0)[None])[0]
