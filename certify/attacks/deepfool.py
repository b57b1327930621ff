"""DeepFool: step by step to the nearest plane at which a linear model breaks a row."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from certify.attacks.base import Attack, Objective
from certify.attacks.nearest import CLEAR, TINY, Nearest, ball_of, dual_norm, linear_rows
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
            step = _shortest(ball.take(walking), x[walking], values[walking], gradients[walking])
            x = x.clone()
            x[walking] = ball.take(walking).project(x[walking] + (1 + self.overshoot) * step)
        nearest.meet(x, objective.rows(x, spec), ball.distance(x))
        return nearest.points_or(x)


def _shortest(ball: LpBall, x: Tensor, values: Tensor, gradients: Tensor) -> Float[Tensor, "n *shape"]:
    """The shortest step beyond a plane on which one of the linearised rows is 0, by what ``Nearest`` calls rounding.

    Coordinates without room, at an end of the data range, stand still.
    """
    n, k = values.shape
    beyond = 2 * CLEAR * torch.finfo(x.dtype).eps * values.abs().amax(1, keepdim=True)
    fall = values.clamp(min=0) + beyond
    ends = torch.where(gradients > 0, ball.hull.upper[:, None], ball.hull.lower[:, None])
    room = (ends - x[:, None]).abs().flatten(2)
    slopes = torch.where(room > 0, gradients.flatten(2), 0)
    if ball.p == 1:
        steps = _filled(slopes, room, fall)
        return _row(steps, steps.abs().sum(2).argmin(1)).view_as(x)
    length, row = (fall / dual_norm(ball.p, slopes.flatten(0, 1)).view(n, k)).min(1)
    return ball.with_radius(length).stride(_row(slopes, row).view_as(x), None)


def _filled(slopes: Tensor, room: Tensor, fall: Tensor) -> Float[Tensor, "n rows features"]:
    """The shortest steps in l1 that fall so much: the steepest coordinates first, each as far as it has room."""
    steep, order = slopes.double().abs().sort(2, descending=True)
    room = room.double().gather(2, order)
    before = (steep * room).cumsum(2) - steep * room
    left = (fall[..., None] - before).clamp(min=0) / steep.clamp(min=TINY)
    moves = torch.minimum(left, torch.where(steep > 0, room, 0))
    return (torch.zeros_like(moves).scatter(2, order, moves) * slopes.sign()).to(slopes.dtype)


def _row(values: Float[Tensor, "n rows features"], row: Tensor) -> Float[Tensor, "n features"]:
    return values[torch.arange(len(values), device=values.device), row]
