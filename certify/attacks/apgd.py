"""Auto-PGD: gradient ascent whose steps halve where it stops making progress."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

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

#: Weight of a step's own direction; the rest goes on as the step before.
FORWARD = 0.75
#: A stretch of steps must raise the loss in more than this share of them, or the steps halve.
PROGRESS = 0.75


@register_attack("apgd-ce")
@dataclass(frozen=True, kw_only=True)
class APGD(Attack):
    """Climb the loss of the whole claim by ``steps`` steps that start at two radii and halve at plateaus.

    ``loss`` is "ce", "dlr" or "margin". Reference: Croce, Hein, "Reliable evaluation of adversarial robustness with an
    ensemble of diverse parameter-free attacks" (2020), algorithm 1.
    """

    steps: int = 100
    restarts: int = 1
    loss: str = "ce"

    def __post_init__(self) -> None:
        lookup("loss", LOSSES, self.loss)
        _check(self.steps, self.restarts)

    def search(
        self, objective: Objective, domain: PerturbationSet, spec: Spec, draws: Draws
    ) -> Float[Tensor, "batch *shape"]:
        goals = spec.all_rows[:, None].expand(-1, self.restarts)

        def climb(points: Points, worst: Worst) -> None:
            _climb(objective, points, worst, LOSSES[self.loss], self.steps)

        return climb_all(domain, spec, goals, climb, draws)


@register_attack("apgd-t")
@dataclass(frozen=True, kw_only=True)
class APGDT(Attack):
    """Climb towards each of the ``targets`` rows nearest to breaking in turn, as ``APGD`` does.

    ``loss`` is "dlr" (for claims of fewer than three rows "margin" takes its place), "margin" or "ce".
    Reference: as ``APGD``, section 4.1.
    """

    steps: int = 100
    restarts: int = 1
    targets: int = 9
    loss: str = "dlr"

    def __post_init__(self) -> None:
        lookup("loss", LOSSES, self.loss)
        _check(self.steps, self.restarts)
        if self.targets < 1:
            raise InvalidInput(f"targets={self.targets}", "at least 1", "targets=9")

    def search(
        self, objective: Objective, domain: PerturbationSet, spec: Spec, draws: Draws
    ) -> Float[Tensor, "batch *shape"]:
        nearest = objective.rows(domain.center, spec).argsort(1)[:, : self.targets]
        loss = LOSSES["margin" if spec.C.shape[1] < 3 and self.loss == "dlr" else self.loss]

        def climb(points: Points, worst: Worst) -> None:
            _climb(objective, points, worst, loss, self.steps)

        return climb_all(domain, spec, nearest.repeat_interleave(self.restarts, 1), climb, draws)


def _climb(objective: Objective, points: Points, worst: Worst, loss: Loss, steps: int) -> None:
    """Let the points climb; what is kept per point is in ``points.state``."""
    rows, gradient = objective.gradient(points.x, points.spec, loss, points.goal)
    worst.meet(points.x, rows.amin(1), points.owner)
    value = loss(rows, points.goal)
    rises, halved = torch.zeros_like(value), torch.ones_like(value, dtype=torch.bool)
    points.state = {
        "before": points.x,
        "gradient": gradient,
        "value": value,
        "best": points.x,
        "best_gradient": gradient,
        "best_value": value,
        "eta": torch.full_like(value, 2.0),
        "rises": rises,
        "halved": halved,
        "checked": value,
    }
    checkpoints = dict(_checkpoints(steps))
    for k in range(steps):
        if not points.without(worst):
            return
        _advance(points, FORWARD if k else 1.0)
        rows, gradient = objective.gradient(points.x, points.spec, loss, points.goal)
        worst.meet(points.x, rows.amin(1), points.owner)
        _note(points.state, points.x, gradient, loss(rows, points.goal))
        if k + 1 in checkpoints:
            _halve(points, checkpoints[k + 1])


def _advance(points: Points, forward: float) -> None:
    """One step with momentum; both the plain step and the mixed one are pulled back into the set."""
    state, x = points.state, points.x
    stride = points.domain.stride(state["gradient"], None) * beside(state["eta"], x).to(x.dtype)
    ahead = points.domain.project(x + stride)
    points.x = points.domain.project(x + forward * (ahead - x) + (1 - forward) * (x - state["before"]))
    state["before"] = x


def _note(state: dict[str, Tensor], x: Tensor, gradient: Tensor, value: Tensor) -> None:
    """Keep what was found at x."""
    state["rises"] = state["rises"] + (value > state["value"])
    state["gradient"], state["value"] = gradient, value
    better = value > state["best_value"]
    wide = beside(better, x)
    state["best"] = torch.where(wide, x, state["best"])
    state["best_gradient"] = torch.where(wide, gradient, state["best_gradient"])
    state["best_value"] = torch.where(better, value, state["best_value"])


def _halve(points: Points, stretch: int) -> None:
    """At a checkpoint: halve the steps of points that rose too rarely, or not at all, and go back to their best."""
    state = points.state
    stuck = ~state["halved"] & (state["checked"] >= state["best_value"])
    halve = (state["rises"] <= PROGRESS * stretch) | stuck
    state["halved"], state["checked"] = halve, state["best_value"]
    state["eta"] = torch.where(halve, state["eta"] / 2, state["eta"])
    state["rises"] = torch.zeros_like(state["rises"])
    wide = beside(halve, points.x)
    points.x = torch.where(wide, state["best"], points.x)
    state["gradient"] = torch.where(wide, state["best_gradient"], state["gradient"])
    state["value"] = torch.where(halve, state["best_value"], state["value"])


def _checkpoints(steps: int) -> Iterator[tuple[int, int]]:
    """Steps after which progress is judged, each with the steps since the one before: .22 of all, ever fewer."""
    at, stretch = 0, max(1, int(0.22 * steps))
    while at + stretch <= steps:
        at += stretch
        yield at, stretch
        stretch = max(stretch - max(1, int(0.03 * steps)), max(1, int(0.06 * steps)))


def _check(steps: int, restarts: int) -> None:
    if steps < 1 or restarts < 1:
        raise InvalidInput(f"steps={steps}, restarts={restarts}", "at least 1 of each", "APGD()")
