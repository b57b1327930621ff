"""Activations: every registered one is sound; lines are tight against vertices, dense grids and a linear program."""

import numpy as np
import pytest
import torch
from scipy.optimize import linprog

import certify
import models
from certify.activations.piecewise import PiecewiseLinear
from certify.registry import ACTIVATIONS
from certify.testing import check_activation

OWN = [cls for cls in set(ACTIVATIONS.values()) if "examples" in vars(cls) or isinstance(cls.examples()[0][0], cls)]
CLASSES = [PiecewiseLinear, *sorted(OWN, key=lambda cls: cls.__name__)]
EXAMPLES = [(f"{cls.__name__}-{i}", *example) for cls in CLASSES for i, example in enumerate(cls.examples())]
SMOOTH = [(name, facts) for name, facts, channels in EXAMPLES if channels == 1 and isinstance(facts, certify.Smooth)]


@pytest.mark.parametrize(("name", "facts", "channels"), EXAMPLES, ids=[e[0] for e in EXAMPLES])
def test_every_registered_activation_is_sound(name, facts, channels):
    check_activation(facts, channels)


def least_area(t: np.ndarray, g: np.ndarray) -> np.ndarray:
    """Slope and offset of the line above the points (t, g), 0 <= t <= 1, with the least area: a linear program."""
    found = linprog([0.5, 1], A_ub=-np.stack([t, np.ones_like(t)], 1), b_ub=-g, bounds=[(None, None)] * 2)
    assert found.success
    return found.x


def burden(slope: float, offset: float, g: np.ndarray) -> float:
    """Mean distance (up to a constant) of a line from the points, plus half the larger distance at the ends."""
    return slope / 2 + offset + max(offset - g[0], slope + offset - g[-1]) / 2


def _excess(facts, z: certify.Interval) -> float:
    """By how much our lines burden more than the line of least area or the parallel to the chord, the better one.

    Relative to the burden of those, beyond the rounding of slopes and of f; the chord is taken off and the rest scaled
    to 1 first, so that the solver's tolerance is relative.
    """
    r, low, high = facts.relax(z), float(z.lower), float(z.upper)
    s = np.unique(np.concatenate([np.linspace(low, high, 2001), np.clip(np.linspace(-8, 8, 4001), low, high)]))
    f = facts.forward(torch.as_tensor(s).view(-1, 1, 1, 1)).flatten().numpy()
    t, chord = (s - low) / (high - low), (f[-1] - f[0]) / (high - low)
    worst, noise = 0.0, 1e-6 * (f.max() - f.min()) + 1e-12 + float(facts.rounding_error(z))
    for sign, slope, offset in ((1, r.upper_slope, r.upper_offset), (-1, r.lower_slope, r.lower_offset)):
        g = sign * (f - f[0] - chord * (s - low))
        scale = max(np.abs(g).max(), 1e-300)
        others = burden(*least_area(t, g / scale), g / scale), burden(0.0, (g / scale).max(), g / scale)
        start = float(slope) * low + float(offset) - f[0]
        ours = burden(sign * (float(slope) - chord) * (high - low), sign * start, g)
        worst = max(worst, (ours - min(others) * scale - 2 * noise) / scale)
    return worst


@pytest.mark.parametrize(("name", "facts"), SMOOTH, ids=[name for name, _ in SMOOTH])
def test_smooth_lines_burden_no_more_than_the_least_area_or_the_chord(name, facts):
    generator = torch.Generator().manual_seed(3)
    for _ in range(25):
        center = 4 * torch.randn(1, 1, 1, dtype=torch.float64, generator=generator)
        half = 10 ** (3 * torch.rand(1, 1, 1, dtype=torch.float64, generator=generator) - 2)
        z = certify.Interval(center - half, center + half)
        assert _excess(facts, z) <= 0.01, (float(z.lower), float(z.upper))


@pytest.mark.slow
def test_kaf_lines_burden_no_more_than_the_least_area_or_the_chord_on_500_random_kafs():
    generator = torch.Generator().manual_seed(4)
    for trial in range(500):
        init = ("random", "elu", "tanh", "relu")[trial % 4]
        kaf = models.KAF(1, init=init, convention=("paper", "authors")[trial % 2]).eval()
        with torch.no_grad():
            if init == "random":
                kaf.alpha.copy_(torch.randn(kaf.alpha.shape, generator=generator))
            else:
                kaf.alpha.add_(0.05 * torch.randn(kaf.alpha.shape, generator=generator))
        facts = models.KAFFacts(kaf, None, 2)
        center = 3 * torch.randn(1, 1, 1, dtype=torch.float64, generator=generator)
        half = 10 ** (2.7 * torch.rand(1, 1, 1, dtype=torch.float64, generator=generator) - 2)
        z = certify.Interval(center - half, center + half)
        assert _excess(facts, z) <= 0.06, (trial, float(z.lower), float(z.upper))


