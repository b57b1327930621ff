"""Reports in plain sentences, for people who read no tables."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from analysis.comparison import alike, compare
from analysis.gates import GateResult
from analysis.records import Evaluation, NetworkReport, PairedRow, RadiusRow, Rate, Report
from cli.theme import images, percent, radius, rate, share

#: Intervals wider than this say little.
WIDE = 0.1

#: What can be wanted of a network, in a word or two.
QUANTITY = {"clean": "clean", "attacked": "after attack", "certified": "certified"}

LEGEND = (
    "clean: right without any change. after attack: still right after the strongest change that the attack found.",
    "certified: PROVED right for every change within the radius (ibp and crown are two ways to prove; ibp is quicker "
    "and looser); unknown and timeout count as not certified. The truth lies between certified and after attack.",
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
    yield f"{report.name} is right on {percent(found.clean.value)} of {images(found.count)}."
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


def contrasts(reports: Sequence[NetworkReport]) -> Iterable[tuple[str, ...]]:
    """How each other network differs from the first one, where both were measured on the same images."""
    for other in reports[1:]:
        if alike(reports[0].evaluation, other.evaluation):
            yield tuple(contrast(reports[0], other))


def title(report: Report) -> str:
    """What a report is about."""
    names = [network.name for network in report.networks]
    listed = " and ".join(filter(None, [", ".join(names[:-1]), names[-1]])) if names else "no network"
    return f"Robustness of {listed}"


def cautions(report: Report) -> tuple[str, ...]:
    """What lowers trust in the numbers: what was noted when they were made, and what they show themselves."""
    said = list(report.warnings)
    for network in report.networks:
        found = network.evaluation
        widest = max((rate.high - rate.low for rate in _rates(found)), default=0.0)
        if widest > WIDE:
            said.append(
                f"{network.name} was measured on {images(found.count)}: the 95 % intervals are up to "
                f"{100 * widest:.0f} points wide."
            )
        late = sum(outcome.verdict == "timeout" for sample in found.samples for outcome in sample.outcomes)
        if late:
            said.append(f"{network.name}: {late} questions ran out of time; they count as not certified.")
        if not found.methods:
            said.append(f"{network.name}: nothing was certified, and an attack that fails proves nothing.")
        if found.methods and found.arithmetic == "real":
            said.append(f"{network.name}: bounds are those of real arithmetic, and computers round.")
    return tuple(dict.fromkeys(said))


def _rates(found: Evaluation) -> Iterable[Rate]:
    yield found.clean
    for row in found.rows:
        yield row.attacked
        yield from row.certified.values()


def closing(reports: Sequence[NetworkReport]) -> Iterable[str]:
    """All of it: each network, its layer to blame, and how they differ."""
    for report in reports:
        yield " ".join(verdict(report))
        if report.layers is not None:
            yield f"In {report.name}, {report.layers.sentences[0]}"
    for lines in contrasts(reports):
        yield " ".join(lines)


def claim(result: GateResult) -> str:
    """What a gate is about: certified at radius 8/255."""
    at = "" if result.radius is None else f" at radius {radius(result.radius)}"
    return f"{QUANTITY[result.quantity]}{at}"


def measure(result: GateResult) -> str:
    """What a gate wanted and what was measured."""
    met = result.measured
    return f"wanted at least {share(result.wanted)} %, measured {rate(met)} %: {met.count} of {images(met.total)}"


def judgement(results: Sequence[GateResult]) -> str:
    """Whether all gates are met, and which are not."""
    failed = [result for result in results if not result.passed]
    if not failed:
        return "The gate is met." if len(results) == 1 else f"All {len(results)} gates are met."
    named = "; ".join(f"{result.network} {claim(result)}" for result in failed)
    return f"{len(failed)} of {len(results)} gates failed: {named}."


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
        f"{first} is {word}{at} on {images(row.first_only)} where {second} is not, and {second} on {row.second_only} "
        f"where {first} is not: more than chance."
    )
