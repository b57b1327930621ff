"""An activation of your own, certified by adding one file: a cubic spline per channel, trained, then proved.

Three things make it certifiable: the module, its curve (f, f', f'', a bound of |f''''|) and the facts, registered by
``@certify.register_activation(Spline)`` above their class.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import certify
from certify.registry import ACTIVATIONS
from certify.rounding import round_down, round_up, step_down, step_up, unit_roundoff

SIZE = 17
KNOTS = torch.arange(SIZE) - SIZE // 2  # in units of 1/2: 2 s is exact in floating point
ROUNDINGS = 100 + SIZE  # of the sum, in units of u max |c|: at most five kernels are not 0, and they sum to 1


def kernel(s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """B, B' and B'' at 2 s - k for every knot k, each [*s, SIZE], with the cubic B-spline B of support [-2, 2]."""
    t = 2 * s[..., None] - KNOTS.to(s)
    outer, inner = (2 - t.abs()).clamp(min=0), (1 - t.abs()).clamp(min=0)
    return (outer**3 - 4 * inner**3) / 6, t.sign() * (4 * inner**2 - outer**2) / 2, outer - 4 * inner


class Spline(nn.Module):
    """f(s) = sum_k c_k B(2 s - k), with trainable c per channel (dimension 1)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.c = nn.Parameter(F.silu(KNOTS / 2).repeat(channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        return (per_channel(self.c, x.ndim - 1) * kernel(x)[0]).sum(-1)


def per_channel(c: Tensor, sample_dims: int) -> Tensor:
    """Coefficients in a shape that broadcasts against [..., channels, *space, SIZE]."""
    return c.view(len(c), *[1] * (sample_dims - 1), SIZE)


@dataclass(frozen=True)
class SplineCurve(certify.Curve):
    """n splines, cubic between the breakpoints."""

    c: Tensor  # [n, SIZE], float64
    breakpoints = tuple(k / 2 for k in range(-SIZE // 2 - 1, SIZE // 2 + 3))

    def values(self, s: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        f, second = ((self.c * basis).sum(-1) for basis in kernel(s)[::2])
        error = ROUNDINGS * 2.0**-52 * self.c.abs().amax(1)
        return f, 4 * second, error, 32 * error

    def slope(self, s: Tensor) -> Tensor:
        return 2 * (self.c * kernel(s)[1]).sum(-1)

    def fourth(self, lower: Tensor, upper: Tensor) -> Tensor:
        return torch.zeros_like(lower)

    def take(self, index: Tensor) -> SplineCurve:
        return SplineCurve(self.c[index])


class SplineFacts(certify.Smooth):
    """f' = sum_k 2 (c_k - c_{k-1}) B2(...) is a mean of the differences, with quadratic B-splines B2 as weights."""

    def __init__(self, spline: Spline, sample_dims: int) -> None:
        self.c = per_channel(spline.c.detach(), sample_dims)

    @classmethod
    def from_call(cls, call):
        return cls(call.module, len(call.input_shape))

    @classmethod
    def examples(cls):
        spline = Spline(3)
        spline.c.data.add_(0.3 * torch.randn(3, SIZE, generator=torch.Generator().manual_seed(0)))
        return [(cls(spline, 2), 3)]

    def forward(self, x: Tensor) -> Tensor:
        return (self.c.to(x) * kernel(x)[0]).sum(-1)

    def curve(self, shape: torch.Size, device: torch.device) -> SplineCurve:
        return SplineCurve(self.c.double().to(device).expand(*shape, SIZE).reshape(-1, SIZE))

    def slope_range(self, z: certify.Interval) -> certify.Interval:
        slopes = 2 * F.pad(self.c.double(), (1, 1)).diff()
        lower, upper = step_down(slopes.amin(-1)), step_up(slopes.amax(-1))
        lower, upper = round_down(lower, z.lower.dtype), round_up(upper, z.lower.dtype)
        return certify.Interval(lower.expand_as(z.lower), upper.expand_as(z.lower))

    def rounding_error(self, z: certify.Interval) -> Tensor:
        u = unit_roundoff(z.lower.dtype)
        return (ROUNDINGS * u * self.c.to(z.lower).abs().amax(-1)).expand_as(z.lower)


@pytest.fixture(scope="module", autouse=True)
def _registered():
    """In the place of the decorator: other tests list what is registered, and this example is not shipped."""
    certify.register_activation(Spline)(SplineFacts)
    yield
    del ACTIVATIONS[Spline]


@pytest.mark.parametrize(("facts", "channels"), SplineFacts.examples())
def test_the_facts_hold(facts, channels):
    certify.testing.check_activation(facts, channels)


def _trained() -> tuple[nn.Module, Tensor, Tensor]:
    """A spline network after some training on four quadrants, and points with their labels."""
    model = nn.Sequential(nn.Linear(2, 16), Spline(16), nn.Linear(16, 2))
    x = 2 * torch.rand(256, 2) - 1
    labels = (x[:, 0] * x[:, 1] > 0).long()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    for _ in range(60):
        optimizer.zero_grad()
        F.cross_entropy(model(x), labels).backward()
        optimizer.step()
    return model.eval(), x, labels


def test_a_trained_network_is_certified():
    model, x, labels = _trained()
    assert not torch.equal(model[1].c[0], Spline(1).c[0])  # the activation itself has learned
    domain, claim = certify.LpBall(x, 0.02), certify.class_margins(labels, 2)
    found = certify.prove(model, domain, claim, "crown", attack=certify.attacks.PGD(steps=10))
    assert int(found.holds.sum()) > 200
    for point in domain.sample(50):
        rows = claim.rows(model(point))
        assert bool((rows >= found.margin.lower).all())
        assert bool((rows[found.holds] > 0).all())


def test_bounds_of_a_convolutional_network_hold():
    model = nn.Sequential(nn.Conv2d(1, 3, 3), Spline(3), nn.Flatten(), nn.Linear(48, 2)).eval()
    domain = certify.LpBall(torch.rand(4, 1, 6, 6), 0.05)
    found = certify.bounds(model, domain)
    for point in domain.sample(50):
        y = model(point)
        assert bool(((found.lower <= y) & (y <= found.upper)).all())
