"""Floating-point error: directed rounding, gamma, and the precision that the engine insists on."""

from fractions import Fraction

import pytest
import torch

import certify
from certify.rounding import gamma, ieee, round_down, round_up, unit_roundoff


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_directed_rounding_brackets_every_number(dtype):
    x = torch.randn(2000, dtype=torch.float64) * 10 ** (20 * torch.rand(2000, dtype=torch.float64) - 10)
    for value, low, high in zip(x.tolist(), round_down(x, dtype).tolist(), round_up(x, dtype).tolist(), strict=True):
        assert low <= value <= high


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gamma_bounds_a_sum_of_products_in_any_order(dtype):
    n = 50
    for _ in range(20):
        a, b = torch.randn(n, dtype=dtype), torch.randn(n, dtype=dtype)
        exact = sum(Fraction(p) * Fraction(q) for p, q in zip(a.tolist(), b.tolist(), strict=True))
        size = sum(abs(Fraction(p) * Fraction(q)) for p, q in zip(a.tolist(), b.tolist(), strict=True))
        for order in (torch.arange(n), torch.randperm(n), torch.arange(n).flip(0)):
            total = torch.zeros((), dtype=dtype)
            for i in order.tolist():
                total = total + a[i] * b[i]
            assert abs(Fraction(float(total)) - exact) <= Fraction(gamma(n, dtype)) * size
    assert gamma(1, dtype) >= unit_roundoff(dtype)


def test_the_engine_does_not_trust_the_callers_matmul_precision():
    """At "medium" the CPU may multiply in bfloat16, with errors far beyond the contract."""
    model = torch.nn.Sequential(torch.nn.Linear(512, 512), torch.nn.ReLU(), torch.nn.Linear(512, 10)).eval()
    domain = certify.LpBall(torch.randn(2, 512), 0.01)
    want = certify.bounds(model, domain)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        got = certify.bounds(model, domain)
        inside = torch.get_float32_matmul_precision()
    finally:
        torch.set_float32_matmul_precision(before)
    assert inside == "medium"  # the caller's choice came back
    assert torch.equal(got.lower, want.lower)
    assert torch.equal(got.upper, want.upper)


def test_full_precision_is_restored_after_an_error():
    before = torch.backends.mkldnn.matmul.fp32_precision
    with pytest.raises(ZeroDivisionError), ieee():
        raise ZeroDivisionError
    assert torch.backends.mkldnn.matmul.fp32_precision == before
