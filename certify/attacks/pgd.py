"""Projected gradient ascent with restarts, targets, momentum and active-set compaction."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from certify.attacks.annealing import annealed
from certify.attacks.base import Attack, Objective
from certify.attacks.losses import LOSSES, Loss
from certify.attacks.points import Points, climb_all
from certify.attacks.worst import Worst
from certify.draws import Draws
from certify.errors import InvalidInput
from certify.registry import lookup, register_attack
from certify.sets import PerturbationSet
from certify.shapes import beside
from certify.specs import Spec


@register_attack("pgd")
@dataclass(frozen=True, kw_only=True)
class PGD(Attack):
    """Climb the loss from random points of the set; the worst point of all steps and restarts counts.

    A step follows the set's ``stride``: the sign of the gradient for boxes and linf, the normalised gradient
    for l2, the largest coordinates for l1. ``step`` is its length in the units of x; None means one radius (half width
    of a box) at first and then ever less, along a cosine. ``loss`` is "ce", "margin", "dlr", or "ce-margin": the first
    for one half of the steps, the second for the other. ``target`` None attacks the whole spec, an int one row of it,
    "each" every row in turn. ``momentum`` is the decay of the gradients' running sum. ``early_stop`` drops samples
    once they are broken; adversarial training sets it False to climb on.

    No other loss and no steps of one length broke more at equal gradients on any of five reference networks, and most
    broke less (tests/benchmarks/attacks.py schedule).
    Reference: Madry et al. (2018), section 2.1; Dong et al. (2018), algorithm 1, for momentum.
    """

    steps: int = 40
    restarts: int = 1
    step: float | None = None
    loss: str = "ce-margin"
    random_start: bool = True
    target: int | Literal["each"] | None = None
    momentum: float = 0.0
    early_stop: bool = True

    def __post_init__(self) -> None:
        _losses(self.loss)
        if self.steps < 1 or self.restarts < 1:
            raise InvalidInput(f"steps={self.steps}, restarts={self.restarts}", "at least 1 of each", "PGD()")
        if self.step is not None and not (self.step > 0 and math.isfinite(self.step)):
            raise InvalidInput(f"step={self.step}", "a positive number in the units of x", "step=None")
        if not 0 <= self.momentum <= 1:
            raise InvalidInput(f"momentum={self.momentum}", "a number in [0, 1]", "momentum=1.0")
        if self.restarts > 1 and not self.random_start:
            raise InvalidInput(
                f"restarts={self.restarts} without random_start", "restarts that differ", "random_start=True"
            )

    def lengths(self) -> list[tuple[float | None, float]]:
        """Return the steps' lengths: one in the units of x (None for the radius), and a share of it."""
        if self.step is not None:
            return [(self.step, 1.0)] * self.steps
        return [(None, annealed(k, self.steps)) for k in range(self.steps)]

    def search(
        self, objective: Objective, domain: PerturbationSet, spec: Spec, draws: Draws
    ) -> Float[Tensor, "batch *shape"]:
        goals = self._goals(spec).repeat_interleave(self.restarts).expand(domain.batch, -1)

        def climb(points: Points, worst: Worst) -> None:
            _climb(self, objective, points, worst)

        return climb_all(domain, spec, goals, climb, draws if self.random_start else None, early_stop=self.early_stop)

    def _goals(self, spec: Spec) -> Int[Tensor, "trials"]:
        """Rows to attack one by one; -1 stands for all at once."""
        rows, device = spec.C.shape[1], spec.C.device
        if self.target is None:
            return torch.tensor([-1], device=device)
        if self.target == "each":
            return torch.arange(rows, device=device)
        if not 0 <= self.target < rows:
            raise InvalidInput(f"target={self.target}", f"a row in 0..{rows - 1}, or 'each'", "target=None")
        return torch.tensor([self.target], device=device)


def _losses(name: str) -> tuple[Loss, Loss]:
    """The losses of the first and of the second half of the steps; raises ``InvalidInput`` for unknown names."""
    first, _, second = name.partition("-")
    return lookup("loss", LOSSES, first), lookup("loss", LOSSES, second or first)


def _climb(options: PGD, objective: Objective, points: Points, worst: Worst) -> None:
    """Let all points climb, and ``worst`` meet every place they come by."""
    losses = _losses(options.loss)
    for k, (length, share) in enumerate(options.lengths()):
        loss = losses[2 * k >= options.steps]
        rows, gradient = objective.gradient(points.x, points.spec, loss, points.goal)
        worst.meet(points.x, rows.amin(1), points.owner)
        points.state["along"] = _gathered(points.state.get("along"), gradient, options.momentum)
        if options.early_stop and not points.without(worst):
            return
        stride = points.domain.stride(points.state["along"], length)
        points.x = points.domain.project(stride.mul_(share).add_(points.x))
    worst.meet(points.x, objective.rows(points.x, points.spec).amin(1), points.owner)


def _gathered(velocity: Tensor | None, gradient: Tensor, decay: float) -> Tensor:
    """The running sum of gradients, each first brought to l1 norm 1: sizes differ by orders along a path."""
    if decay == 0:
        return gradient
    size = beside(gradient.flatten(1).abs().sum(1), gradient)
    unit = gradient / torch.where(size > 0, size, 1)
    return unit if velocity is None else decay * velocity + unit
