"""The linear functions of the input below the rows of a claim: CROWN's, read before they become numbers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64
from torch import Tensor, nn

from certify.graph import INPUT
from certify.propagate.attribute import claim_blocks, known, pull_through
from certify.propagate.methods import BoundMethod
from certify.rounding import ieee
from certify.sets import PerturbationSet
from certify.specs import Spec


@dataclass(frozen=True, eq=False)
class InputRows:
    """row(x) >= <coefficients, x> + constant on the domain, in real arithmetic; ``bound`` is the least value there."""

    coefficients: Float[Tensor, "batch rows *shape"]
    bound: Float64[Tensor, "batch rows"]


@ieee()
def input_rows(
    model: nn.Module,
    domain: PerturbationSet,
    method: str | BoundMethod = "crown",
    *,
    spec: Spec | None = None,
    arithmetic: str = "float",
) -> InputRows:
    """Return the linear lower bounds of the claim's rows (of the outputs, without a claim) as functions of the input.

    ``method`` makes the intervals of the layers, under ``arithmetic``; the rows on them are those of real arithmetic.
    """
    with torch.no_grad():
        knowledge, spec = known(model, domain, method, spec, arithmetic)
        found = torch.zeros(spec.C.shape[:2].numel(), *domain.center.shape[1:]).to(domain.center)
        bound = torch.empty(len(found), dtype=torch.float64, device=found.device)
        for rows, block in claim_blocks(knowledge, spec):
            for _ in pull_through(rows):
                pass
            if INPUT in rows.pending:
                found[block] = rows.flat(INPUT, rows.pending[INPUT])[:, 0]
                rows.settle(INPUT)
            bound[block] = rows.result().lower
        shape = spec.C.shape[:2]
        return InputRows(found.unflatten(0, shape), bound.view(shape) + spec.d.double())
