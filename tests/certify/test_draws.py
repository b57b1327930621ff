"""Random numbers per sample: SplitMix64's own, the same whoever else is in the batch, and uniform."""

from __future__ import annotations

import pytest
import torch

from certify.draws import Draws, sample_seeds
from certify.sets import Box, LpBall

MASK = 2**64 - 1


def _mix(z: int) -> int:
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


@pytest.mark.parametrize("seed", [0, 1, 7, 2**62 - 1])
def test_the_numbers_are_those_of_splitmix64(seed: int) -> None:
    golden = 0x9E3779B97F4A7C15
    start = _mix((_mix(seed) + golden) & MASK)
    truth = [(_mix((start + (k + 1) * golden) & MASK) >> 11) * 2.0**-53 for k in range(6)]
    draws = Draws(torch.tensor([seed]), 1)
    assert [*draws.uniform(4)[0].tolist(), *draws.uniform(2)[0].tolist()] == truth


def test_seeds_of_all_sizes_give_samples_seeds_of_their_own() -> None:
    index = torch.arange(3)
    assert sample_seeds(5, index).tolist() == [5 * 2**32, 5 * 2**32 + 1, 5 * 2**32 + 2]
    found = [sample_seeds(seed, index) for seed in (0, 1, 2**31, 2**32, 2**32 + 1, 2**33, 2**63 - 1)]
    assert len(torch.cat(found).unique()) == 3 * len(found)


def test_a_samples_numbers_depend_on_its_own_seed_alone() -> None:
    seeds = torch.tensor([5, 9, 2**40, 3])
    whole = Draws(seeds, len(seeds))
    first, second = whole.uniform(3, 2), whole.take(torch.tensor([3, 1])).uniform(5)
    alone = Draws(seeds[1:2], 1)
    assert torch.equal(alone.uniform(3, 2)[0], first[1])
    assert torch.equal(alone.uniform(5)[0], second[1])


def test_uniform_normal_integers_and_signs_have_their_moments() -> None:
    draws = Draws(torch.arange(500), 500)
    uniform, normal, signs = draws.uniform(400), draws.normal(400), draws.signs(400)
    assert uniform.min() >= 0
    assert uniform.max() < 1
    assert abs(float(uniform.mean()) - 0.5) < 5 * (1 / 12 / 2e5) ** 0.5
    assert abs(float(uniform.var()) - 1 / 12) < 1e-3
    assert abs(float(normal.mean())) < 5 / 2e5**0.5
    assert abs(float(normal.var()) - 1) < 0.02
    assert abs(float(signs.mean())) < 5 / 2e5**0.5
    neighbours = torch.corrcoef(torch.stack([uniform[:-1].flatten(), uniform[1:].flatten()]))[0, 1]
    assert abs(float(neighbours)) < 5 / 2e5**0.5
    counts = torch.bincount(Draws(torch.arange(30000), 30000).integers(3), minlength=3)
    assert bool(((counts - 10000).abs() < 500).all())


def test_a_generator_gives_the_same_streams_and_moves_on() -> None:
    one, two = (torch.Generator().manual_seed(3) for _ in range(2))
    first = Draws(one, 4).uniform(2)
    assert torch.equal(first, Draws(two, 4).uniform(2))
    assert not torch.equal(first, Draws(one, 4).uniform(2))


def test_a_generator_that_is_not_needed_stands_still() -> None:
    state = torch.get_rng_state()
    Draws(None, 3)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("p", [1, 2, torch.inf])
def test_sets_sample_by_seed_whoever_else_is_there(p: float) -> None:
    x = torch.rand(5, 7, generator=torch.Generator().manual_seed(0))
    seeds, few = torch.arange(10, 15), torch.tensor([4, 2])
    for domain in (LpBall(x, 0.2, p=p, clip=(0.0, 1.0)), Box(x - 0.1, x + 0.1)):
        points = domain.sample(3, seeds)
        assert torch.equal(domain.take(few).sample(3, seeds[few]), points[:, few])
        assert torch.equal(domain.sample(3, Draws(seeds, len(seeds))), points)


@pytest.mark.parametrize("p", [1, 2, torch.inf])
def test_a_ball_knows_distances_and_takes_another_radius(p: float) -> None:
    x = torch.rand(4, 6, generator=torch.Generator().manual_seed(1))
    ball = LpBall(x, 0.1, p=p, clip=(torch.zeros(4, 6), torch.ones(4, 6)))
    wide = ball.with_radius(torch.tensor([0.1, 0.2, 0.3, 0.4])).take(torch.tensor([3, 1]))
    assert wide.radius.tolist() == pytest.approx([0.4, 0.2])
    y = wide.project(torch.full((2, 6), 2.0))
    assert bool((wide.distance(y) <= wide.radius).all())
    truth = torch.linalg.vector_norm((y - x[[3, 1]]).double(), ord=p, dim=1)
    torch.testing.assert_close(wide.distance(y), truth, rtol=1e-6, atol=1e-6)
    assert bool((wide.with_radius(9.0).hull.upper <= 1).all())
