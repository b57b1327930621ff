"""Norm penalties: upper bounds of dense norms, nearly attained, with the gradients of what they return."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import certify
from certify.errors import InvalidInput
from certify.lipschitz.penalties import gram_bound
from certify.lipschitz.spectral import convolution_norm

LAYERS = [
    (nn.Linear(7, 5), (7,)),
    (nn.Linear(3, 20), (4, 3)),
    (nn.Conv2d(2, 3, 3, padding=1), (2, 5, 6)),
    (nn.Conv2d(3, 4, 4, stride=2, padding=1), (3, 7, 7)),
    (nn.Conv2d(2, 2, 3, padding=2, dilation=2), (2, 6, 6)),
    (nn.Conv2d(4, 6, 3, padding=1, groups=2), (4, 4, 4)),
    (nn.Conv2d(4, 4, 3, stride=(2, 1), dilation=(1, 2), groups=4), (4, 7, 8)),
    (nn.Conv1d(2, 3, 5, padding=4), (2, 7)),
    (nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2), (4, 3, 3)),
]


def _penalty(layer: nn.Module, shape: tuple[int, ...]) -> torch.Tensor:
    return certify.penalties.norm_penalty(layer, shape)


@pytest.mark.parametrize(("layer", "shape"), LAYERS, ids=lambda item: str(item)[:50])
def test_a_bound_is_never_below_the_dense_norm(layer: nn.Module, shape: tuple[int, ...]) -> None:
    layer = layer.double()
    size = torch.Size(shape).numel()
    eye = torch.eye(size, dtype=torch.float64).view(size, *shape)
    with torch.no_grad():
        matrix = (layer(eye) - layer(torch.zeros_like(eye))).flatten(1).T
    exact = float(torch.linalg.matrix_norm(matrix, ord=2))
    found = float(_penalty(layer, shape).detach())
    assert exact <= found
    certified = certify.lipschitz_constant(layer.eval(), input_shape=shape, method="product").value
    assert certified * (1 - 1e-9) <= found <= certified * 1.01
    if isinstance(layer, nn.Linear):
        assert found <= exact * 1.01


def test_large_convolutions_are_within_one_percent_of_their_dense_norm() -> None:
    torch.manual_seed(0)
    weight = torch.randn(3, 3, 1, 1, dtype=torch.float64)
    layer = nn.Conv2d(3, 3, 1, bias=False).double()
    layer.weight.data = weight
    exact = float(torch.linalg.matrix_norm(weight[:, :, 0, 0], ord=2))
    assert exact <= float(_penalty(layer, (3, 9, 9)).detach()) <= exact * 1.01
    smooth = nn.Conv2d(2, 2, 3, padding=1, bias=False).double()
    nn.init.constant_(smooth.weight, 1.0)
    eye = torch.eye(2 * 30 * 30, dtype=torch.float64).view(-1, 2, 30, 30)
    with torch.no_grad():
        exact = float(torch.linalg.matrix_norm(smooth(eye).flatten(1), ord=2))
    assert exact <= float(_penalty(smooth, (2, 30, 30)).detach()) <= exact * 1.02


@pytest.mark.parametrize("scale", [0.0, 1e-200, 1.0, 1e200])
@pytest.mark.parametrize("matrix", [torch.eye(40), torch.ones(7, 40), torch.randn(40, 3), torch.zeros(2, 3)])
def test_hard_matrices_keep_their_bound(matrix: torch.Tensor, scale: float) -> None:
    exact = float(torch.linalg.matrix_norm(matrix.double(), ord=2))
    found = float(gram_bound(matrix.double()[None] * scale))
    assert exact * scale * (1 - 1e-15) <= found <= exact * scale * 1.01


@pytest.mark.parametrize(("layer", "shape"), LAYERS, ids=lambda item: str(item)[:50])
def test_gradients_are_those_of_finite_differences(layer: nn.Module, shape: tuple[int, ...]) -> None:
    layer = layer.double()
    (gradient,) = torch.autograd.grad(_penalty(layer, shape), layer.weight)
    direction = torch.randn(gradient.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    start, ends = layer.weight.detach().clone(), []
    for step in (1e-6, -1e-6):
        layer.weight.data = start + step * direction
        ends.append(float(_penalty(layer, shape).detach()))
    layer.weight.data = start
    assert float((gradient * direction).sum()) == pytest.approx((ends[0] - ends[1]) / 2e-6, rel=1e-4, abs=1e-7)


def test_a_step_lowers_it_and_leaves_modes_and_statistics_alone() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(), nn.Flatten(), nn.Linear(64, 3)
    ).train()
    before = {name: value.clone() for name, value in model.named_buffers()}
    optimiser = torch.optim.SGD(model.parameters(), lr=0.01)
    first = certify.penalties.norm_penalty(model, (1, 6, 6))
    first.backward()
    optimiser.step()
    second = certify.penalties.norm_penalty(model, (1, 6, 6))
    assert float(second.detach()) < float(first.detach())
    assert all(module.training for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.named_buffers())
    conv, dense = model[0].weight.detach().double(), model[5].weight.detach().double()
    norms = convolution_norm(conv, (6, 6), (1, 1)) + float(torch.linalg.matrix_norm(dense, ord=2))
    assert float(second.detach()) == pytest.approx(norms, rel=0.01)


def test_zero_weights_have_norm_0_and_no_gradient() -> None:
    layer = nn.Conv2d(1, 2, 3)
    nn.init.zeros_(layer.weight)
    value = _penalty(layer, (1, 5, 5))
    value.backward()
    assert float(value.detach()) == 0
    assert bool((layer.weight.grad == 0).all())
    with torch.no_grad():
        assert not _penalty(layer, (1, 5, 5)).requires_grad


def test_a_model_without_layers_is_refused() -> None:
    with pytest.raises(InvalidInput, match="without dense layers"):
        certify.penalties.norm_penalty(nn.ReLU(), (3,))
