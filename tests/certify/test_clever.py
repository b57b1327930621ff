"""CLEVER: an end point that a known distribution has, near the constant on easy networks, and never called a bound."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import weibull_max
from torch import nn

from certify.errors import InvalidInput, UnsupportedOperation
from certify.lipschitz import lipschitz_constant
from certify.lipschitz.clever import Clever, _end_point
from certify.sets import LpBall
from certify.specs import class_margins

INF = torch.inf


def _smooth() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 12), nn.Tanh(), nn.Linear(12, 3)).eval()


@pytest.mark.parametrize("shape", [1.5, 4.0])
def test_the_fit_finds_the_end_point_of_its_own_family(shape: float) -> None:
    draws = weibull_max.rvs(shape, loc=7.0, scale=2.0, size=400, random_state=np.random.default_rng(0))
    assert draws.max() <= _end_point(draws) == pytest.approx(7.0, abs=0.3)


@pytest.mark.parametrize("p", [2, INF])
def test_it_lies_between_what_is_met_and_a_small_excess_on_a_smooth_network(p: float) -> None:
    model, x = _smooth(), torch.rand(2, 4)
    domain, spec = LpBall(x, 0.2, p=p), class_margins(torch.tensor([0, 2]), 3)
    quick = Clever(batches=20, samples=32)
    for claim in (None, spec):
        found, upper, lower = (
            lipschitz_constant(model, p=p, domain=domain, spec=claim, method=method)
            for method in (quick, "product", "jacobian")
        )
        assert found.side == "estimate"
        assert np.shape(found.rows) == ((2, 2) if claim else (0,))
        assert 0.8 * lower.value <= found.value <= 2 * upper.value


def test_a_constant_gradient_is_its_own_end_point() -> None:
    model = nn.Sequential(nn.Linear(3, 2)).double().eval()
    exact = float(torch.linalg.matrix_norm(model[0].weight.detach(), ord=2))
    found = lipschitz_constant(model, domain=LpBall(torch.zeros(1, 3).double(), 1.0), method="clever")
    assert found.value == pytest.approx(exact, rel=1e-9)


def test_the_same_seed_gives_the_same_estimate_and_touches_no_global_state() -> None:
    model, domain, state = _smooth(), LpBall(torch.rand(1, 4), 0.2), torch.get_rng_state()
    values = {lipschitz_constant(model, domain=domain, method=Clever(batches=5, samples=8)).value for _ in range(2)}
    assert len(values) == 1
    assert torch.equal(state, torch.get_rng_state())


def test_it_is_a_bound_of_nothing() -> None:
    """A steep step that no sample meets: the estimate misses the constant by far, which is why its side is neither."""

    class Step(nn.Module):
        def forward(self, x):
            return torch.clamp(1e6 * (x - 0.123456), 0.0, 1.0)

    domain = LpBall(torch.zeros(1, 1, dtype=torch.float64), 1.0)
    found = lipschitz_constant(Step().eval(), domain=domain, method=Clever(batches=5, samples=8))
    assert found.value < 1e6
    assert found.side == "estimate"


def test_bad_questions_are_typed_errors() -> None:
    with pytest.raises(UnsupportedOperation, match="without a domain"):
        lipschitz_constant(_smooth(), input_shape=(4,), method="clever")
    with pytest.raises(InvalidInput, match="batches=2"):
        Clever(batches=2)
