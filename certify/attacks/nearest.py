"""What minimum-norm attacks share: the nearest broken points, and the norm that gradients are measured in."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Float64, Int
from torch import Tensor

from certify.attacks.base import Objective
from certify.attacks.losses import LOSSES
from certify.errors import InvalidInput
from certify.sets import LpBall, PerturbationSet
from certify.shapes import beside
from certify.specs import Spec

#: Rounding errors of the model's precision, relative to the largest row, by which a row must be below 0.
CLEAR = 100
#: Keeps quotients finite where a gradient vanishes.
TINY = 1e-30


class Nearest:
    """Per sample the point nearest to the centre at which a row was below 0."""

    def __init__(self, domain: PerturbationSet) -> None:
        self._points = domain.center.clone()
        self.distance = torch.full((domain.batch,), torch.inf, dtype=torch.float64, device=domain.center.device)

    def meet(
        self,
        x: Float[Tensor, "batch *shape"],
        rows: Float64[Tensor, "batch rows"],
        distance: Float64[Tensor, "batch"],
    ) -> Bool[Tensor, "batch"]:
        """Take the points that clearly break a row and are nearer than what was met before; return which break one."""
        broken = clearly_broken(rows, x.dtype)
        better = broken & (distance < self.distance)
        self._points = torch.where(beside(better, x), x, self._points)
        self.distance = torch.where(better, distance, self.distance)
        return broken

    def points_or(self, x: Float[Tensor, "batch *shape"]) -> Float[Tensor, "batch *shape"]:
        """Return the nearest broken points, and ``x`` where there are none."""
        found = beside(self.distance < torch.inf, x)
        return torch.where(found, self._points, x)


def clearly_broken(rows: Float64[Tensor, "batch rows"], dtype: torch.dtype) -> Bool[Tensor, "batch"]:
    """Return where a row is below 0 by more than rounding in that dtype.

    The nearest points lie where rows are almost 0, and what rounding alone breaks would not be confirmed in float64.
    """
    return rows.amin(1) < -CLEAR * torch.finfo(dtype).eps * rows.abs().amax(1)


def ball_of(domain: PerturbationSet, name: str) -> LpBall:
    """Return the domain as a ball. Raises ``InvalidInput`` for sets without a norm."""
    if not isinstance(domain, LpBall):
        raise InvalidInput(
            f"the attack {name!r} on a {type(domain).__name__}",
            "an LpBall: it searches for small norms",
            "pgd or square",
        )
    return domain


def dual_norm(p: float, gradient: Float[Tensor, "batch *shape"]) -> Float64[Tensor, "batch"]:
    """Return what a linear function rises by along a step of length 1 in the p-norm: the dual norm, above 0."""
    dual = {torch.inf: 1.0, 2.0: 2.0, 1.0: torch.inf}[p]
    return torch.linalg.vector_norm(gradient.double().flatten(1), dual, dim=1).clamp(min=TINY)


def linear_rows(
    objective: Objective, x: Float[Tensor, "batch *shape"], spec: Spec, rows: Int[Tensor, "batch rows"]
) -> tuple[Float64[Tensor, "batch rows"], Float[Tensor, "batch rows *shape"]]:
    """Return the values of the considered rows at x and the directions in which they fall, all rows in one batch."""
    n, k = rows.shape
    owner = torch.arange(n, device=x.device).repeat_interleave(k)
    values, gradient = objective.gradient(x[owner], spec.take(owner), LOSSES["margin"], rows.flatten())
    return values.view(n, k, -1).gather(2, rows[..., None])[..., 0], gradient.view(n, k, *x.shape[1:])
