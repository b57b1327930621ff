"""The barrier method: minimise log L - weight * sum of log determinants over log S, many problems side by side.

Without the barrier the multipliers stall 0.5 to 2 % above the optimum; its weight falls by stages. Every iterate is
feasible, so whatever the search leaves is a certificate. Reference: Boyd and Vandenberghe, Convex Optimization, 11.3;
L-BFGS: Nocedal and Wright, Numerical Optimization, algorithm 7.4.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float64
from torch import Tensor

#: Weights of the barrier, stage by stage.
WEIGHTS = tuple(10.0 ** (-2 - k / 2) for k in range(9))
PAIRS = 60  # remembered steps
SHRINK = 0.4  # of the step after a failure
TRIALS = 24  # of a line search
REACH = 2.0  # largest change of a logarithm in one step

#: Values and gradients of chosen problems: (x, problems) -> (value [n], gradient [n, size]); infinite if infeasible.
Objective = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class _History:
    """Steps and changes of the gradient, newest last: the inverse Hessian that they imply, problem by problem."""

    def __init__(self) -> None:
        self.s: list[Tensor] = []
        self.y: list[Tensor] = []

    def add(self, s: Tensor, y: Tensor) -> None:
        """Remember a step; pairs without curvature say nothing and become 0."""
        product = (s * y).sum(1)
        use = (product > 1e-14 * (y * y).sum(1))[:, None]
        self.s.append(torch.where(use, s, 0))
        self.y.append(torch.where(use, y, 0))
        del self.s[:-PAIRS], self.y[:-PAIRS]

    def direction(self, gradient: Tensor) -> Tensor:
        """Return -H gradient, in the compact form of Byrd, Nocedal and Schnabel (1994), equation 3.1."""
        if not self.s:
            return -gradient / gradient.abs().amax(1, keepdim=True).clamp(min=1)
        s, y = torch.stack(self.s, 1), torch.stack(self.y, 1)
        products = s @ y.mT
        d = products.diagonal(dim1=1, dim2=2)
        used = d > 0
        newest = torch.arange(1, d.shape[1] + 1, device=d.device).mul(used).argmax(1)[:, None]
        scale = torch.where(used, d / (y * y).sum(2).clamp(min=1e-300), 1).gather(1, newest)
        R = torch.triu(products) + torch.diag_embed((~used).double())
        p = torch.linalg.solve_triangular(R, s @ gradient[..., None], upper=True)
        yp = p.mT @ y  # [problems, 1, n]
        rest = d[..., None] * p + scale[..., None] * (y @ (yp.mT - gradient[..., None]))
        back = torch.linalg.solve_triangular(R.mT, rest, upper=False)
        return -(scale * gradient + (back.mT @ s)[:, 0] - scale * yp[:, 0])


def descend(
    objective: Objective, begins: Sequence[Float64[Tensor, "problems size"]], steps: int, tolerance: float, end: float
) -> Float64[Tensor, "problems size"]:
    """Return x after at most ``steps`` L-BFGS steps with backtracking, or steps that gain less than ``tolerance``.

    Every problem starts at the best of ``begins``, and its value never rises. No step begins after ``end`` (of the
    monotonic clock).
    """
    x, *others = begins
    every = torch.arange(len(x), device=x.device)
    value, gradient = objective(x, every)
    for other in others:
        found, slopes = objective(other, every)
        better = (found < value)[:, None]
        x, gradient = torch.where(better, other, x), torch.where(better, slopes, gradient)
        value = torch.minimum(value, found)
    history, active = _History(), torch.isfinite(value)
    for _ in range(steps):
        if not bool(active.any()) or time.monotonic() > end:
            break
        direction = history.direction(gradient)
        slope = (direction * gradient).sum(1)
        uphill = slope >= 0
        direction = torch.where(uphill[:, None], -gradient, direction)
        slope = torch.where(uphill, -(gradient * gradient).sum(1), slope)
        length = (REACH / direction.abs().amax(1).clamp(min=1e-300)).clamp(max=1)
        before, old = value.clone(), gradient
        start, waiting = x, active.clone()
        x, gradient = x.clone(), gradient.clone()
        for _trial in range(TRIALS):
            index = waiting.nonzero()[:, 0]
            if len(index) == 0:
                break
            point = start[index] + length[index, None] * direction[index]
            found, uphill_of = objective(point, index)
            good = found <= before[index] + 1e-4 * length[index] * slope[index]
            done = index[good]
            x[done], value[done], gradient[done] = point[good], found[good], uphill_of[good]
            waiting[done] = False
            length[index[~good]] *= SHRINK
        moved = active & ~waiting
        history.add(torch.where(moved[:, None], x - start, 0), torch.where(moved[:, None], gradient - old, 0))
        active = moved & (before - value > tolerance)
    return x
