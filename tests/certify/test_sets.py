"""Perturbation sets: supports against naive truths, projections, exact membership."""

from fractions import Fraction

import numpy as np
import pytest
import torch
from scipy.optimize import linprog, minimize

import certify
from certify.testing import check_set


def _balls(clip):
    x = torch.rand(3, 2, 3)
    return [certify.LpBall(x, 0.3, p=p, clip=clip) for p in (1, 2, torch.inf)]


@pytest.mark.parametrize("clip", [None, (0.0, 1.0)])
@pytest.mark.parametrize("index", range(3))
def test_balls_keep_their_contract(clip, index):
    check_set(_balls(clip)[index])


def test_boxes_keep_their_contract():
    low = torch.randn(3, 4)
    width = torch.rand(3, 4)
    width[:, 1] = 0  # a fixed feature
    check_set(certify.Box(low, low + width))


@pytest.mark.parametrize("p", [1, 2, torch.inf])
def test_radius_zero_is_the_centre(p):
    x = torch.rand(2, 5)
    ball = certify.LpBall(x, 0.0, p=p, clip=(0, 1))
    check_set(ball)
    assert torch.equal(ball.interval().lower, x)
    assert torch.equal(ball.interval().upper, x)


def test_clipped_l1_support_equals_the_linear_program():
    x, r = torch.rand(1, 6, dtype=torch.float64), 0.7
    for _ in range(20):
        a = torch.randn(1, 6, dtype=torch.float64)
        # x = c + u - v, u, v >= 0, sum u + v <= r, 0 <= x <= 1
        c, cost = x[0].numpy(), a[0].numpy()
        A = np.concatenate([np.ones((1, 12)), np.hstack([np.eye(6), -np.eye(6)]), np.hstack([-np.eye(6), np.eye(6)])])
        b = np.concatenate([[r], 1 - c, c])
        best = linprog(np.concatenate([-cost, cost]), A_ub=A, b_ub=b)
        truth = float(cost @ c - best.fun)
        assert float(certify.LpBall(x, r, p=1, clip=(0, 1)).support(a)) == pytest.approx(truth, abs=1e-8)


def _largest_move(cost: np.ndarray, c: np.ndarray, r: float) -> float:
    """max <cost, d> for ||d||_2 <= r and 0 <= c + d <= 1, by a general solver."""
    ball = {"type": "ineq", "fun": lambda d: r**2 - d @ d, "jac": lambda d: -2 * d}
    limits = list(zip(-c, 1 - c, strict=True))
    best = minimize(lambda d: -cost @ d, np.zeros(len(c)), jac=lambda _: -cost, bounds=limits, constraints=ball)
    return -float(best.fun)


def test_clipped_l2_support_equals_a_general_solver():
    x, r = torch.rand(1, 5, dtype=torch.float64), 0.6
    for _ in range(10):
        a = torch.randn(1, 5, dtype=torch.float64)
        c, cost = x[0].numpy(), a[0].numpy()
        truth = float(cost @ c) + _largest_move(cost, c, r)
        assert float(certify.LpBall(x, r, p=2, clip=(0, 1)).support(a)) == pytest.approx(truth, abs=1e-5)


def test_unclipped_supports_are_the_dual_norms():
    x, a = torch.randn(4, 7, dtype=torch.float64), torch.randn(4, 7, dtype=torch.float64)
    for p, q in ((1, torch.inf), (2, 2), (torch.inf, 1)):
        truth = (a * x).sum(1) + 0.3 * torch.linalg.vector_norm(a, ord=q, dim=1)
        found = certify.LpBall(x, 0.3, p=p).support(a)
        assert bool((found >= truth - 1e-14).all())
        assert torch.allclose(found, truth, atol=1e-10)


def test_a_fraction_is_rounded_outward():
    ball = certify.LpBall(torch.zeros(1, 2), Fraction(8, 255))
    assert Fraction(float(ball.radius[0])) >= Fraction(8, 255)
    assert Fraction(float(ball.interval().upper[0, 0])) >= Fraction(8, 255)


def test_contains_is_exact_in_float64():
    # 0.1f + 0.2f in float32 is a little more than 0.2 away from 0.1f.
    center = torch.tensor([[0.1]])
    inside = torch.nextafter(center + 0.2, torch.zeros(1))
    ball = certify.LpBall(center, 0.2)
    for x in (center + 0.2, inside, torch.nextafter(center + 0.2, torch.ones(1))):
        truth = abs(Fraction(float(x)) - Fraction(float(center))) <= Fraction(0.2)
        assert bool(ball.contains(x)) == truth


@pytest.mark.parametrize(
    "make",
    [
        lambda x: certify.LpBall(x, -0.1),
        lambda x: certify.LpBall(x, float("nan")),
        lambda x: certify.LpBall(x, torch.tensor([0.1, 0.2])),
        lambda x: certify.LpBall(x, "much"),
        lambda x: certify.LpBall(x, 0.1, p=3),
        lambda x: certify.LpBall(x, 0.1, clip=(0.9, 1.0)),
        lambda x: certify.LpBall(x.half(), 0.1),
        lambda x: certify.LpBall(x * float("nan"), 0.1),
        lambda x: certify.Box(x, x - 1),
        lambda x: certify.Box(x, x[:1]),
    ],
)
def test_impossible_sets_are_refused_in_three_lines(make):
    with pytest.raises(certify.InvalidInput) as caught:
        make(torch.rand(3, 2))
    assert len(str(caught.value).splitlines()) <= 3
