"""Diagnoses against known numbers: gains, gradient norms, and planted NaNs."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models import KAF, mlp
from models.activations import factory
from models.diagnosis import activations, channels_of, gain, nan_origin, watched
from models.networks import architecture, build
from models.training.gradients import gradient_norms, gradient_ratio


def exact_gain(f: Callable[[float], float], slope: Callable[[float], float]) -> float:
    """E f'(z)^2 / Var f(z) for a normal z by adaptive quadrature."""
    from scipy.integrate import quad

    def expected(g: Callable[[float], float]) -> float:
        return quad(lambda z: g(z) * math.exp(-z * z / 2) / math.sqrt(2 * math.pi), -12, 12, points=[0.0])[0]

    mean = expected(f)
    return expected(lambda z: slope(z) ** 2) / expected(lambda z: (f(z) - mean) ** 2)


KNOWN = {
    "relu": (lambda z: max(z, 0.0), lambda z: float(z > 0)),
    "tanh": (math.tanh, lambda z: 1 - math.tanh(z) ** 2),
    "elu": (lambda z: z if z > 0 else math.expm1(z), lambda z: 1.0 if z > 0 else math.exp(z)),
    "silu": (
        lambda z: z / (1 + math.exp(-z)),
        lambda z: (1 + math.exp(-z) + z * math.exp(-z)) / (1 + math.exp(-z)) ** 2,
    ),
}


@pytest.mark.parametrize("name", KNOWN)
def test_gains_are_those_of_adaptive_quadrature(name: str) -> None:
    assert gain(factory(name)(1)) == pytest.approx(exact_gain(*KNOWN[name]), rel=1e-3)


def test_the_gain_of_relu_is_known_exactly() -> None:
    assert gain(nn.ReLU()) == pytest.approx(0.5 / (0.5 - 1 / (2 * math.pi)), rel=1e-3)


def test_the_gain_of_a_random_kaf_is_large_whatever_its_scale() -> None:
    torch.manual_seed(0)
    kaf = KAF(200)
    first = gain(kaf, 200)
    with torch.no_grad():
        kaf.alpha.mul_(0.01)
    assert first == pytest.approx(gain(kaf, 200), rel=1e-6)
    assert 3.0 < first < 3.4  # 3.2 is known for many channels


def test_what_is_no_function_of_single_values_has_no_gain() -> None:
    assert gain(factory("kwta")(1)) is None
    constant = KAF(1)
    with torch.no_grad():
        constant.alpha.zero_()
    assert gain(constant) is None


def small(batchnorm: bool = True) -> nn.Module:
    torch.manual_seed(0)
    return build(architecture("cnn7", (1, 8, 8), 4, "tanh", width=4, batchnorm=batchnorm), seed=0)


def test_gradient_norms_are_those_of_the_loss_and_nothing_is_left_behind() -> None:
    model = small().eval()
    x, y = torch.rand(6, 1, 8, 8), torch.arange(6) % 4
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = gradient_norms(model, x, y)
    assert list(found) == [f"conv{i}" for i in range(1, 6)] + ["linear1", "linear2"]
    assert not any(module.training for module in model.modules())
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    model.train()
    F.cross_entropy(model(x), y).backward()
    for name, norm in found.items():
        assert norm == pytest.approx(float(model.get_submodule(name).weight.grad.norm()), rel=1e-4)
    assert gradient_ratio(found) == found["conv1"] / found["linear1"]
    assert gradient_ratio({"a": 2.0, "b": 0.5}) == 4.0
    assert gradient_ratio({"a": 2.0, "b": 0.0}) == math.inf


class Poison(nn.Module):
    """NaN from the forward pass, or infinite gradients from the backward pass."""

    def __init__(self, forward: bool) -> None:
        super().__init__()
        self.at_once = forward

    def forward(self, x: Tensor) -> Tensor:
        return x / 0 * 0 if self.at_once else torch.sqrt(x * 0) + x.detach()


@pytest.mark.parametrize("index", [1, 3])
def test_the_first_value_that_is_not_finite_is_named(index: int) -> None:
    torch.manual_seed(0)
    layers = [nn.Flatten(), nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)]
    x, y = torch.rand(2, 4), torch.tensor([0, 1])
    assert nan_origin(nn.Sequential(*layers), x, y) is None
    assert nan_origin(nn.Sequential(*layers[:index], Poison(True), *layers[index:]), x, y) == f"the output of {index}"
    assert nan_origin(nn.Sequential(*layers), x / 0, y) == "the input"


def test_infinite_gradients_and_parameters_are_named() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), Poison(False), nn.Linear(5, 3))
    x, y = torch.rand(2, 4), torch.tensor([0, 1])
    assert nan_origin(model, x, y) in ("the gradient of 0.bias", "the gradient of 0.weight")
    with torch.no_grad():
        model[2].bias[1] = torch.nan
    assert nan_origin(model, x, y) == "the parameter 2.bias"


@pytest.mark.parametrize("name", ["silu+kaf", "relu+kaf"])
def test_the_base_of_a_kaf_is_no_layer_of_its_own(name: str) -> None:
    assert list(activations(mlp([6, 5, 4, 3], name))) == ["act1", "act2"]
    assert list(activations(factory(name)(3))) == [""]


def test_activations_and_their_channels_are_found() -> None:
    model = mlp([6, 5, 4, 3], "kaf").eval()
    assert list(activations(model)) == ["act1", "act2"]
    assert channels_of(model, torch.rand(1, 6)) == {"act1": 5, "act2": 4}
    with watched(activations(model)) as seen:
        model(torch.rand(2, 6))
    assert seen["act1"][0].shape == (2, 5)
    assert not any(module._forward_hooks for module in model.modules())
