"""Two networks on the same samples: a paired comparison, which sees what two intervals side by side hide."""

from __future__ import annotations

from collections.abc import Iterable
from fractions import Fraction

from analysis.records import Evaluation, PairedRow
from certify.errors import InvalidInput


def compare(first: Evaluation, second: Evaluation) -> tuple[PairedRow, ...]:
    """Return, for clean, attacked and certified accuracy, how many samples only one of the two gets right.

    Both must be evaluated on the same samples and radii (``InvalidInput`` otherwise). Certified means by any method.
    Reference: McNemar (1947), with the exact binomial test.
    """
    if not alike(first, second):
        raise InvalidInput("two evaluations of different samples or radii", "the same ones", "evaluate them alike")
    pairs = list(zip(first.samples, second.samples, strict=True))
    rows = [_paired("clean", None, ((a.correct, b.correct) for a, b in pairs))]
    for place, radius in enumerate(row.radius for row in first.rows):
        met = [(a.outcomes[place], b.outcomes[place]) for a, b in pairs]
        rows.append(_paired("attacked", radius, ((not a.attacked, not b.attacked) for a, b in met)))
        rows.append(_paired("certified", radius, ((a.verdict == "holds", b.verdict == "holds") for a, b in met)))
    return tuple(rows)


def alike(first: Evaluation, second: Evaluation) -> bool:
    """Return whether both were made on the same samples and radii."""
    places = [[(sample.index, sample.label) for sample in item.samples] for item in (first, second)]
    radii = [[row.radius for row in item.rows] for item in (first, second)]
    return places[0] == places[1] and radii[0] == radii[1]


def _paired(quantity: str, radius: Fraction | None, pairs: Iterable[tuple[bool, bool]]) -> PairedRow:
    from scipy.stats import binomtest

    found = list(pairs)
    first = sum(a and not b for a, b in found)
    second = sum(b and not a for a, b in found)
    p_value = float(binomtest(min(first, second), first + second).pvalue) if first + second else 1.0
    return PairedRow(quantity, radius, first, second, p_value)
