"""The interior point method: at the optimum that a general solver finds, and inside what it claims."""

from __future__ import annotations

import cvxpy as cp
import numpy as np
import pytest
import torch
from torch import Tensor

from certify.convex.interior import propose


def _program(seed: int, n: int, m: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A row and forms that hold around a point of the box: p q >= 0 there, and some of them are equations."""
    generator = torch.Generator().manual_seed(seed)
    p, q = torch.randn(2, m, n, dtype=torch.float64, generator=generator)
    z = torch.cat([torch.ones(1), torch.rand(n - 1, generator=generator) - 0.5]).double()
    q = q * torch.where((p @ z) * (q @ z) < 0, -1.0, 1.0)[:, None].double()
    equal = torch.arange(m) % 5 == 4
    for i in equal.nonzero()[:, 0]:
        q[i, 0] -= q[i] @ z
    p, q = (part / torch.linalg.vector_norm(part, dim=1, keepdim=True) for part in (p, q))
    return torch.randn(n, dtype=torch.float64, generator=generator), p, q, equal


def _form(row: Tensor, p: Tensor, q: Tensor, ranges: Tensor, multipliers: Tensor, level: float) -> Tensor:
    """row(z) - level - sum of the weighted forms, as a matrix over (1, z)."""
    half = (multipliers[:, None] * p).T @ q
    Q = torch.diag(torch.cat([-ranges.sum()[None] - level, ranges])) - (half + half.T) / 2
    Q[0] += row / 2
    Q[:, 0] += row / 2
    return Q


def _clarabel(row: Tensor, p: Tensor, q: Tensor, equal: Tensor) -> float:
    """The optimum by a solver that knows nothing of the forms."""
    n, m = len(row), len(p)
    ranges, multipliers, level = cp.Variable(n - 1, nonneg=True), cp.Variable(m), cp.Variable()
    e = np.eye(n)
    form = cp.diag(cp.hstack([-cp.sum(ranges) - level, ranges]))
    form += (np.outer(e[0], row.numpy()) + np.outer(row.numpy(), e[0])) / 2
    for i in range(m):
        product = np.outer(p[i], q[i])
        form -= multipliers[i] * (product + product.T) / 2
    signs = [multipliers[i] >= 0 for i in range(m) if not equal[i]]
    problem = cp.Problem(cp.Maximize(level), [(form + form.T) / 2 >> 0, *signs])
    return float(problem.solve(solver=cp.CLARABEL))


@pytest.mark.parametrize(("n", "m"), [(1, 0), (2, 1), (4, 0), (5, 6), (9, 20), (14, 40)])
@pytest.mark.parametrize("seed", range(4))
def test_the_level_is_the_optimum_of_a_general_solver(n: int, m: int, seed: int) -> None:
    row, p, q, equal = _program(seed, n, m)
    found = propose(row, p, q, equal)
    assert found is not None
    assert found[2] == pytest.approx(_clarabel(row, p, q, equal), abs=1e-6 * float(row.abs().sum()))


@pytest.mark.parametrize("seed", range(6))
def test_multipliers_are_inside_what_they_claim(seed: int) -> None:
    row, p, q, equal = _program(seed, 12, 30)
    found = propose(row, p, q, equal)
    assert found is not None
    ranges, multipliers, level = found
    assert bool((ranges > 0).all() & ((multipliers > 0) | equal).all())
    assert float(torch.linalg.eigvalsh(_form(row, p, q, ranges, multipliers, level))[0]) > -1e-12


@pytest.mark.parametrize("size", [1e-150, 1e-8, 1e8, 1e150])
def test_levels_scale_with_the_row(size: float) -> None:
    row, p, q, equal = _program(0, 8, 12)
    plain, scaled = propose(row, p, q, equal), propose(row * size, p, q, equal)
    assert plain is not None
    assert scaled is not None
    assert scaled[2] == pytest.approx(plain[2] * size, rel=1e-6)


def test_numbers_that_overflow_give_nothing_or_something_finite() -> None:
    row, p, q, equal = _program(0, 6, 8)
    for bad in (torch.inf, torch.nan, 1e308):
        broken = row.clone()
        broken[2] = bad
        found = propose(broken, p, q, equal)
        assert found is None or bool(torch.isfinite(found[0]).all() & torch.isfinite(found[1]).all())
