"""Projected gradient ascent with restarts, targets and active-set compaction."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor

from certify.attacks.base import LOSSES, Attack, Loss, Objective
from certify.errors import InvalidInput
from certify.registry import lookup, register_attack
from certify.sets import PerturbationSet
from certify.specs import Spec

#: Restarts are folded into the batch up to this many points per forward pass.
POINTS = 1024


@register_attack("pgd")
@dataclass(frozen=True, kw_only=True)
class PGD(Attack):
    """Climb the loss from random points of the set; the worst point of all steps and restarts counts.

    A step follows the set's ``stride``: the sign of the gradient for boxes and linf, the normalised gradient
    for l2, the largest coordinates for l1. ``step`` is its length in the units of x; None means 2.5 radii
    (half widths of a box) spread over all steps. ``loss`` is "margin" or "ce". ``target`` None attacks the
    whole spec, an int one row of it, "each" every row in turn. ``early_stop`` drops samples once they are
    broken; adversarial training sets it False to climb on.
    Reference: Madry et al. (2018), section 2.1.
    """

    steps: int = 40
    restarts: int = 1
    step: float | None = None
    loss: str = "margin"
    random_start: bool = True
    target: int | Literal["each"] | None = None
    early_stop: bool = True

    def __post_init__(self) -> None:
        lookup("loss", LOSSES, self.loss)
        if self.steps < 1 or self.restarts < 1:
            raise InvalidInput(f"steps={self.steps}, restarts={self.restarts}", "at least 1 of each", "PGD()")
        if self.step is not None and not (self.step > 0 and math.isfinite(self.step)):
            raise InvalidInput(f"step={self.step}", "a positive number in the units of x", "step=None")
        if self.restarts > 1 and not self.random_start:
            raise InvalidInput(
                f"restarts={self.restarts} without random_start", "restarts that differ", "random_start=True"
            )

    def search(
        self, objective: Objective, domain: PerturbationSet, spec: Spec, generator: torch.Generator | None
    ) -> Float[Tensor, "batch *shape"]:
        best = domain.center.clone()
        lowest = torch.full((domain.batch,), torch.inf, dtype=torch.float64, device=best.device)
        trials = self._goals(spec).repeat_interleave(self.restarts)
        for goals in trials.split(max(1, POINTS // domain.batch)):
            # Starts are drawn for every sample, so that no sample's fate depends on another's.
            starts = self._starts(domain, len(goals), generator)
            alive = ((lowest >= 0) | (not self.early_stop)).nonzero()[:, 0]
            if len(alive) == 0:
                break
            owner, goal = alive.repeat(len(goals)), goals.repeat_interleave(len(alive))
            climb = _Climb(objective, domain, spec, owner, starts[:, alive].flatten(0, 1), goal)
            points, values = climb.run(self)
            for start in range(0, len(owner), len(alive)):
                trial = slice(start, start + len(alive))
                better = values[trial] < lowest[alive]
                best[alive[better]] = points[trial][better]
                lowest[alive[better]] = values[trial][better]
        return best

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

    def _starts(
        self, domain: PerturbationSet, n: int, generator: torch.Generator | None
    ) -> Float[Tensor, "n batch *shape"]:
        if self.random_start:
            return domain.sample(n, generator)
        return domain.center.expand(n, *domain.center.shape)


class _Climb:
    """Points climbing side by side, each owned by a sample; those of broken samples leave the batch."""

    def __init__(
        self,
        objective: Objective,
        domain: PerturbationSet,
        spec: Spec,
        owner: Int[Tensor, "points"],
        x: Float[Tensor, "points *shape"],
        goal: Int[Tensor, "points"],
    ) -> None:
        self.objective, self.domain, self.spec = objective, domain.take(owner), spec.take(owner)
        self.owner, self.x, self.goal = owner, x, goal
        self.broken = torch.zeros(domain.batch, dtype=torch.bool, device=x.device)

    def run(self, options: PGD) -> tuple[Float[Tensor, "points *shape"], Float64[Tensor, "points"]]:
        """Return the worst point met from every start, and its lowest row."""
        points, place = self.x.clone(), torch.arange(len(self.x), device=self.x.device)
        values = torch.full((len(self.x),), torch.inf, dtype=torch.float64, device=self.x.device)
        loss = LOSSES[options.loss]
        for _ in range(options.steps):
            rows, gradient = self.objective.gradient(self.x, self.spec, partial(_towards, self.goal, loss))
            self._keep_best(points, values, place, rows)
            if options.early_stop:
                active = self._still_whole(rows)
                if len(active) == 0:
                    return points, values
                if len(active) < len(place):
                    place, gradient = place[active], gradient[active]
                    self._compact(active)
            stride = self.domain.stride(gradient, options.step) * (1 if options.step else 2.5 / options.steps)
            self.x = self.domain.project(self.x + stride)
        self._keep_best(points, values, place, self.objective.rows(self.x, self.spec))
        return points, values

    def _keep_best(self, points: Tensor, values: Tensor, place: Tensor, rows: Tensor) -> None:
        value = rows.amin(1)
        better = value < values[place]
        points[place[better]] = self.x[better]
        values[place[better]] = value[better]

    def _still_whole(self, rows: Tensor) -> Int[Tensor, "active"]:
        """Indices of the points whose sample no point has broken yet."""
        self.broken[self.owner[rows.amin(1) < 0]] = True
        return (~self.broken[self.owner]).nonzero()[:, 0]

    def _compact(self, active: Int[Tensor, "active"]) -> None:
        self.domain, self.spec = self.domain.take(active), self.spec.take(active)
        self.owner, self.x, self.goal = self.owner[active], self.x[active], self.goal[active]


def _towards(goal: Tensor, loss: Loss, rows: Tensor) -> Tensor:
    """The loss on the goal's row alone, or on all rows where the goal is -1."""
    picked = rows.gather(1, goal.clamp(min=0)[:, None])
    return torch.where(goal < 0, loss(rows), loss(picked))
