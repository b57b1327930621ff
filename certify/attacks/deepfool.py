"""DeepFool: step by step to the nearest plane at which a linear model breaks a row."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from certify.attacks.base import Attack, Objective
from certify.attacks.nearest import Nearest, ball_of, dual_norm, linear_rows
from certify.attacks.shapes import beside
from certify.draws import Draws
from certify.errors import InvalidInput
from certify.registry import register_attack
from certify.sets import LpBall, PerturbationSet
from certify.specs import Spec


@register_attack("deepfool")
@dataclass(frozen=True, kw_only=True)
class DeepFool(Attack):
    """Return the first point met at which a row is below 0, walking to the nearest linearised row again and again.

    ``rows`` are considered, those nearest to breaking at the centre; ``overshoot`` is the share by which each step goes
    beyond its plane. The witness's distance from the centre is an upper bound of the smallest adversarial distance.
    Reference: Moosavi-Dezfooli, Fawzi, Frossard, "DeepFool" (2016), algorithm 2, in the norm of the ball.
    """

    steps: int = 50
    rows: int = 9
    overshoot: float = 0.02

    def __post_init__(self) -> None:
        if self.steps < 1 or self.rows < 1 or not self.overshoot >= 0:
            raise InvalidInput(
                f"steps={self.steps}, rows={self.rows}, overshoot={self.overshoot}", "positive numbers", "DeepFool()"
            )

    def search(
        self, objective: Objective, domain: PerturbationSet, spec: Spec, draws: Draws
    ) -> Float[Tensor, "batch *shape"]:
        ball, nearest, x = ball_of(domain, "deepfool"), Nearest(domain), domain.center.clone()
        considered = objective.rows(x, spec).argsort(1)[:, : self.rows]
        for _ in range(self.steps):
            values, gradients = linear_rows(objective, x, spec, considered)
            nearest.meet(x, values, ball.distance(x))
            walking = (nearest.distance == torch.inf).nonzero()[:, 0]
            if len(walking) == 0:
                break
            step = _shortest(ball.take(walking), values[walking], gradients[walking])
            x = x.clone()
            x[walking] = ball.take(walking).project(x[walking] + (1 + self.overshoot) * step)
        nearest.meet(x, objective.rows(x, spec), ball.distance(x))
        return nearest.points_or(x)


def _shortest(ball: LpBall, values: Tensor, gradients: Tensor) -> Float[Tensor, "n *shape"]:
    """The shortest step to a plane on which one of the linearised rows is 0."""
    n, k = values.shape
    owner = torch.arange(n, device=values.device)
    duals = dual_norm(ball.take(owner.repeat_interleave(k)), gradients.flatten(0, 1)).view(n, k)
    length, row = (values.clamp(min=1e-9) / duals).min(1)
    chosen = gradients[owner, row]
    return ball.stride(chosen, 1.0) * beside(length, chosen).to(chosen.dtype)
