"""Reports in plain sentences, for people who read no tables."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from analysis.comparison import compare
from analysis.records import NetworkReport, PairedRow, RadiusRow
from cli.theme import percent, radius

LEGEND = (
    "clean: right without any change. after attack: still right after the strongest change that the attack found.",
    "certified: PROVED right for every change within the radius (ibp and crown are two ways to prove; ibp is quicker "
    "and looser). The truth lies between certified and after attack.",
)

LAYER_LEGEND = (
    "stretch: how much a layer can lengthen a change (l2): at least (met on samples), at most (certified Lipschitz "
    "constant). moved: l2 distance between its clean and attacked outputs, on average and for the 95th percentile.",
    "width: how uncertain a proof is about a layer's outputs; growth: that width over its inputs' (crown). unstable: "
    "neurons whose bounds contain a kink; gap: distance of the two straight lines around a curve; slack: the "
    "layer's part of what the certificate gives away; gain: what the certified margins would rise by, at most and on "
    "average, if bounds were exact at this layer alone; gradient: how fast the smallest margin changes with the "
    "layer's output (l2, mean over images).",
)


def verdict(report: NetworkReport) -> Iterable[str]:
    """What was found about one network."""
    found = report.evaluation
    yield f"{report.name} is right on {percent(found.clean.value)} of {found.count} images."
    for row in found.rows:
        yield f"At radius {radius(row.radius)} {_between(row)}"


def contrast(first: NetworkReport, second: NetworkReport) -> Iterable[str]:
    """Where two networks differ by more than chance."""
    pairs = compare(first.evaluation, second.evaluation)
    different = [row for row in pairs if row.p_value < 0.01]
    if not different:
        yield f"{first.name} and {second.name} do not differ by more than chance on these images."
    for row in different:
        yield _difference(row, first.name, second.name)


def closing(reports: Sequence[NetworkReport]) -> Iterable[str]:
    """All of it: each network, its layer to blame, and how they differ."""
    for report in reports:
        yield " ".join(verdict(report))
        if report.layers is not None:
            yield f"In {report.name}, {report.layers.sentences[0]}"
    for other in reports[1:]:
        yield " ".join(contrast(reports[0], other))


def _between(row: RadiusRow) -> str:
    best = max((rate.value for rate in row.certified.values()), default=None)
    if best is None:
        return f"{percent(row.attacked.value)} survive the attack."
    if best == row.attacked.value:
        return f"exactly {percent(best)} stay right whatever the change: proof and attack meet."
    return f"between {percent(best)} (proved) and {percent(row.attacked.value)} (attacked) stay right."


def _difference(row: PairedRow, first: str, second: str) -> str:
    at = "" if row.radius is None else f" at radius {radius(row.radius)}"
    word = {"clean": "right", "attacked": "right after the attack", "certified": "certified"}[row.quantity]
    return (
        f"{first} is {word}{at} on {row.first_only} images where {second} is not, and {second} on {row.second_only} "
        f"where {first} is not: more than chance."
    )
