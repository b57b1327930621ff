"""Ranges of f' and f'' of a sum of Gaussians: they hold all values, and are attained."""

from __future__ import annotations

import math

import mpmath
import pytest
import torch
from torch import Tensor, nn

from certify.enclosures import Interval
from certify.errors import UnsupportedOperation
from models import KAF, KAFFacts
from models.kaf_table import Gaussians
from models.kaf_turns import Turns, errors, evaluate

LINE = torch.tensor([torch.inf], dtype=torch.float64)


def sums(kind: str, channels: int) -> Gaussians:
    torch.manual_seed(1)
    if kind == "far":  # narrow kernels far apart, out of order
        alpha, dictionary = torch.randn(channels, 5), torch.tensor([3.0, -40.0, 11.0, 0.0, 60.0])
        return Gaussians(alpha.double(), dictionary.double(), 30.0)
    convention = "authors" if kind == "authors" else "paper"
    kaf = KAF(channels, init="random" if kind == "random" else "elu", convention=convention)
    alpha, dictionary, gamma = (value.detach().double() for value in kaf.gaussian())
    return Gaussians(alpha + 1e-3 * torch.randn(alpha.shape), dictionary, float(gamma))


def intervals(f: Gaussians, channel: Tensor) -> tuple[Tensor, Tensor]:
    """In and around the dictionary, of widths 1e-4 to 10; the last element is the whole line."""
    low, high = float(f.dictionary.min()) - 1, float(f.dictionary.max()) + 1
    start, size = torch.rand(2, len(channel), dtype=torch.float64)
    lower = low + (high - low) * start
    return torch.cat([lower[:-1], -LINE]), torch.cat([(lower + 10 ** (5 * size - 4))[:-1], LINE])


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("kind", ["random", "elu", "authors", "far"])
def test_a_range_holds_a_dense_grid_and_both_ends_are_attained(kind: str, order: int) -> None:
    f = sums(kind, 60)
    channel = torch.arange(60).repeat(10)
    lower, upper = intervals(f, channel)
    found = Turns.of(f, order).extremes(lower, upper, channel)
    for t in torch.linspace(0, 1, 1201, dtype=torch.float64):
        s = torch.lerp(lower.clamp(-80, 80), upper.clamp(-80, 80), t)
        (value,) = evaluate(f, (order,), s, channel)
        error = errors(f, order, s, channel)
        assert bool(((value + error >= found.low) & (value - error <= found.up)).all())
    for place, bound in ((found.least, found.low), (found.most, found.up)):
        assert bool(((place >= lower) & (place <= upper)).all())
        (value,) = evaluate(f, (order,), place, channel)
        noise = errors(f, order, place, channel)
        top = torch.maximum(found.low.abs(), found.up.abs())
        assert bool(((bound - value).abs() <= 1e-9 * top + 4 * noise).all())
        assert float(((bound - value).abs() / top)[-1]) <= 1e-9  # on the line


@pytest.mark.parametrize("order", [0, 1, 2, 3])
def test_evaluation_errors_are_bounded(order: int) -> None:
    """Against sixty digits, after ridge fitting, where the terms cancel."""
    f = sums("elu", 1)
    s = torch.cat([torch.linspace(-5, 5, 15), torch.tensor([-12.0, 9.0])]).double()
    channel = torch.zeros(len(s), dtype=torch.long)
    (value,), error = evaluate(f, (order,), s, channel), errors(f, order, s, channel)
    with mpmath.workdps(60):
        unit = mpmath.sqrt(2 * mpmath.mpf(f.gamma))
        for point, found, slack in zip(s.tolist(), value.tolist(), error.tolist(), strict=True):
            exact = mpmath.mpf(0)
            for alpha, d in zip(f.alpha[0].tolist(), f.dictionary.tolist(), strict=True):
                v = unit * (mpmath.mpf(point) - mpmath.mpf(d))
                he = (1, v, v**2 - 1, v**3 - 3 * v)[order]
                exact += mpmath.mpf(alpha) * he * mpmath.exp(-(v**2) / 2) * (-unit) ** order
            assert abs(mpmath.mpf(found) - exact) <= slack


def test_a_double_zero_of_the_second_derivative_is_found() -> None:
    """Two kernels one unit from 0 on either side: f'' and f''' are 0 at 0, where f' turns or only halts."""
    for gamma in (0.5, 3.0):
        for shift in (0.0, 1e-7, -1e-7, 1e-3):
            unit = math.sqrt(2 * gamma)
            d = torch.tensor([-1 / unit - shift, 1 / unit + shift], dtype=torch.float64)
            f = Gaussians(torch.tensor([[1.0, 1.0], [-2.0, -2.0]], dtype=torch.float64), d, gamma)
            turns = Turns.of(f, 1)
            assert int(turns.count.max()) <= 12
            s = torch.linspace(-5, 5, 40_001, dtype=torch.float64)
            for channel in range(2):
                owner = torch.full_like(s, channel, dtype=torch.long)
                (value,) = evaluate(f, (1,), s, owner)
                line = turns.extremes(-LINE, LINE, owner[:1])
                assert float(value.max()) <= float(line.up) <= float(value.max()) * (1 + 1e-6)
                near = turns.extremes(s[20_000:20_001] - 0.01, s[20_000:20_001] + 0.01, owner[:1])
                inside = value[(s.abs() <= 0.01)]
                assert float(near.low) <= float(inside.min())
                assert float(near.up) >= float(inside.max())
                assert float(near.up - near.low) <= float(inside.max() - inside.min()) * 1.001 + 1e-9


def test_a_channel_of_zeros_turns_nowhere() -> None:
    f = Gaussians(torch.zeros(3, 4, dtype=torch.float64), torch.arange(4).double(), 1.0)
    turns = Turns.of(f, 1)
    assert int(turns.count.sum()) == 0
    found = turns.extremes(-LINE, LINE, torch.tensor([1]))
    assert float(found.up - found.low) <= 1e-290


def test_blocks_of_channels_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    f = sums("random", 30)
    channel = torch.arange(30).repeat(5)
    lower, upper = intervals(f, channel)
    whole = Turns.of(f, 1).extremes(lower, upper, channel)
    monkeypatch.setattr("models.kaf_turns.BLOCK", 200)
    parts = Turns.of(f, 1).extremes(lower, upper, channel)
    torch.testing.assert_close(parts.low, whole.low, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(parts.up, whole.up, rtol=1e-12, atol=1e-12)


def test_curvature_is_the_range_of_the_derivative_of_the_slope() -> None:
    torch.manual_seed(2)
    facts = KAFFacts(KAF(6, init="tanh").eval().double(), None, 1)
    low = torch.randn(50, 6, dtype=torch.float64)
    z = Interval(low, low + torch.rand(50, 6, dtype=torch.float64))
    found = facts.curvature(z)
    s = z.lower + torch.linspace(0, 1, 2001, dtype=torch.float64).view(-1, 1, 1) * z.width
    f, channel = facts._sum, torch.arange(6).repeat(50)
    second = torch.stack([evaluate(f, (2,), row.reshape(-1), channel)[0].view(50, 6) for row in s])
    torch.testing.assert_close(found.lower, second.amin(0), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.upper, second.amax(0), rtol=1e-5, atol=1e-5)
    small = KAFFacts(KAF(6).eval(), None, 1).curvature(Interval(z.lower.float(), z.upper.float()))
    assert small.lower.dtype == torch.float32
    facts.base, facts.kaf.base = KAFFacts(KAF(1).eval(), None, 1), nn.SiLU()
    with pytest.raises(UnsupportedOperation, match="SiLU"):
        facts.curvature(z)