def test_kaf_lines_stay_tight_far_outside_the_dictionary():
    kaf = models.KAF(1).eval()
    facts = models.KAFFacts(kaf, None, 2)
    for low, high in ((4.0, 5.0), (6.0, 7.0), (6.0, 8.0), (-1e4, -10.0), (50.0, 60.0)):
        z = certify.Interval(*(torch.full((1, 1, 1), end, dtype=torch.float64) for end in (low, high)))
        truth = facts.forward(torch.linspace(low, high, 20001, dtype=torch.float64).view(-1, 1, 1))
        assert float(facts.relax(z).gap(z)) <= 1.01 * float(truth.max() - truth.min()) + 1e-12


def test_relu_lines_are_the_chord_and_the_nearer_piece():
    facts = PiecewiseLinear((0.0,), (0.0, 1.0))
    z = certify.Interval(torch.tensor([[-1.0, -3.0, 1.0, -2.0]]), torch.tensor([[3.0, 1.0, 2.0, -1.0]]))
    r = facts.relax(z)
    assert torch.equal(r.lower_slope, torch.tensor([[1.0, 0.0, 1.0, 0.0]]))
    assert torch.equal(r.lower_offset, torch.zeros(1, 4))
    assert torch.allclose(r.upper_slope, torch.tensor([[0.75, 0.25, 1.0, 0.0]]))
    assert torch.allclose(r.upper_offset, torch.tensor([[0.75, 0.75, 0.0, 0.0]]))


def test_stable_relus_are_exact_in_float32():
    facts = PiecewiseLinear((0.0,), (0.0, 1.0))
    low = torch.rand(1, 1000) * 10
    z = certify.Interval(low, low + torch.rand(1, 1000))
    r = facts.relax(z)
    assert torch.equal(r.upper_slope, torch.ones(1, 1000))
    assert torch.equal(r.upper_offset, torch.zeros(1, 1000))
    assert torch.equal(r.lower_offset, torch.zeros(1, 1000))


def test_float32_chords_lie_above_relu_at_both_ends_exactly():
    """A rounded chord lies below the function at an end for half of all intervals: offsets must round outward."""
    from fractions import Fraction

    facts = PiecewiseLinear((0.0,), (0.0, 1.0))
    z = certify.Interval(-torch.rand(1, 300), torch.rand(1, 300))
    r = facts.relax(z)
    columns = (z.lower[0], z.upper[0], r.upper_slope[0], r.upper_offset[0])
    for low, high, slope, offset in zip(*(column.tolist() for column in columns), strict=True):
        for end in (low, high):
            assert Fraction(slope) * Fraction(end) + Fraction(offset) >= max(Fraction(end), 0)


def test_infinite_intervals_never_become_finite_lies():
    for _, facts, channels in EXAMPLES:
        z = certify.Interval(torch.full((1, channels, 1), -torch.inf), torch.full((1, channels, 1), torch.inf))
        relaxation = facts.relax(z)
        assert not bool((facts.range(z).lower.isnan() | facts.range(z).upper.isnan()).any())
        for name in ("lower_offset", "upper_offset"):
            value = getattr(relaxation, name)
            assert not bool(torch.isfinite(value).all()) or isinstance(facts, models.KAFFacts) or facts.piecewise


def _intervals(channels: int, dtype: torch.dtype) -> certify.Interval:
    """60 intervals per channel with centres up to 30 and widths from 1e-3 to 20."""
    generator = torch.Generator().manual_seed(5)
    t = torch.rand(4, 60, channels, 1, dtype=torch.float64, generator=generator)
    center, half = torch.sign(t[0] - 0.5) * 10 ** (3 * t[1] - 1.5), 10 ** (4.3 * t[2] - 3.3)
    return certify.Interval((center - half).to(dtype), (center + half).to(dtype))


def _dense(z: certify.Interval) -> torch.Tensor:
    """401 points of z in its dtype, the neighbours of its ends included."""
    t = torch.linspace(0, 1, 401, dtype=z.lower.dtype).view(-1, 1, 1, 1)
    ends = [torch.nextafter(z.lower, z.upper)[None], torch.nextafter(z.upper, z.lower)[None]]
    return torch.cat([torch.minimum(torch.maximum(z.lower + (z.upper - z.lower) * t, z.lower), z.upper), *ends])


