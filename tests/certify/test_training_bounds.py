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
SEARCHED = ("sigmoid", "tanh", "softplus", "elu", "silu", "gelu", "conv", "kaf")  # slopes have single precision


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


def _check_gradients(parameters, loss, step: float = 1e-6) -> None:
    """Derivatives of the loss along random directions, parameter by parameter, are central difference quotients."""
    parameters = list(parameters)
    gradients = torch.autograd.grad(loss(), parameters)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        direction = torch.randn_like(parameter)
        ends = []
        with torch.no_grad():
            for move in (step, -2 * step):
                parameter += move * direction
                ends.append(float(loss()))
            parameter += step * direction
        quotient, derivative = (ends[0] - ends[1]) / (2 * step), float((gradient * direction).sum())
        assert abs(quotient - derivative) <= 20 * step**0.75 * (0.1 + abs(quotient)), (parameter.shape, quotient)


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
    searched = method == "crown-ibp" and kind.startswith(SEARCHED)
    _check_gradients(
        model.parameters(), lambda: (weights * _margins(model, x, method)).sum(), 1e-4 if searched else 1e-6
    )


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("p", [1.0, 2.0, torch.inf])
def test_balls_of_all_norms_have_gradients(p, method):
    model, x = _case("prelu")
    for clip in (None, (-3.0, 3.0)):
        ball = certify.LpBall(x, 0.3, p=p, clip=clip)
        _check_gradients(model.parameters(), lambda: certify.training_margins(model, ball, SPEC, method).sum())  # noqa: B023


@pytest.mark.parametrize("method", METHODS)
def test_the_centre_of_a_linf_ball_has_a_gradient(method):
    model, x = _case("residual")
    x.requires_grad_()
    _check_gradients([x], lambda: _margins(model, x, method).sum())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["residual", "kaf-trainable"])
def test_gradients_of_a_sum_are_the_sum_of_gradients(kind, method):
    """Two bounds and the clean loss of one model in one backward pass, or each in its own."""
    model, x = _case(kind)
    parts = [
        lambda: F.cross_entropy(model(x), torch.tensor([0, 1, 2])),
        lambda: _margins(model, x, method).sum(),
        lambda: F.softplus(-_margins(model, x + 1, method)).sum(),
    ]
    gradients = []
    for losses in ([sum(part() for part in parts)], [part() for part in parts]):
        model.zero_grad()
        for loss in losses:
            loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    for joint, separate in zip(*gradients, strict=True):
        assert torch.allclose(joint, separate, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", ["residual", "kaf"])
def test_margins_follow_the_parameters_from_step_to_step(kind):
    """After two steps the margins, and their gradients, are those of a fresh copy."""
    model, x = _case(kind)
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    for _ in range(2):
        optimizer.zero_grad()
        F.softplus(-_margins(model, x, "crown-ibp")).sum().backward()
        optimizer.step()
    optimizer.zero_grad()
    twin = copy.deepcopy(model)
    found = [_margins(m, x, "crown-ibp").sum() for m in (model, twin)]
    assert torch.equal(*found)
    torch.autograd.backward(found)
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(model.parameters(), twin.parameters(), strict=True))


@pytest.mark.parametrize("activation", [nn.ReLU, lambda: KAF(32, init="elu")])
def test_training_raises_the_certified_accuracy(activation):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 32), activation(), nn.Linear(32, 32), activation(), nn.Linear(32, 2))
    x = 2 * torch.rand(128, 2) - 1
    labels = (x[:, 0] * x[:, 1] > 0).long()
    ball, claim = certify.LpBall(x, 0.05), certify.class_margins(labels, 2)
    optimizer = torch.optim.Adam(model.parameters(), 0.02)

    def certified() -> int:
        return int(certify.prove(model.eval(), ball, claim, "ibp").holds.sum())

    before = certified()
    model.train()
    for _ in range(30):
        optimizer.zero_grad()
        F.softplus(-5 * certify.training_margins(model, ball, claim)).mean().backward()
        optimizer.step()
    assert model.training
    assert certified() >= before + 25


def test_layers_whose_modes_differ_must_be_in_eval_mode():
    model, x = _case("residual")
    model.train()
    with pytest.raises(certify.InvalidModel, match=r"BatchNorm2d at 'norm' is in train mode"):
        _margins(model, x, "ibp")
    model.norm.eval()
    expected = _margins(model, x, "ibp")
    assert model.training
    assert not model.norm.training
    assert torch.equal(expected, _margins(model.eval(), x, "ibp"))
    with pytest.raises(certify.InvalidModel, match="Dropout"):
        _margins(nn.Sequential(nn.Linear(3, 3), nn.Dropout()).double().train(), torch.randn(3, 3).double(), "ibp")


def test_other_methods_are_refused():
    model, x = _case("relu")
    with pytest.raises(certify.InvalidInput, match="'crown' for training"):
        _margins(model, x, "crown")


def test_proofs_leave_no_gradients():
    model, x = _case("kaf")
    assert not certify.bounds(model, certify.LpBall(x, 0.1)).lower.requires_grad
    certify.prove(model, certify.LpBall(x, 0.1), SPEC, "alpha-crown")
    assert all(p.grad is None for p in model.parameters())
