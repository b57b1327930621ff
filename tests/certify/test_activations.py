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


def best_gap(s: np.ndarray, f: np.ndarray) -> float:
    """The smallest possible mean distance of two lines around the points (s, f): two linear programs.

    The chord is taken off and the rest scaled to 1 first, so that the solver's tolerance is relative.
    """
    t = (s - s[0]) / (s[-1] - s[0])
    rest = f - (f[0] + (f[-1] - f[0]) * t)
    scale = np.abs(rest).max()
    if scale == 0:
        return 0.0
    rows = np.stack([t - 0.5, np.ones_like(t)], 1)
    free = [(None, None)] * 2
    above = linprog([0, 1], A_ub=-rows, b_ub=-rest / scale, bounds=free)
    below = linprog([0, -1], A_ub=rows, b_ub=rest / scale, bounds=free)
    assert above.success
    assert below.success
    return (above.x[1] - below.x[1]) * scale


def _excess(facts, z: certify.Interval) -> float:
    """By how much the mean gap of our lines exceeds the best one, beyond 1e-4 (max f - min f), relatively."""
    gap, low, high = (float(value) for value in (facts.relax(z).gap(z), z.lower, z.upper))
    s = np.unique(np.concatenate([np.linspace(low, high, 2001), np.clip(np.linspace(-8, 8, 4001), low, high)]))
    f = facts.forward(torch.as_tensor(s).view(-1, 1, 1, 1)).flatten().numpy()
    best = best_gap(s, f)
    return (gap - best - 1e-4 * (f.max() - f.min())) / max(best, 1e-300)


@pytest.mark.parametrize(("name", "facts"), SMOOTH, ids=[name for name, _ in SMOOTH])
def test_smooth_lines_are_within_five_percent_of_the_best_pair(name, facts):
    generator = torch.Generator().manual_seed(3)
    for _ in range(25):
        center = 4 * torch.randn(1, 1, 1, dtype=torch.float64, generator=generator)
        half = 10 ** (3 * torch.rand(1, 1, 1, dtype=torch.float64, generator=generator) - 2)
        z = certify.Interval(center - half, center + half)
        assert _excess(facts, z) <= 0.05, (float(z.lower), float(z.upper))


@pytest.mark.slow
def test_kaf_lines_are_within_five_percent_of_the_best_pair_on_500_random_kafs():
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
        half = 10 ** (3.5 * torch.rand(1, 1, 1, dtype=torch.float64, generator=generator) - 2)
        z = certify.Interval(center - half, center + half)
        assert _excess(facts, z) <= 0.05, (trial, float(z.lower), float(z.upper))


def test_kaf_lines_stay_tight_far_outside_the_dictionary():
    kaf = models.KAF(1).eval()
    facts = models.KAFFacts(kaf, None, 2)
    for low, high in ((4.0, 5.0), (6.0, 8.0), (-1e4, -10.0), (50.0, 60.0)):
        z = certify.Interval(*(torch.full((1, 1, 1), end, dtype=torch.float64) for end in (low, high)))
        truth = facts.forward(torch.linspace(low, high, 20001, dtype=torch.float64).view(-1, 1, 1))
        assert float(facts.relax(z).gap(z)) <= 1.05 * float(truth.max() - truth.min()) + 1e-290


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
        for name in ("lower_offset", "upper_offset"):
            value = getattr(relaxation, name)
            assert not bool(torch.isfinite(value).all()) or isinstance(facts, models.KAFFacts) or facts.piecewise