def _slacks(facts, z: certify.Interval, r: certify.Relaxation) -> tuple[torch.Tensor, torch.Tensor]:
    """The least distance of f from the lower and from the upper line, but for the rounding of this test."""
    s = _dense(z).double().view(-1, *[1] * (r.lower_slope.dim() - 3), *z.lower.shape)
    y = facts.forward(s.reshape(-1, *z.lower.shape[1:])).view(s.shape)
    low, high = (
        slope.double() * s + offset.double()
        for slope, offset in ((r.lower_slope, r.lower_offset), (r.upper_slope, r.upper_offset))
    )
    switch = facts.rounding_error(z.double()) + 2.0**-48 * (y.abs() + low.abs() + high.abs() + s.abs())
    return (y - low + switch).amin(0), (high - y + switch).amin(0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("name", "facts", "channels"), EXAMPLES, ids=[e[0] for e in EXAMPLES])
def test_every_line_of_a_fan_is_sound(name, facts, channels, dtype):
    z, generator = _intervals(channels, dtype), torch.Generator().manual_seed(6)
    fan = facts.fan(z)
    for alpha in (
        torch.rand(5, *z.lower.shape, dtype=dtype, generator=generator),
        torch.rand(z.lower.shape[1:]).to(dtype),
    ):
        lower, upper = _slacks(facts, z, fan.at((alpha, 1 - alpha)))
        assert lower.shape == torch.broadcast_shapes(alpha.shape, z.lower.shape)
        assert bool((lower >= 0).all())
        assert bool((upper >= 0).all())


@pytest.mark.parametrize(("name", "facts", "channels"), EXAMPLES, ids=[e[0] for e in EXAMPLES])
def test_a_fan_is_ordered_and_starts_from_the_lines_of_relax(name, facts, channels):
    z = _intervals(channels, torch.float64)
    fan, best = facts.fan(z), facts.relax(z)
    assert bool((fan.lower_slope.diff(dim=0) >= 0).all() & (fan.upper_slope.diff(dim=0) >= 0).all())
    start = fan.at((fan.lower_start, fan.upper_start))
    torch.testing.assert_close(start.gap(z), best.gap(z), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(start.lower_slope, best.lower_slope, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(start.upper_slope, best.upper_slope, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("name", "facts", "channels"), EXAMPLES, ids=[e[0] for e in EXAMPLES])
def test_every_line_of_a_fan_touches_the_function(name, facts, channels):
    z = _intervals(channels, torch.float64)
    narrow = certify.Interval(z.lower, torch.minimum(z.upper, z.lower + 3))
    fan, span = facts.fan(narrow), facts.range(narrow).width
    r = certify.Relaxation(fan.lower_slope, fan.lower_offset, fan.upper_slope, fan.upper_offset)
    for slack in _slacks(facts, narrow, r):
        coarse = facts.slope_range(narrow).width * narrow.width / 400  # of a kink between two points
        assert bool(
            (slack <= coarse + 2e-4 * span + 1e-9 * (1 + narrow.magnitude) + facts.rounding_error(narrow)).all()
        )


def test_the_fan_of_relu_is_its_two_pieces_and_the_chord():
    facts = PiecewiseLinear((0.0,), (0.0, 1.0))
    z = certify.Interval(torch.tensor([[-1.0, -3.0, -0.1]]), torch.tensor([[3.0, 1.0, 0.7]]))
    fan, chord = facts.fan(z), facts.relax(z)
    assert torch.equal(fan.lower_slope, torch.tensor([[[0.0] * 3], [[1.0] * 3]]))
    assert torch.equal(fan.lower_offset, torch.zeros(2, 1, 3))
    assert torch.equal(fan.upper_slope, chord.upper_slope.expand(2, 1, 3))
    assert torch.equal(fan.upper_offset, chord.upper_offset.expand(2, 1, 3))
    alpha = torch.tensor([[0.0, 0.25, 1.0]])
    assert torch.equal(fan.at((alpha, alpha)).lower_slope, alpha)


def test_fans_of_infinite_intervals_have_no_nan_and_no_finite_lie():
    for _, facts, channels in EXAMPLES:
        low = torch.tensor([-torch.inf, 0.0]).view(2, 1, 1).expand(2, channels, 1)
        fan = facts.fan(certify.Interval(low, torch.full_like(low, torch.inf)))
        alpha = torch.full((3, 2, channels, 1), 0.3, requires_grad=True)
        r = fan.at((alpha, alpha))
        (r.lower_slope + r.upper_slope).sum().backward()
        assert bool(torch.isfinite(alpha.grad).all())
        assert not any(bool(value.isnan().any()) for value in vars(r).values())
