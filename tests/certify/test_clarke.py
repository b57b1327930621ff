"""Bounds of slope matrices: never below what is met, exact where nothing is unknown, relaxed better than intervals."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from test_lipschitz import _networks
from torch import nn

from certify.errors import InvalidInput, UnsupportedOperation
from certify.lipschitz import lipschitz_constant
from certify.lipschitz.clarke import CrownJacobian, IntervalJacobian
from certify.lipschitz.recursion import Recursion
from certify.lipschitz.sampled import JacobianAscent
from certify.lipschitz.tightest import Tightest
from certify.memory import options
from certify.sets import Box, LpBall
from certify.specs import Spec, class_margins
from certify.testing import check_estimator
from models import KAF

INF = torch.inf
METHODS = ("interval-jacobian", "crown-jacobian")


def _kafs() -> nn.Module:
    torch.manual_seed(5)
    model = nn.Sequential(nn.Linear(4, 6), KAF(6), nn.Linear(6, 6), KAF(6, init="elu"), nn.Linear(6, 3))
    return model.eval()


def _cases() -> list[tuple[nn.Module, tuple[int, ...]]]:
    leaky = nn.Sequential(nn.Linear(4, 8), nn.LeakyReLU(0.2), nn.Linear(8, 8), nn.PReLU(8), nn.Linear(8, 3)).eval()
    return [*_networks(), (_kafs(), (4,)), (leaky, (4,))]


def _rows(model, shape, p, domain, spec, method) -> np.ndarray:
    return np.array(lipschitz_constant(model, p=p, domain=domain, spec=spec, method=method, input_shape=shape).rows)


@pytest.mark.parametrize("p", [2, INF])
@pytest.mark.parametrize("case", range(11))
def test_what_is_met_is_below_both_and_relaxing_is_no_worse(case: int, p: float) -> None:
    model, shape = _cases()[case]
    x = torch.rand(2, *shape, generator=torch.Generator().manual_seed(case))
    spec = class_margins(torch.tensor([0, 2]), 3)
    for domain in (LpBall(x, 0.1, p=p), None):
        ascent = JacobianAscent(starts=4, steps=6)
        met, *bounds = (_rows(model, shape, p, domain, spec, method) for method in (ascent, *METHODS))
        assert (met <= bounds[1]).all()
        assert (bounds[1] <= bounds[0]).all()
        met, *values = (
            lipschitz_constant(model, p=p, domain=domain, method=method, input_shape=shape).value
            for method in (ascent, *METHODS)
        )
        assert met <= values[1] <= values[0]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("case", [0, 1, 3, 4, 6, 9, 10])
def test_the_shipped_check_of_estimators_passes(case: int, method: str) -> None:
    model, shape = _cases()[case]
    check_estimator(method, model, shape, count=15)


@pytest.mark.parametrize("case", [0, 1, 4, 9])
def test_relaxing_gains_where_there_are_two_hidden_layers(case: int) -> None:
    model, shape = _cases()[case]
    domain = LpBall(torch.rand(1, *shape, generator=torch.Generator().manual_seed(case)), 0.3)
    spec = class_margins(torch.tensor([1]), 3)
    for p in (2, INF):
        interval, crown = (_rows(model, shape, p, domain, spec, method) for method in METHODS)
        assert crown.sum() < 0.995 * interval.sum()


@pytest.mark.parametrize("p", [2, INF])
@pytest.mark.parametrize("method", METHODS)
def test_stable_neurons_leave_nothing_open(method: str, p: float) -> None:
    """One hidden layer whose signs are known: the network is affine on the domain."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3)).double().eval()
    x = torch.rand(1, 5, dtype=torch.float64)
    with torch.no_grad():
        signs = (model[0](x)[0] > 0).double()
        matrix = model[2].weight * signs @ model[0].weight
    domain = LpBall(x, 1e-3, p=p)
    exact = float(torch.linalg.matrix_norm(matrix, ord=p))
    found = lipschitz_constant(model, p=p, domain=domain, method=method).value
    assert exact <= found <= exact * (1 + 1e-9)
    spec = class_margins(torch.tensor([0]), 3, dtype=torch.float64)
    rows = torch.linalg.vector_norm(spec.C[0] @ matrix, ord=2 if p == 2 else 1, dim=1).detach().numpy()
    found = _rows(model, (5,), p, domain, spec, method)[0]
    assert ((rows <= found) & (found <= rows * (1 + 1e-9))).all()


