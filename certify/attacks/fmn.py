"""Fast minimum-norm attack: the radius shrinks where the claim is broken and grows where it holds."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from certify.attacks.annealing import annealed
from certify.attacks.base import Attack, Objective
from certify.attacks.bisection import bisected
from certify.attacks.losses import LOSSES
from certify.attacks.nearest import Nearest, ball_of, dual_norm, linear_rows
from certify.attacks.pgd import PGD
from certify.draws import Draws
from certify.errors import InvalidInput
from certify.registry import register_attack
from certify.sets import LpBall, PerturbationSet
from certify.specs import Spec

#: Shares by which the radius changes in the first and in the last step.
FIRST, LAST = 0.3, 0.001
#: Rows that are linearised at the centre, the lowest ones.
CONSIDERED = 9
#: How far to look beyond the plane of the linear model: on the plane itself a row is 0 and nothing is broken.
OVERSHOOT = 1.02


@register_attack("fmn")
@dataclass(frozen=True, kw_only=True)
class FMN(Attack):
    """Return the nearest point met at which a row is below 0, in the norm of the ball, within its radius.

    Each of the ``targets`` rows that a linear model at the centre finds nearest is aimed at in turn. Until it breaks,
    the linear model says how far to look. Where no row breaks so, PGD in the whole ball and bisection find a point.
    Steps follow the ball's ``stride``. The witness's distance from the centre is an upper bound of the smallest
    adversarial distance: give a ball as wide as the search may go.
    Reference: Pintor, Roli, Brendel, Biggio, "Fast minimum-norm adversarial attacks through adaptive norm constraints"
    (2021), algorithm 1.
    """

    steps: int = 100
    targets: int = 3

    def __post_init__(self) -> None:
        if self.steps < 1 or self.targets < 1:
            raise InvalidInput(f"steps={self.steps}, targets={self.targets}", "at least 1 of each", "FMN(steps=100)")

    def search(
        self, objective: Objective, domain: PerturbationSet, spec: Spec, draws: Draws
    ) -> Float[Tensor, "batch *shape"]:
        ball, nearest = ball_of(domain, "fmn"), Nearest(domain)
        lowest = objective.rows(ball.center, spec).argsort(1)[:, :CONSIDERED]
        values, falls = linear_rows(objective, ball.center, spec, lowest)
        reach = values / dual_norm(ball.p, falls.flatten(0, 1)).view_as(values)
        x = ball.center
        for goal in lowest.gather(1, reach.argsort(1)[:, : self.targets]).unbind(1):
            x = self._towards(goal, objective, ball, spec, nearest)
        missed = (nearest.distance == math.inf).nonzero()[:, 0]
        if len(missed):
            far = PGD(steps=self.steps).search(objective, ball.take(missed), spec.take(missed), draws.take(missed))
            x = x.index_copy(0, missed, bisected(objective, ball.take(missed), spec.take(missed), far))
            nearest.meet(x, objective.rows(x, spec), ball.distance(x))
        return nearest.points_or(x)

    def _towards(self, goal: Tensor, objective: Objective, ball: LpBall, spec: Spec, nearest: Nearest) -> Tensor:
        """Aim at a row per sample, telling ``nearest`` what breaks; return where it ended."""
        x, radius, closest = ball.center, torch.full_like(ball.radius, math.inf), torch.full_like(ball.radius, math.inf)
        for k in range(self.steps):
            rows, gradient = objective.gradient(x, spec, LOSSES["margin"], goal)
            distance, value = ball.distance(x), rows.gather(1, goal[:, None])[:, 0]
            broken = nearest.meet(x, rows, distance)
            closest = torch.where(broken, torch.minimum(closest, distance), closest)
            share = annealed(k, self.steps)
            change = LAST + (FIRST - LAST) * share
            guess = distance + OVERSHOOT * value.clamp(min=0) / dual_norm(ball.p, gradient)
            grown = torch.where(closest < math.inf, radius * (1 + change), guess)
            radius = torch.where(broken, torch.minimum(radius * (1 - change), closest), grown)
            tried = ball.with_radius(torch.minimum(radius, ball.radius))
            x = tried.project(x + share * tried.stride(gradient, None))
        nearest.meet(x, objective.rows(x, spec), ball.distance(x))
        return x
