"""The sum of Gaussians by powers (models/plan.py), forward and backward, on elements x [n, c, s].

Eager code runs through blocks of x that stay in the cache. Fused code (models/fusion.py) and
code under torch.compile runs the same formulas as pure functions.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import reduce

import torch
from jaxtyping import Float
from torch import Tensor

from models.plan import Plan

#: Elements of x worked on at once: six scratch blocks of this many float32 numbers are three megabytes.
BLOCK = {"cpu": 2**17, "cuda": 2**24}

Groups = tuple[tuple[int, int, int], ...]
Terms = Float[Tensor, "size parameters 1"]


def values(x: Float[Tensor, "n c s"], terms: Terms, plan: Plan) -> Float[Tensor, "n c s"]:
    """Return sum_j terms[j] E t^j, block by block; ``terms`` are alpha_j c_j."""
    out = torch.empty_like(x)
    minus_gamma, kappa, reach, *centres = plan.floats
    for rows, columns, places in blocks(x):
        part, y = x[rows, columns, places], out[rows, columns, places]
        weights = terms[:, columns] if terms.shape[1] > 1 else terms
        u, e, t, p = (torch.empty_like(part) for _ in range(4))
        for at, (centre, (first, middle, end)) in enumerate(zip(centres, plan.groups, strict=True)):
            torch.sub(part, centre, out=u).clamp_(-reach, reach)
            torch.mul(u, minus_gamma, out=e).mul_(u).exp_()
            torch.mul(u, kappa, out=t).exp_()
            _horner(p, t, weights, range(end - 1, middle, -1))
            p.add_(weights[middle]) if end - 1 == middle else torch.addcmul(weights[middle], p, t, out=p)
            if first < middle:
                p.addcmul_(_horner(u, t.reciprocal_(), weights, range(first, middle)), t)
            torch.mul(p, e, out=y) if at == 0 else y.addcmul_(p, e)
    return out


def _horner(p: Tensor, t: Tensor, weights: Tensor, order: range) -> Tensor:
    """Write w_a + t (w_b + t (...)) to p, the last of ``order`` being a; 0 for none."""
    if len(order) == 0:
        return p.zero_()
    if len(order) == 1:
        return p.copy_(weights[order[0]])
    torch.mul(t, weights[order[0]], out=p).add_(weights[order[1]])
    for j in order[2:]:
        torch.addcmul(weights[j], p, t, out=p)
    return p


def pull_back(
    grad: Float[Tensor, "n c s"], x: Float[Tensor, "n c s"], terms: Terms, plan: Plan
) -> tuple[Float[Tensor, "n c s"], Float[Tensor, "size c"]]:
    """Return the gradient in x, and the sums of grad E t^j over n and s, block by block in a fixed order.

    With w_j = grad E t^j and u = s - c the derivative is sum_j (2 gamma h j - 2 gamma u) terms[j] w_j.
    """
    dx, sums = torch.empty_like(x), x.new_zeros(len(terms), x.shape[1])
    minus_gamma, kappa, reach, *centres = plan.floats
    slopes = terms * plan.lean[:, None, None]
    for rows, columns, places in blocks(x):
        part, g, out = (value[rows, columns, places] for value in (x, grad, dx))
        a, b = ((v[:, columns] if v.shape[1] > 1 else v) for v in (terms, slopes))
        u, w, t, v, s, r = (torch.empty_like(part) for _ in range(6))
        for at, (centre, (first, middle, end)) in enumerate(zip(centres, plan.groups, strict=True)):
            torch.sub(part, centre, out=u).clamp_(-reach, reach)
            torch.mul(u, minus_gamma, out=w).mul_(u).exp_().mul_(g)
            torch.mul(u, kappa, out=t).exp_()
            torch.mul(w, a[middle], out=s)
            sums[middle, columns] += w.sum((0, 2))
            r.zero_()
            for order in (range(middle + 1, end), range(middle - 1, first - 1, -1)):
                for j in order:
                    torch.mul(w if abs(j - middle) == 1 else v, t, out=v)
                    sums[j, columns] += v.sum((0, 2))
                    s.addcmul_(v, a[j])
                    r.addcmul_(v, b[j])
                t.reciprocal_()
            r.addcmul_(s, u, value=2 * minus_gamma)
            out.copy_(r) if at == 0 else out.add_(r)
    return dx, sums


def blocks(x: Float[Tensor, "n c s"]) -> Iterator[tuple[slice, slice, slice]]:
    """Cut x in pieces that fit the cache: whole rows if one does, else whole places or whole channels of a row."""
    n, c, s = x.shape
    most = BLOCK.get(x.device.type, BLOCK["cpu"])
    columns = max(1, min(c, most // max(1, s)))
    places = s if columns < c or c * s <= most else max(1, most // columns)
    rows = max(1, most // max(1, columns * places)) if (columns, places) == (c, s) else 1
    for row in range(0, n, rows):
        for column in range(0, c, columns):
            for place in range(0, s, places):
                yield slice(row, row + rows), slice(column, column + columns), slice(place, place + places)


def values_pure(x: Tensor, terms: Tensor, numbers: Tensor, groups: Groups) -> Tensor:
    """``values`` as one expression, for a compiler to fuse."""
    found = []
    for at, (first, middle, end) in enumerate(groups):
        _, e, t = _powers(x, numbers, at)
        p = terms[middle] + _polynomial(terms, range(end - 1, middle, -1), t)
        found.append(e * (p + _polynomial(terms, range(first, middle), 1 / t)))
    return _total(found)


def pull_back_pure(
    grad: Tensor, x: Tensor, terms: Tensor, slopes: Tensor, numbers: Tensor, groups: Groups
) -> tuple[Tensor, Tensor]:
    """``pull_back`` as one expression; ``slopes`` are terms[j] 2 gamma h j."""
    dx, sums = [], []
    for at, (first, middle, end) in enumerate(groups):
        u, e, t = _powers(x, numbers, at)
        w, inverse = grad * e, 1 / t
        right, left = range(end - 1, middle, -1), range(first, middle)
        value, slope = (_polynomial(a, right, t) + _polynomial(a, left, inverse) for a in (terms, slopes))
        dx.append(w * (slope + 2 * numbers[0] * u * (terms[middle] + value)))
        above, below = [w], [w]
        for _ in right:
            above.append(above[-1] * t)
        for _ in left:
            below.append(below[-1] * inverse)
        sums += [v.sum((0, 2)) for v in (*below[:0:-1], *above)]
    return _total(dx), torch.stack(sums)


def _powers(x: Tensor, numbers: Tensor, at: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return u, E and t of a group."""
    u = (x - numbers[3 + at]).clamp(-numbers[2], numbers[2])
    return u, torch.exp(u * numbers[0] * u), torch.exp(u * numbers[1])


def _polynomial(terms: Tensor, order: range, t: Tensor) -> Tensor | float:
    """Return t (w_a + t (w_b + ...)), the last of ``order`` being a."""
    p: Tensor | float = 0.0
    for j in order:
        p = (p * t if isinstance(p, Tensor) else 0.0) + terms[j]
    return p * t if isinstance(p, Tensor) else 0.0


def _total(parts: list[Tensor]) -> Tensor:
    return reduce(torch.add, parts)