def test_one_open_slope_is_bounded_exactly() -> None:
    """x -> a relu(x) + x over a crossing interval: slopes 1 and 1 + a."""

    class Model(nn.Module):
        def forward(self, x):
            return -3 * torch.relu(x) + x

    for method in METHODS:
        found = lipschitz_constant(Model().eval(), domain=Box(-torch.ones(1, 1), torch.ones(1, 1)), method=method)
        assert found.value == pytest.approx(2)
        assert found.side == "upper"


@pytest.mark.parametrize("p", [2, INF])
def test_inputs_that_cannot_be_the_largest_have_no_slope(p: float) -> None:
    model = nn.Sequential(nn.MaxPool2d(2), nn.Flatten()).eval()
    x = torch.tensor([[[[0.0, 1.0], [0.2, 0.3]]]])
    for method in METHODS:
        far = lipschitz_constant(model, p=p, domain=LpBall(x, 0.1), method=method).value
        assert far == pytest.approx(1)
        near = lipschitz_constant(model, p=p, domain=LpBall(x, 0.6), method=method).value
        assert near >= 1
    assert near == pytest.approx(1)  # the relaxed pass knows that the choices of a window add up to 1


def test_blocks_of_rows_change_nothing() -> None:
    model, shape = _cases()[1]
    domain = LpBall(torch.rand(2, *shape), 0.1)
    spec = class_margins(torch.tensor([0, 2]), 3)
    for method in METHODS:
        whole = _rows(model, shape, 2, domain, spec, method)
        with options(memory=2000):
            parts = _rows(model, shape, 2, domain, spec, method)
        np.testing.assert_allclose(parts, whole, rtol=1e-12)


def test_what_explodes_is_large_or_infinite_and_not_a_number() -> None:
    model = _networks()[0][0].double()
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(1e90)
    for method in METHODS:
        found = lipschitz_constant(model, domain=LpBall(torch.zeros(1, 4).double(), 1e20), method=method)
        assert found.value > 1e200


def test_options_are_checked_and_unknown_operations_refused() -> None:
    model = nn.Sequential(nn.Linear(3, 2)).eval()
    spec = Spec(torch.ones(1, 1, 2), torch.zeros(1, 1))
    found = lipschitz_constant(model, spec=spec, input_shape=(3,), method=IntervalJacobian("ibp"))
    assert found.method == "interval-jacobian"
    with pytest.raises(InvalidInput, match="no intervals of layers"):
        lipschitz_constant(model, input_shape=(3,), method=CrownJacobian("auto-lirpa/ibp"))
    with pytest.raises(UnsupportedOperation):
        lipschitz_constant(nn.Sequential(nn.LayerNorm(3)).eval(), input_shape=(3,), method="crown-jacobian")


@pytest.mark.parametrize("p", [2, INF])
@pytest.mark.parametrize("spec", [None, class_margins(torch.tensor([0, 2]), 3)])
def test_the_tightest_bound_is_the_least_of_all(p: float, spec: Spec | None) -> None:
    model, shape = _cases()[0]
    domain = LpBall(torch.rand(2, *shape), 0.1, p=p)
    quick = Recursion(steps=10)
    least = lipschitz_constant(model, p=p, domain=domain, spec=spec, method=Tightest(recursion=quick))
    for method in (quick, "product", *METHODS):
        other = lipschitz_constant(model, p=p, domain=domain, spec=spec, method=method)
        assert least.value <= other.value
        for mine, theirs in zip(least.rows, other.rows, strict=True):
            assert all(a <= b for a, b in zip(mine, theirs, strict=True))
    anywhere = lipschitz_constant(model, p=p, input_shape=shape, spec=spec, method=quick)
    assert least.value <= anywhere.value
    lower = lipschitz_constant(model, p=p, domain=domain, spec=spec, method="jacobian")
    assert lower.value <= least.value
