"""``lipschitz``: a row is at least its value at the centre minus its Lipschitz constant times the radius.

The constant is that on the set itself, so what is proved at radius R is proved for min(R, margin / L_R) too.
Reference: Hein and Andriushchenko (2017), arXiv 1705.08475, theorem 2.1.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from jaxtyping import Float64
from torch import Tensor

from certify.convex.expansion import in_float64
from certify.convex.intervals import learned
from certify.errors import UnsupportedOperation
from certify.graph import Graph
from certify.lipschitz.estimate import Estimator, Question
from certify.lipschitz.recursion import Recursion
from certify.lipschitz.tightest import Tightest
from certify.propagate.drift import output_drift
from certify.propagate.methods import BoundMethod, finite, spec_rows
from certify.propagate.state import Knowledge, propagate_intervals
from certify.registry import ESTIMATORS, lookup, register_method
from certify.rounding import Arithmetic, FloatAnyOrder
from certify.sets import Box, LpBall, PerturbationSet
from certify.specs import Spec


@register_method("lipschitz")
@dataclass(frozen=True)
class LipschitzMargin:
    """row(x) >= row(centre) - L radius for linf, l2 and l1 balls and boxes, L the row's constant on the set.

    ``constants`` is an estimator of side "upper"; ``intervals`` make the float network's drift.
    """

    name: ClassVar[str] = "lipschitz"
    constants: str | Estimator = field(default_factory=lambda: Tightest(recursion=Recursion(steps=20)))
    intervals: str | BoundMethod = "crown"

    def bound(self, graph: Graph, domain: PerturbationSet, spec: Spec, arithmetic: Arithmetic) -> Tensor:
        """Return lower bounds of the rows C y + d."""
        real = in_float64(graph)
        p, radius = _reach(domain)
        claim = spec.to(torch.float64, graph.device)
        chosen = lookup("method", ESTIMATORS, self.constants)() if isinstance(self.constants, str) else self.constants
        found = chosen.estimate(Question(real, p, domain.double(), claim))
        if found.side != "upper":
            raise UnsupportedOperation(f"constants of side {found.side!r}", "an estimator of upper bounds")
        L = torch.tensor(found.rows, dtype=torch.float64, device=graph.device)
        point = LpBall(domain.center.double(), 0.0)
        exact = propagate_intervals(Knowledge(real, point, FloatAnyOrder(torch.float64)))
        rows = spec_rows(exact, claim, relax=False)
        fall = L * radius[:, None]
        drift = output_drift(learned(self.intervals, graph, domain, arithmetic))
        fall = fall + torch.einsum("bro,bo->br", claim.C.abs(), drift)
        return finite(rows - fall - (rows.abs() + fall) * 2.0**-40)


def _reach(domain: PerturbationSet) -> tuple[float, Float64[Tensor, "batch"]]:
    """A norm, and how far from its centre the set reaches in it; an l1 ball lies in the l2 ball."""
    if isinstance(domain, LpBall):
        return (torch.inf if domain.p == torch.inf else 2.0), domain.radius
    if isinstance(domain, Box):
        center = domain.center.double()
        far = torch.maximum(domain.hull.upper - center, center - domain.hull.lower)
        return torch.inf, far.flatten(1).amax(1) * (1 + 2.0**-50)
    raise UnsupportedOperation(f"a Lipschitz margin on {type(domain).__name__}", "LpBall or Box", "method='crown'")
