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
    """The mean over seeds with a 95 % interval: Student's t over the seeds, or one seed's binomial interval."""

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, rates: Sequence[Rate]) -> Mean:
        """Return the mean of at least one rate."""
        if len(rates) == 1:
            return cls(rates[0].value, rates[0].low, rates[0].high)
        from scipy.stats import t

        values = [rate.value for rate in rates]
        mean = sum(values) / len(values)
        spread = math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1))
        half = float(t.ppf(0.975, len(values) - 1)) * spread / math.sqrt(len(values))
        return cls(mean, max(0.0, mean - half), min(1.0, mean + half))


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
