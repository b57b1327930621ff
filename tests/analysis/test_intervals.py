"""Every printed 95 % interval covers the truth at least 94.5 % of the time, for p from .5 to .999."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import binom

from analysis.records import Rate
from analysis.summary import Mean

TRUTHS = (0.5, 0.7, 0.9, 0.95, 0.98, 0.99, 0.995, 0.999)


@pytest.mark.parametrize("total", [20, 100, 200, 1000])
@pytest.mark.parametrize("p", TRUTHS)
def test_rates_cover(p: float, total: int) -> None:
    """Exactly: the probability of the counts whose interval holds p."""
    counts = np.arange(total + 1)
    likely = counts[binom.pmf(counts, total, p) > 1e-12]
    covered = [count for count in likely if (rate := Rate(int(count), total)).low <= p <= rate.high]
    assert binom.pmf(covered, total, p).sum() >= 0.95 - 1e-9


@pytest.mark.parametrize("seeds", [2, 3, 5])
@pytest.mark.parametrize("p", TRUTHS)
def test_means_over_seeds_cover(p: float, seeds: int) -> None:
    """Simulated with seeds that share their test images wholly, and not at all: both extremes of reality."""
    draw, total = np.random.default_rng(0), 200
    for shared in (False, True):
        counts = draw.binomial(total, p, size=(1500, 1 if shared else seeds))
        counts = np.broadcast_to(counts, (1500, seeds))
        means = {tuple(row): Mean.of([Rate(int(count), total) for count in row]) for row in np.unique(counts, axis=0)}
        covered = [means[tuple(row)].low <= p <= means[tuple(row)].high for row in counts]
        assert np.mean(covered) >= 0.945


@pytest.mark.parametrize(("p", "total", "seeds"), [(0.9, 1000, 10), (0.8, 450, 5), (0.6, 200, 10)])
def test_means_cover_where_seeds_differ_and_share_their_images(p: float, total: int, seeds: int) -> None:
    """Both sources at once, equally large: an error of the images that all seeds share, and one of each seed."""
    draw, hits = np.random.default_rng(2), 0
    spread = np.sqrt(p * (1 - p) / total) * np.sqrt(seeds)
    for _ in range(800):
        shared = draw.binomial(total, p) / total
        rates = np.clip(shared + spread * draw.standard_normal(seeds), 0, 1)
        mean = Mean.of([Rate(round(rate * total), total) for rate in rates])
        hits += mean.low <= p <= mean.high
    assert hits / 800 >= 0.945


def test_means_over_unequal_networks_cover_the_mean_of_all() -> None:
    """Seeds whose true accuracies differ: normal around p with a spread of two points."""
    draw, total, p = np.random.default_rng(1), 500, 0.9
    hits = 0
    for _ in range(600):
        truths = np.clip(p + 0.02 * draw.standard_normal(5), 0, 1)
        mean = Mean.of([Rate(int(draw.binomial(total, truth)), total) for truth in truths])
        hits += mean.low <= p <= mean.high
    assert hits / 600 >= 0.945
