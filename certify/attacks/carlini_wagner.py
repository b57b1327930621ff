"""Carlini and Wagner's l2 attack: distance and margin in one loss, balanced per sample."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from certify.attacks.base import Attack, Objective
from certify.attacks.losses import LOSSES
from certify.attacks.nearest import Nearest, ball_of
from certify.draws import Draws
from certify.errors import InvalidInput
from certify.registry import register_attack
from certify.sets import LpBall, PerturbationSet
from certify.shapes import beside
from certify.specs import Spec

#: Decay rates and guard of Adam (Kingma, Ba 2015).
BETA1, BETA2, GUARD = 0.9, 0.999, 1e-8
#: The margin is raised until a row is this far below 0: at 0 itself nothing would be broken yet.
CONFIDENCE = 1e-4


@register_attack("cw")
@dataclass(frozen=True, kw_only=True)
class CarliniWagner(Attack):
    """Return the l2-nearest point met at which a row is below 0, minimising ||x - centre||^2 + c max(row, 0).

    c is searched per sample: times 10 until a row breaks, then by bisection, ``searches`` times; each time Adam takes
    ``steps`` steps of ``rate``. Points stay in the ball and its data range by projection (the paper uses tanh).
    Reference: Carlini, Wagner, "Towards evaluating the robustness of neural networks" (2017), section V.
    """

    steps: int = 100
    searches: int = 6
    rate: float = 0.01
    start: float = 1.0

    def __post_init__(self) -> None:
        if self.steps < 1 or self.searches < 1 or not (self.rate > 0 and self.start > 0):
            raise InvalidInput(
                f"steps={self.steps}, searches={self.searches}, rate={self.rate}, start={self.start}",
                "positive numbers",
                "CarliniWagner()",
            )

    def search(
        self, objective: Objective, domain: PerturbationSet, spec: Spec, draws: Draws
    ) -> Float[Tensor, "batch *shape"]:
        ball, nearest = ball_of(domain, "cw"), Nearest(domain)
        if ball.p != 2:
            raise InvalidInput(f"the attack 'cw' in l{ball.p:g}", "p = 2", "fmn for other norms")
        weight = torch.full_like(ball.radius, self.start)
        low, high = torch.zeros_like(weight), torch.full_like(weight, torch.inf)
        x = domain.center
        for _ in range(self.searches):
            x, broke = self._descend(objective, ball, spec, weight, nearest)
            high, low = torch.where(broke, weight, high), torch.where(broke, low, weight)
            weight = torch.where(high < torch.inf, (low + high) / 2, weight * 10)
        return nearest.points_or(x)

    def _descend(
        self, objective: Objective, ball: LpBall, spec: Spec, weight: Tensor, nearest: Nearest
    ) -> tuple[Tensor, Tensor]:
        """Adam from the centre at these weights; return where it ended and whose rows broke on the way."""
        x = ball.center
        mean, square = torch.zeros_like(x), torch.zeros_like(x)
        broke = torch.zeros_like(weight, dtype=torch.bool)
        for k in range(1, self.steps + 1):
            rows, climb = objective.gradient(x, spec, LOSSES["margin"])
            value = rows.amin(1)
            broke |= nearest.meet(x, rows, ball.distance(x))
            pull = beside(torch.where(value > -CONFIDENCE, weight, 0), x).to(x.dtype)
            gradient = 2 * (x - ball.center) - pull * climb
            mean = BETA1 * mean + (1 - BETA1) * gradient
            square = BETA2 * square + (1 - BETA2) * gradient.square()
            step = (mean / (1 - BETA1**k)) / ((square / (1 - BETA2**k)).sqrt() + GUARD)
            x = ball.project(x - self.rate * step)
        return x, broke | nearest.meet(x, objective.rows(x, spec), ball.distance(x))
