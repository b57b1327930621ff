"""LipSDP by a semidefinite solver: an independent check of the recursion on small sequential networks.

With slopes in [a, b] every neuron satisfies (du - a dv)(b dv - du) >= 0, and for multipliers t >= 0

    rho ||x||^2 - ||W_L u_{L-1}||^2 - sum_i t_i (u_i - a_i v_i)(b_i v_i - u_i) >= 0  as a quadratic form

proves L^2 <= rho. The solver's objective is never reported: its multipliers become S = rho / (t r^2), r = (b - a)/2,
and the recursion evaluates them with all rounding.

Reference: Fazlyab et al., arXiv 1906.04893, theorem 2, in the form with one multiplier per neuron or layer; the
coupled one ("network") is not sound (Pauli et al., arXiv 2005.02929, section 3).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from certify.errors import UnsupportedOperation
from certify.lipschitz.chain import Chain
from certify.lipschitz.estimate import Question
from certify.lipschitz.recursion import answer
from certify.lipschitz.steps import Gate, Mix, Source
from certify.propagate.methods import BoundMethod
from certify.registry import register_estimator
from certify.results import LipschitzEstimate

NEURONS = 150  # at most: the solver's time grows like their sixth power
SLACKS = (0.0, *(10.0**k for k in range(-10, -1)))  # by which S is raised until it is certainly feasible


@register_estimator("lipsdp-neuron")
@dataclass(frozen=True, kw_only=True)
class LipSDP:
    """An upper bound from the multipliers that cvxpy and Clarabel find, one per neuron; side "upper".

    For dense networks of linear layers and activations with at most 150 hidden neurons; a check, not a tool.
    """

    intervals: str | BoundMethod = "crown"
    name = "lipsdp-neuron"
    shared = False  # one multiplier per layer

    def estimate(self, question: Question) -> LipschitzEstimate:
        """Return the bound with its multipliers. Raises ``UnsupportedOperation`` for other or larger networks."""
        return answer(self.name, question, self.intervals, torch.inf, self._solve)

    def _solve(self, chain: Chain, seconds: float) -> tuple[Tensor, list[Tensor]]:
        maps, gates = _layers(chain)
        found = [self._multipliers(*_one(maps, gates, i)) for i in range(chain.problems)]
        per_gate = [torch.stack([S[k] for S in found]) for k in range(len(gates))]
        return _repaired(chain, per_gate)

    def _multipliers(self, maps: list[Tensor], sectors: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
        """S per layer, as the solver has it."""
        import cvxpy as cp
        import numpy as np

        maps = [torch.linalg.qr(maps[0].T).R.T, *maps[1:]]  # the input in as many dimensions as the first layer has
        widths = [maps[0].shape[1], *(len(c) for c, _ in sectors)]
        ends = np.cumsum([0, *widths])
        picks = [np.eye(ends[-1])[ends[k] : ends[k + 1]] for k in range(len(widths))]
        rho, forms, multipliers = cp.Variable(nonneg=True), [], []
        for k, (c, r) in enumerate(sectors):
            if not bool((r > 0).all()):
                raise UnsupportedOperation("neurons with one slope", "slope ranges with a < b", "method='recursion'")
            t = cp.Variable(nonneg=True) * np.ones(len(c)) if self.shared else cp.Variable(len(c), nonneg=True)
            multipliers.append(t)
            u, v = picks[k + 1], maps[k].numpy() @ picks[k]
            a, b = (c - r).numpy(), (c + r).numpy()
            left, right = u - a[:, None] * v, b[:, None] * v - u
            half = left.T @ cp.diag(t) @ right
            forms.append((half + half.T) / 2)
        y = maps[-1].numpy() @ picks[-1]
        size = float(np.linalg.norm(y, 2)) ** 2
        form = rho * (picks[0].T @ picks[0]) - y.T @ y / size - sum(forms)
        problem = cp.Problem(cp.Minimize(rho), [(form + form.T) / 2 >> 0])
        problem.solve(solver=cp.CLARABEL)
        if rho.value is None:
            raise UnsupportedOperation(f"the solver says {problem.status}", "an optimum", "method='recursion'")
        found = []
        for t, (_, r) in zip(multipliers, sectors, strict=True):
            value = torch.as_tensor(np.array(t.value, dtype=float)).clamp(min=1e-12)
            found.append(float(rho.value) / (value * r.square()))
        return found


@register_estimator("lipsdp-layer")
@dataclass(frozen=True, kw_only=True)
class LipSDPLayer(LipSDP):
    """The same with one multiplier per layer: faster and looser; side "upper"."""

    name = "lipsdp-layer"
    shared = True


def _layers(chain: Chain) -> tuple[list[Tensor], list[Gate]]:
    """The maps before, between and behind the gates of a sequential dense chain, each [problems or 1, m, k]."""
    gates = [step for step in chain.steps if isinstance(step, Gate)]
    if sum(gate.size for gate in gates) > NEURONS:
        raise UnsupportedOperation(
            f"{sum(gate.size for gate in gates)} hidden neurons", f"at most {NEURONS}", "method='recursion'"
        )
    maps: list[Tensor | None] = [None]
    for step in chain.steps:
        if isinstance(step, Gate) and maps[-1] is not None and maps[-1].shape[1] == step.size:
            maps.append(None)
        elif isinstance(step, (Source, Mix)) and not step.G.is_complex() and not step.size:
            G = step.G.flatten(0, -3)
            maps[-1] = G if maps[-1] is None else G @ maps[-1]  # without an activation between them two maps are one
        else:
            raise UnsupportedOperation("a network that is no dense sequence", "linear layers, activations and p = 2")
    return [G for G in maps if G is not None], gates


def _one(maps: list[Tensor], gates: list[Gate], i: int) -> tuple[list[Tensor], list[tuple[Tensor, Tensor]]]:
    return [G[min(i, len(G) - 1)] for G in maps], [(gate.c[i], gate.r[i]) for gate in gates]


def _repaired(chain: Chain, per_gate: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Raise S by the least slack that makes it a certificate; infinite where none does."""
    value: Any = torch.full((chain.problems,), torch.inf, dtype=torch.float64)
    kept = [S.clone() for S in _by_step(chain, per_gate)]
    for slack in SLACKS:
        trial = [S * (1 + slack) for S in _by_step(chain, per_gate)]
        found = chain.certify(trial)
        better = torch.isfinite(found) & torch.isinf(value)
        value = torch.where(better, found, value)
        kept = [torch.where(better[:, None], new, old) for new, old in zip(trial, kept, strict=True)]
    return value, kept


def _by_step(chain: Chain, per_gate: list[Tensor]) -> list[Tensor]:
    waiting = iter(per_gate)
    empty = torch.zeros(chain.problems, 0, dtype=torch.float64)
    return [next(waiting) if step.size else empty for step in chain.steps]
