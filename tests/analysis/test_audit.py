"""The audit flags what hides from attacks, and not what withstands them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from analysis import audit as auditing
from analysis.audit import Audit, audit
from analysis.protocol import Protocol
from certify.errors import InvalidInput
from models.data import load
from models.networks import architecture, build
from models.training import TrainConfig, train

RADIUS = Fraction(1, 10)


def _trained(activation: str, recipe: dict[str, object], epochs: int = 12) -> nn.Module:
    digits = load("digits")
    model = build(architecture("cnn", digits.input_shape, 10, activation, width=8), seed=0)
    config = TrainConfig.from_dict({"epochs": epochs, "engine": {"device": "cpu"}, "recipe": recipe})
    return train(model, digits, config).model


@pytest.fixture(scope="module")
def nets() -> dict[str, nn.Module]:
    plain = _trained("relu", {"name": "standard"})
    return {
        "standard": plain,
        "adversarial": _trained("relu", {"name": "pgd", "radius": 0.1}),
        "kwta": _trained("kwta", {"name": "standard"}),
        "softmax": _Head(plain, lambda y: y.softmax(1)),
    }


class _Head(nn.Module):
    """A network behind a function of its outputs."""

    def __init__(self, model: nn.Module, head: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.model, self.head = model, head

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.model(x))


def _audit(model: nn.Module, images: int = 60, surrogate: nn.Module | None = None) -> Audit:
    digits = load("digits")
    x, y = digits.test_x[:images], digits.test_y[:images]
    return audit(model, x, y, Protocol(radii=(RADIUS,)), radius=RADIUS, surrogate=surrogate)


def _flagged(found: Audit) -> set[str]:
    return {finding.check for finding in found.findings if finding.verdict == "flagged"}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["standard", "adversarial"])
def test_honest_networks_are_not_flagged(name: str, nets: dict[str, nn.Module]) -> None:
    other = nets["standard" if name == "adversarial" else "adversarial"]
    found = _audit(nets[name], surrogate=other)
    assert found.trusted, _flagged(found)
    assert {finding.verdict for finding in found.findings} == {"passed"}


@pytest.mark.slow
def test_winner_takes_all_is_flagged_for_its_masked_gradients(nets: dict[str, nn.Module]) -> None:
    found = _audit(nets["kwta"])
    assert not found.trusted
    assert {"loss surface follows its gradient", "black box no stronger than white box"} & _flagged(found)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the checks that attack nothing."""
    monkeypatch.setattr(auditing, "CHECKS", auditing.CHECKS[:4])


@pytest.mark.usefixtures("quick")
def test_a_softmax_output_is_flagged(nets: dict[str, nn.Module]) -> None:
    assert "softmax output" in _flagged(_audit(nets["softmax"], 10))


class _Noisy(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        y = self.model(x)
        return y + 0.01 * torch.randn_like(y)


class _Purifier(nn.Module):
    """Takes a gradient step on its input before it answers."""

    def __init__(self, model: nn.Module, gradient: Callable[..., Any] = torch.autograd.grad) -> None:
        super().__init__()
        self.model, self.gradient = model, gradient

    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            point = x.detach().requires_grad_()
            (gradient,) = self.gradient(self.model(point).square().sum(), point)
        return self.model(x - 1e-4 * gradient)


def _by_backward(loss: Tensor, point: Tensor) -> tuple[Tensor]:
    point.retain_grad()
    loss.backward()
    assert point.grad is not None
    return (point.grad,)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    ("wrap", "check"),
    [
        (_Noisy, "randomised output"),
        (_Purifier, "optimisation at inference"),
        (lambda model: _Purifier(model, _by_backward), "optimisation at inference"),
        (lambda model: _Head(model, lambda y: y.detach() + 0 * y), "zero gradients"),
        (lambda model: _Head(model, lambda y: (4 * y).round()), "zero gradients"),
    ],
)
def test_each_trick_is_named(wrap: Callable[[nn.Module], nn.Module], check: str, nets: dict[str, nn.Module]) -> None:
    engine = torch.autograd._engine_run_backward
    assert check in _flagged(_audit(wrap(nets["standard"]), 8))
    assert engine is torch.autograd._engine_run_backward


def test_records_survive_json_and_images_that_are_wrong_are_left_out() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3)).eval()
    x = torch.rand(12, 1, 2, 2)
    y = model(x).argmax(1)
    y[:4] = (y[:4] + 1) % 3
    found = audit(model, x, y, Protocol(radii=(RADIUS,)), radius=RADIUS)
    assert found.count == 8
    assert Audit.from_dict(found.to_dict()) == found
    assert found.to_dict()["trusted"] is found.trusted
    assert not found.enough
    with pytest.raises(InvalidInput, match="radius 0"):
        audit(model, x, y, Protocol(radii=(RADIUS,)), radius=Fraction(0))
    twin = copy.deepcopy(model).double()
    with pytest.raises(InvalidInput, match=r"surrogate of 3 classes in torch\.float64"):
        audit(model, x, y, Protocol(radii=(RADIUS,)), radius=RADIUS, surrogate=twin)
    with pytest.raises(InvalidInput, match="none of 12"):
        audit(model, x, (model(x).argmax(1) + 1) % 3, Protocol(radii=(RADIUS,)), radius=RADIUS)


def test_how_many_images_are_attacked_together_changes_no_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).double().eval()
    x = torch.rand(10, 1, 2, 2, dtype=torch.float64)
    y = model(x).argmax(1)
    found = audit(model, x, y, Protocol(radii=(RADIUS,)), radius=RADIUS)
    monkeypatch.setattr(auditing, "TOGETHER", 3)
    assert audit(model, x, y, Protocol(radii=(RADIUS,)), radius=RADIUS) == found
