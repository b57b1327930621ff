"""The shipped checks: each passes on good subjects, and on a planted bad one fails with claim, amount and point."""

from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from strategies import Function
from torch import nn

import certify
import models
from certify.activations.base import outward
from certify.activations.smooth import Sigmoid
from certify.lipschitz.product import ProductBound
from certify.lipschitz.sampled import JacobianAscent
from certify.ops.linear import Linear
from certify.registry import ESTIMATORS, OPS
from certify.testing import check_activation, check_estimator, check_op, check_set


class TooNarrow(Sigmoid):
    def range(self, z):
        found = super().range(z)
        return certify.Interval(found.lower, found.upper - 1e-6)


class TooFlat(Sigmoid):
    def slope_range(self, z):
        found = super().slope_range(z)
        return certify.Interval(found.lower, 0.99 * found.upper)


class WithoutSag(Sigmoid):
    """Lines through the extremes of a grid: between its points the function is on the other side."""

    def lines(self, z, slopes):
        slopes = super().lines(z, slopes)
        a, b = slopes.lower_slope.double(), slopes.upper_slope.double()
        grid = torch.linspace(0, 1, 9, dtype=torch.float64).view(-1, *[1] * a.ndim)
        s = z.lower.double() * (1 - grid) + z.upper.double() * grid
        f = torch.sigmoid(s)
        return outward(z.lower.dtype, (a, (f - a * s).amin(0)), (b, (f - b * s).amax(0)))


class TooExact(Sigmoid):
    def rounding_error(self, z):
        return super().rounding_error(z) / 1e3


@pytest.mark.parametrize(
    ("facts", "claim"),
    [
        (TooNarrow(), "TooNarrow: range, upper end"),
        (TooFlat(), "TooFlat: slope range, upper end"),
        (WithoutSag(), "WithoutSag: (lower|upper) line"),
        (TooExact(), "TooExact: rounding error"),
    ],
)
def test_wrong_facts_of_an_activation_are_found(facts, claim):
    check_activation(Sigmoid())
    with pytest.raises(AssertionError, match=claim + r" violated by [\d.e-]+ at -?[\d.e-]+ \(element \d+\)"):
        check_activation(facts)


class WrongTranspose(Linear):
    def transpose(self, A):
        (pulled,) = super().transpose(A)
        return (pulled.flip(1),)


class TooThin(Linear):
    def interval(self, *zs):
        found = super().interval(*zs)
        return certify.Interval(found.lower, found.upper - 0.01 * found.width)


class TooHigh(Linear):
    def interval(self, *zs):
        found = super().interval(*zs)
        return certify.Interval(found.lower + 0.01 * found.width, found.upper)


@pytest.mark.parametrize(
    ("rule", "claim"),
    [
        (WrongTranspose, "equality of pull_back at 'model'"),
        (TooThin, "attained upper end at 'model'"),
        (TooHigh, "attained lower end at 'model'"),
    ],
)
def test_wrong_rules_of_an_operation_are_found(rule, claim, monkeypatch):
    class Mine(nn.Linear):
        def forward(self, x):
            return F.linear(x, self.weight, self.bias)

    layer = Mine(4, 3)
    monkeypatch.setitem(OPS, Mine, lambda call: Linear(call.module.weight, call.module.bias))
    check_op(layer, (4,))
    monkeypatch.setitem(OPS, Mine, lambda call: rule(call.module.weight, call.module.bias))
    with pytest.raises(AssertionError, match=f"{rule.__name__}: {claim} violated by .* at "):
        check_op(layer, (4,))


class TooSmall(certify.LpBall):
    def support(self, a):
        return super().support(a) - 1e-3


class Unprojected(certify.LpBall):
    def project(self, x):
        return x


class Shifted(certify.LpBall):
    def project(self, x):
        return self.center + 0.99 * (super().project(x) - self.center)


@pytest.mark.parametrize(
    ("kind", "claim"),
    [
        (TooSmall, "support"),
        (Unprojected, "membership of a projected or sampled point"),
        (Shifted, "projection of a point of the set"),
    ],
)
@pytest.mark.parametrize("p", [1, 2, torch.inf])
def test_wrong_sets_are_found(kind, claim, p):
    x = torch.rand(3, 4)
    check_set(certify.LpBall(x, 0.2, p=p))
    with pytest.raises(AssertionError, match=rf"{kind.__name__}: {claim} violated by .* at .*\d"):
        check_set(kind(x, 0.2, p=p))


MODELS = {
    "dense": (lambda: nn.Linear(4, 3), (4,)),
    "tanh": (lambda: nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2)), (4,)),
    "kaf": (lambda: nn.Sequential(nn.Linear(4, 6), models.KAF(6), nn.Linear(6, 1)), (4,)),
    "conv": (lambda: nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3)), (1, 4, 4)),
}


@pytest.mark.parametrize("name", sorted(ESTIMATORS))
@pytest.mark.parametrize("kind", MODELS)
def test_every_registered_estimator_stands_on_its_side(name, kind):
    build, shape = MODELS[kind]
    if name.startswith("lipsdp") and kind == "conv":
        pytest.skip("the semidefinite check is for dense sequences")
    check_estimator(name, build(), shape)


@dataclass(frozen=True)
class Scaled:
    """Another estimator's answers, times a factor."""

    base: object
    factor: float

    def estimate(self, question):
        found = self.base.estimate(question)
        rows = tuple(tuple(self.factor * value for value in row) for row in found.rows)
        return replace(found, value=self.factor * found.value, rows=rows)


@pytest.mark.parametrize(
    ("estimator", "claim"),
    [
        (Scaled(ProductBound(), 0.99), "upper value, p=2, .*: Jacobian"),
        (Scaled(JacobianAscent(starts=4, steps=3), 1.01), "lower value, p=2, .*: Jacobian of an affine model"),
    ],
)
def test_an_estimate_wrong_by_one_percent_is_found(estimator, claim):
    check_estimator(estimator.base, nn.Linear(4, 3), (4,))
    with pytest.raises(AssertionError, match=rf"Scaled: {claim} violated by .* at \[.*\]"):
        check_estimator(estimator, nn.Linear(4, 3), (4,))


def test_a_lower_estimate_above_the_product_bound_is_found():
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    with pytest.raises(AssertionError, match="product bound violated"):
        check_estimator(Scaled(JacobianAscent(starts=4, steps=3), 10.0), model, (4,))


def test_an_estimator_that_answers_nothing_does_not_pass():
    class Silent:
        def estimate(self, question):
            raise certify.UnsupportedOperation("no", "a question", "another estimator")

    with pytest.raises(AssertionError, match="refuses every question"):
        check_estimator(Silent(), Function(lambda x: 2 * x), (4,))
