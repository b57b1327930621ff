"""Largest moves inside an l1 or l2 ball cut by a box: water-filling, one sort per row.

Rows are [n, features] in float64: ``magnitude`` = |b| >= 0 of a linear function b, ``cap`` how far each coordinate may
move in its direction, ``radius`` [n]. Used by certify/sets.py alone.
"""

from __future__ import annotations

import torch
from torch import Tensor


def l2_scale(magnitude: Tensor, cap: Tensor, radius: Tensor) -> Tensor:
    """Return the t >= 0 with sum min(magnitude t, cap)^2 = radius^2 (inf if the caps are never exhausted)."""
    breaks = torch.where(magnitude > 0, cap / magnitude.clamp(min=1e-300), torch.inf)
    breaks, order = breaks.sort(1)
    b2, c2 = (v.gather(1, order).square() for v in (magnitude, cap))
    c2 = torch.where(torch.isinf(breaks), 0, c2)
    saturated = c2.cumsum(1) - c2  # caps of the coordinates whose break lies before this one
    free = b2.flip(1).cumsum(1).flip(1)
    t = ((radius.square()[:, None] - saturated).clamp(min=0) / free.clamp(min=1e-300)).sqrt()
    first = (t <= breaks).long().argmax(1, keepdim=True)
    found = (t <= breaks).any(1) & (free.gather(1, first)[:, 0] > 0)
    return torch.where(found, t.gather(1, first)[:, 0], torch.inf)


def l2_dual(magnitude: Tensor, cap: Tensor, radius: Tensor) -> Tensor:
    """Return max <b, d>, |d| <= cap, ||d||_2 <= radius, by its Lagrange dual: an upper bound for any multiplier."""
    t = l2_scale(magnitude.detach(), cap.detach(), radius)  # minimised over: no part in the derivative
    multiplier = torch.where(t > 0, 0.5 / t, 0)[:, None]
    step = torch.minimum(magnitude * t[:, None].nan_to_num(posinf=1e300), cap)
    boxed = (magnitude * cap).sum(1)
    dual = multiplier[:, 0] * radius.square() + (magnitude * step - multiplier * step.square()).sum(1)
    # t = 0 only for radius 0 or b = 0: the box alone bounds it then, with caps of the same size as the radius.
    return torch.where((t > 0) & torch.isfinite(dual), torch.minimum(dual, boxed), boxed)


def l1_dual(magnitude: Tensor, cap: Tensor, radius: Tensor) -> Tensor:
    """Return max <b, d>, |d| <= cap, ||d||_1 <= radius: the dual value at the knapsack's threshold."""
    values, order = magnitude.sort(1, descending=True)
    spent = cap.gather(1, order).cumsum(1)
    reached = spent >= radius[:, None]
    first = reached.long().argmax(1, keepdim=True)
    multiplier = torch.where(reached.any(1), values.gather(1, first)[:, 0], 0)
    return multiplier * radius + ((magnitude - multiplier[:, None]).clamp(min=0) * cap).sum(1)


def l1_shrink(magnitude: Tensor, cap: Tensor, radius: Tensor) -> Tensor:
    """Return the projection's steps min((magnitude - mu)+, cap) with sum <= radius, by bisection on mu."""
    low, high = torch.zeros_like(radius), magnitude.amax(1)
    inside = torch.minimum(magnitude, cap).sum(1) <= radius
    for _ in range(80):
        mu = (low + high) / 2
        fits = torch.minimum((magnitude - mu[:, None]).clamp(min=0), cap).sum(1) <= radius
        low, high = torch.where(fits, low, mu), torch.where(fits, mu, high)
    mu = torch.where(inside, 0, high)
    return torch.minimum((magnitude - mu[:, None]).clamp(min=0), cap)
