"""Margins to train with are the real-arithmetic bounds of ``prove``, and their gradients are difference quotients."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import certify
from models import KAF

METHODS = ("ibp", "crown-ibp")
STEP = 1e-4  # of difference quotients: lines have slopes of single precision, so shorter steps see its grain


def _kaf(**options) -> nn.Module:
    """A small KAF away from any start function."""
    return KAF(options.pop("channels", 4), size=6, **options)


ACTIVATIONS = {
    "relu": nn.ReLU, "leaky": nn.LeakyReLU, "prelu": lambda: nn.PReLU(4), "relu6": nn.ReLU6, "hardtanh": nn.Hardtanh,
    "sigmoid": nn.Sigmoid, "tanh": nn.Tanh, "softplus": nn.Softplus, "elu": nn.ELU, "silu": nn.SiLU, "gelu": nn.GELU,
    "kaf": _kaf, "kaf-shared": lambda: _kaf(channels=1), "kaf-trainable": lambda: _kaf(trainable=True),
    "kaf-relu": lambda: _kaf(base=nn.ReLU()), "kaf-silu": lambda: _kaf(base=nn.SiLU()),
}  # fmt: skip


def _dense(activation) -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), activation(), nn.Linear(4, 4), activation(), nn.Linear(4, 3))


class Residual(nn.Module):
    """A fork, one module used twice, batch normalisation, a parameter that is no module's weight, both poolings."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.shared = nn.Conv2d(1, 4, 3, 2, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, padding=1)
        self.scale, self.act = nn.Parameter(0.5 + torch.rand(4, 1, 1)), nn.PReLU(4)
        self.pool, self.last = nn.MaxPool2d(3, 2, 1), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.norm(self.conv(x)))
        x = x + self.act(self.shared(x)) * F.softplus(self.scale)
        return self.last(F.avg_pool2d(self.pool(self.shared(x)), 2).flatten(1))


def _case(kind: str) -> tuple[nn.Module, Tensor]:
    """A network in double precision with random statistics, and three points."""
    torch.manual_seed(0)
    shape = (1, 6, 6) if kind in ("conv", "residual", "transposed") else (3,)
    if kind == "residual":
        model: nn.Module = Residual()
        model.norm.running_mean.normal_()
        model.norm.running_var.uniform_(0.5, 2)
    elif kind == "conv":
        model = nn.Sequential(nn.Conv2d(1, 4, 4, 2, 1), nn.SiLU(), nn.Conv2d(4, 4, 2), nn.Tanh(), nn.Flatten(),
                              nn.Linear(16, 3))  # fmt: skip
    elif kind == "transposed":
        model = nn.Sequential(nn.Conv2d(1, 4, 4, 2, 1), nn.ReLU(), nn.ConvTranspose2d(4, 2, 2, 2), nn.ReLU(),
                              nn.AvgPool2d(2), nn.Flatten(), nn.Linear(18, 3))  # fmt: skip
    else:
        model = _dense(ACTIVATIONS[kind])
    return model.double().eval(), torch.randn(3, *shape).double()


CASES = [*ACTIVATIONS, "conv", "transposed", "residual"]
SPEC = certify.class_margins(torch.tensor([0, 1, 2]), 3, torch.float64)


def _margins(model: nn.Module, x: Tensor, method: str, p: float = torch.inf) -> Tensor:
    return certify.training_margins(model, certify.LpBall(x, 0.3, p=p), SPEC, method)


def _check_gradients(model: nn.Module, loss, count: int = 2) -> None:
    """Derivatives of the loss along random directions, parameter by parameter, are central difference quotients."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(loss(), parameters)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        for _ in range(count):
            direction = torch.randn_like(parameter)
            ends = []
            for sign in (1, -1):
                with torch.no_grad():
                    parameter += sign * STEP * direction
                ends.append(float(loss()))
                with torch.no_grad():
                    parameter -= sign * STEP * direction
            quotient = (ends[0] - ends[1]) / (2 * STEP)
            derivative = float((gradient * direction).sum())
            assert abs(quotient - derivative) <= 2e-3 * (0.1 + abs(quotient)), (parameter.shape, quotient, derivative)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", CASES)
def test_margins_are_those_of_prove(kind, method):
    model, x = _case(kind)
    spec = certify.Spec(SPEC.C, SPEC.d + 100)  # a claim that holds at the centre is not refuted
    domain = certify.LpBall(x, 0.3)
    found = certify.training_margins(model, domain, spec, method)
    expected = certify.prove(model, domain, spec, method, arithmetic="real").margin.lower
    assert torch.allclose(found, expected, rtol=1e-12, atol=1e-9)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", CASES)
def test_gradients_are_difference_quotients(kind, method):
    model, x = _case(kind)
    weights = torch.randn(3, 2).double()
    _check_gradients(model, lambda: (weights * _margins(model, x, method)).sum())
