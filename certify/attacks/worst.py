"""The worst points met in a search, per sample."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Float64, Int
from torch import Tensor

from certify.sets import PerturbationSet


class Worst:
    """Per sample the point with the lowest row so far; the centre, unmeasured, where nothing was met."""

    def __init__(self, domain: PerturbationSet) -> None:
        self.points = domain.center.clone()
        self.values = torch.full((domain.batch,), torch.inf, dtype=torch.float64, device=domain.center.device)

    @property
    def broken(self) -> Bool[Tensor, "batch"]:
        """Where some row is below 0."""
        return self.values < 0

    @property
    def whole(self) -> Int[Tensor, "active"]:
        """The samples that no point has broken yet."""
        return (~self.broken).nonzero()[:, 0]

    def meet(self, points: Float[Tensor, "n *shape"], values: Float64[Tensor, "n"], owner: Int[Tensor, "n"]) -> None:
        """Take the points, owned by the samples ``owner``, that are worse than what was met before."""
        lowest = self.values.scatter_reduce(0, owner, values, "amin")
        chosen = ((values == lowest[owner]) & (values < self.values[owner])).nonzero()[:, 0]
        if len(chosen):
            # Of equals the first: which of several writes to one place wins is nobody's promise.
            first = torch.full_like(self.values, len(values), dtype=torch.long)
            first = first.scatter_reduce(0, owner[chosen], chosen, "amin")
            chosen = chosen[first[owner[chosen]] == chosen]
            self.points[owner[chosen]], self.values = points[chosen], lowest
