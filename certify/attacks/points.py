"""Points that climb side by side: restarts and targets folded into one batch, broken samples leaving it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from certify.attacks.worst import Worst
from certify.draws import Draws
from certify.sets import PerturbationSet
from certify.specs import Spec

#: Restarts are folded into the batch up to this many points per forward pass, and this many numbers of inputs and rows.
POINTS, NUMBERS = 1024, 2**24
#: Broken samples leave the batch when they are more than this share of it: gathering the others has its price.
LEAVE = 0.05


class Points:
    """Points x, each owned by a sample and aiming at a goal (a row, or -1 for all), with the owners' sets and claims.

    ``state`` are tensors that a climb keeps per point.
    """

    def __init__(
        self,
        domain: PerturbationSet,
        spec: Spec,
        x: Float[Tensor, "points *shape"],
        owner: Int[Tensor, "points"],
        goal: Int[Tensor, "points"],
    ) -> None:
        self.domain, self.spec = domain.take(owner), spec.take(owner)
        self.x, self.owner, self.goal = x, owner, goal
        self.state: dict[str, Tensor] = {}

    def without(self, worst: Worst) -> bool:
        """Drop the points of broken samples once they are enough; return whether any point is left."""
        active = (~worst.broken[self.owner]).nonzero()[:, 0]
        if len(active) < (1 - LEAVE) * len(self.x):
            self.domain, self.spec = self.domain.take(active), self.spec.take(active)
            self.x, self.owner, self.goal = self.x[active], self.owner[active], self.goal[active]
            self.state = {name: value[active] for name, value in self.state.items()}
        return len(active) > 0


#: Lets points climb, telling ``Worst`` every place they come by.
Climb = Callable[[Points, Worst], None]


def climb_all(
    domain: PerturbationSet,
    spec: Spec,
    goals: Int[Tensor, "batch trials"],
    climb: Climb,
    draws: Draws | None,
    *,
    early_stop: bool = True,
) -> Float[Tensor, "batch *shape"]:
    """Return the worst points met from one start per goal: random ones, the centres without ``draws``.

    Starts come from the samples' own streams, so that no sample's fate depends on another's. With ``early_stop``
    a sample is left alone once it is broken; how far it climbs on until then does depend on the batch.
    """
    worst, alive = Worst(domain), torch.arange(domain.batch, device=domain.center.device)
    most = min(POINTS, NUMBERS // (domain.center[0].numel() + spec.C[0].numel()))
    while len(alive) and goals.shape[1]:
        n = max(1, most // len(alive))
        now, goals, here = goals[:, :n], goals[:, n:], domain.take(alive)
        starts = here.center.expand(now.shape[1], *here.center.shape)
        if draws is not None:
            starts = here.sample(now.shape[1], draws)
        points = Points(domain, spec, starts.flatten(0, 1), alive.repeat(now.shape[1]), now.t().flatten())
        climb(points, worst)
        if early_stop:
            still = (~worst.broken[alive]).nonzero()[:, 0]
            alive, goals = alive[still], goals[still]
            draws = None if draws is None else draws.take(still)
    return worst.points
