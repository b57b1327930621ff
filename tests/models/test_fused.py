"""Fused KAFs in networks: certificates cover what runs, second derivatives are right, other forms stay as they are."""

from __future__ import annotations

import copy

import pytest
import torch

import certify
from models import KAF, fuse, fusion, mlp

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # inductor's own; without a compiler, ours


def test_second_derivatives_are_those_of_the_eager_sum() -> None:
    torch.manual_seed(3)
    eager = KAF(3)
    fused = fuse(copy.deepcopy(eager))
    for shape in ((4, 3), (2, 3, 4)):
        points, found = torch.randn(shape), []
        for kaf in (eager, fused):
            x = points.clone().requires_grad_()
            (gradient,) = torch.autograd.grad(kaf(x).square().sum(), x, create_graph=True)
            found.append(torch.autograd.grad(gradient.square().sum(), (x, kaf.alpha)))
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(b, a, rtol=1e-3, atol=1e-3)


def test_certificates_hold_for_fused_networks() -> None:
    """The contract covers fused arithmetic: outputs at corners and random points lie in the float bounds."""
    torch.manual_seed(5)
    model = fuse(mlp([8, 20, 20, 3], "kaf-elu")).eval()
    x = torch.rand(4, 8)
    for radius in (1e-6, 1e-2):
        ball = certify.LpBall(x, radius)
        bounds = certify.bounds(model, ball, "crown")
        with torch.no_grad():
            for points in [*ball.sample(50), ball.interval().lower, ball.interval().upper]:
                y = model(ball.project(points))
                assert bool(((y >= bounds.lower) & (y <= bounds.upper)).all())
    assert not fusion._broken


def test_doubles_stay_eager() -> None:
    torch.manual_seed(6)
    for free in (False, True):
        kaf, x = KAF(3, trainable=free).double(), torch.randn(5, 3, dtype=torch.float64)
        assert torch.equal(fuse(copy.deepcopy(kaf))(x), kaf(x))


def test_users_may_compile_a_fused_network_themselves() -> None:
    torch.manual_seed(7)
    kaf, x = fuse(KAF(4)), torch.randn(6, 4)
    torch.testing.assert_close(torch.compile(kaf)(x), kaf(x), rtol=1e-5, atol=1e-5)
