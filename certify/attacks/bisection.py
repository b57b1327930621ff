"""Bisection: the way from a centre to a counterexample, halved until the point at which it breaks is near."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from certify.attacks.base import Attack, Objective
from certify.attacks.nearest import clearly_broken
from certify.draws import Draws
from certify.sets import PerturbationSet
from certify.shapes import beside
from certify.specs import Spec


@dataclass(frozen=True, kw_only=True, eq=False)
class Bisection(Attack):
    """Return a broken point between the centre and ``far``, what another attack found, as near as 12 halvings tell.

    Where ``far`` breaks nothing it comes back.
    """

    far: Float[Tensor, "batch *shape"]

    def search(
        self, objective: Objective, domain: PerturbationSet, spec: Spec, draws: Draws
    ) -> Float[Tensor, "batch *shape"]:
        return bisected(objective, domain, spec, self.far)


def bisected(
    objective: Objective, domain: PerturbationSet, spec: Spec, far: Float[Tensor, "batch *shape"], halvings: int = 12
) -> Float[Tensor, "batch *shape"]:
    """Return the last broken point met by bisection between the centre and ``far``; ``far`` where there is none."""
    low, high = far.new_zeros(len(far), dtype=torch.float64), far.new_ones(len(far), dtype=torch.float64)
    for _ in range(halvings):
        middle = (low + high) / 2
        broken = clearly_broken(objective.rows(_between(domain, far, middle), spec), far.dtype)
        low, high = torch.where(broken, low, middle), torch.where(broken, middle, high)
    return torch.where(beside(high < 1, far), _between(domain, far, high), far)


def _between(domain: PerturbationSet, far: Tensor, share: Tensor) -> Tensor:
    step = (far - domain.center) * beside(share, far).to(far.dtype)
    return domain.project(domain.center + step)
