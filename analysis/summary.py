"""A sweep's results over their seeds: means with intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from analysis.plain import Record
from analysis.records import Rate
from analysis.sweep import Result


@dataclass(frozen=True)
class Mean(Record):
    """The mean over seeds with a 95 % interval that covers both its sources: the seeds, and the test images.

    Its ends lie as far from the mean as the root of the squares of both: Student's t over the seeds, and the binomial
    interval of the mean on as many test images (all seeds are judged on the same, more seeds make no more images).
    """

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, rates: Sequence[Rate]) -> Mean:
        """Return the mean of at least one rate."""
        values = [rate.value for rate in rates]
        mean, total = sum(values) / len(values), min(rate.total for rate in rates)
        low, high = Rate(math.floor(mean * total), total).low, Rate(math.ceil(mean * total), total).high
        if len(rates) > 1:
            from scipy.stats import t

            spread = math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1))
            half = float(t.ppf(0.975, len(values) - 1)) * spread / math.sqrt(len(values))
            low, high = mean - math.hypot(mean - low, half), mean + math.hypot(high - mean, half)
            low, high = max(0.0, low), min(1.0, high)
        return cls(mean, low, high)


@dataclass(frozen=True)
class Summary(Record):
    """One network, activation and recipe over its seeds; ``failed`` of them gave no numbers."""

    network: str
    activation: str
    recipe: str
    seeds: int
    failed: int
    overfitted: int
    seconds: float
    clean: Mean | None
    attacked: tuple[Mean, ...]
    certified: tuple[Mean, ...]


def summarise(results: Sequence[Result]) -> tuple[Summary, ...]:
    """Return a row per network, recipe and activation, in the order of the results."""
    groups: dict[tuple[str, str, str], list[Result]] = {}
    for result in results:
        groups.setdefault((result.cell.network, result.cell.activation, result.cell.recipe), []).append(result)
    return tuple(_summary(*key, found) for key, found in groups.items())


def _summary(network: str, activation: str, recipe: str, results: Sequence[Result]) -> Summary:
    good = [result for result in results if result.clean is not None]
    return Summary(
        network,
        activation,
        recipe,
        seeds=len(results),
        failed=len(results) - len(good),
        overfitted=sum(bool(result.overfitted) for result in good),
        seconds=sum(result.seconds for result in good) / max(1, len(good)),
        clean=Mean.of([result.clean for result in good if result.clean is not None]) if good else None,
        attacked=_means([result.attacked for result in good]),
        certified=_means([result.certified for result in good]),
    )


def _means(rows: Sequence[tuple[Rate, ...]]) -> tuple[Mean, ...]:
    return tuple(Mean.of(column) for column in zip(*rows, strict=True))
