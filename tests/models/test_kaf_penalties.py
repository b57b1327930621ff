"""Slope and curvature penalties of KAFs: certified values, gradients of those values, and what a step does."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import models
from certify.errors import InvalidInput, UnsupportedOperation
from models.kaf import KAF
from models.penalties import curvature_penalty, slope_penalty

PENALTIES = [slope_penalty, curvature_penalty]


def _net(**options) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), KAF(4, **options), nn.Dropout(), nn.Linear(4, 5), KAF(1, **options)).double()


def _derivatives(kaf: KAF, s: Tensor) -> tuple[Tensor, Tensor]:
    """f' and f'' [points, channels] by autograd."""
    s = s[:, None].expand(-1, len(kaf.alpha)).clone().requires_grad_()
    (first,) = torch.autograd.grad(kaf(s).sum(), s, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), s)
    return first.detach(), second


@pytest.mark.parametrize("options", [{}, {"init": "elu"}, {"convention": "authors"}, {"trainable": True, "size": 5}])
def test_values_are_certified_and_attained(options: dict) -> None:
    model = _net(**options)
    tops: list[list[Tensor]] = [[], []]
    for kaf in (model[1], model[4]):
        for n, (reach, found) in enumerate(zip((12, 3), tops, strict=True)):
            grid = torch.linspace(-reach, reach, 20001, dtype=torch.float64)
            found.append(_derivatives(kaf, grid)[n].abs().amax(0))
    for penalty, found in zip(PENALTIES, tops, strict=True):
        met, value = float(torch.cat(found).mean()), float(penalty(model).detach())
        assert met * (1 - 1e-9) <= value <= met * (1 + 1e-5)


@pytest.mark.parametrize("penalty", PENALTIES)
@pytest.mark.parametrize("options", [{}, {"init": "tanh"}, {"trainable": True, "size": 6}])
def test_gradients_are_those_of_finite_differences(penalty: Callable[..., Tensor], options: dict) -> None:
    model = _net(**options)
    parameters = [value for kaf in (model[1], model[4]) for value in kaf.parameters()]
    generator = torch.Generator().manual_seed(1)
    for parameter in parameters:  # off ties: the slope of a fitted tanh is even
        parameter.data += 0.01 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    gradients = torch.autograd.grad(penalty(model), parameters)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        direction = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        start, ends = parameter.detach().clone(), []
        for step in (1e-5, -1e-5):
            parameter.data = start + step * direction
            ends.append(float(penalty(model).detach()))
        parameter.data = start
        slope = (ends[0] - ends[1]) / 2e-5
        assert float((gradient * direction).sum()) == pytest.approx(slope, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("penalty", PENALTIES)
def test_a_step_lowers_it(penalty: Callable[..., Tensor]) -> None:
    model = _net().float().train()
    optimiser = torch.optim.SGD(model.parameters(), lr=0.01)
    first = penalty(model)
    first.backward()
    optimiser.step()
    assert float(penalty(model).detach()) < float(first.detach())
    assert all(module.training for module in model.modules())


def test_a_base_adds_its_slopes_and_has_no_curvature() -> None:
    kaf = KAF(3, base=nn.ReLU())
    alone = KAF(3)
    alone.alpha.data = kaf.alpha.data.clone()
    value = slope_penalty(kaf)
    assert float(slope_penalty(alone).detach()) <= float(value.detach()) <= float(slope_penalty(alone).detach()) + 1
    value.backward()
    assert bool((kaf.alpha.grad != 0).any())
    with pytest.raises(UnsupportedOperation, match="curvature"):
        curvature_penalty(kaf)


def test_the_window_counts_and_bad_questions_are_typed_errors() -> None:
    model = _net()
    inner, outer = (float(models.curvature_penalty(model, window).detach()) for window in ((0.0, 0.1), (-9.0, 9.0)))
    assert 0 < inner < outer
    with pytest.raises(InvalidInput, match="window"):
        curvature_penalty(model, (1.0, 0.0))
    for penalty in PENALTIES:
        with pytest.raises(InvalidInput, match="without KAFs"):
            penalty(nn.Linear(2, 2))
    with torch.no_grad():
        assert not slope_penalty(model).requires_grad
