"""The tables of a whole report: accuracies, what is known of how many images, classes, close calls, settings."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from analysis.plain import encode
from analysis.records import NetworkReport, Outcome, Rate, Report, SampleRecord
from certify.rounding import EXCLUSIONS
from cli.grids import Grid
from cli.theme import number, percent, radius, rate, seconds

#: Samples listed of those about which nothing is known.
CLOSEST = 10
#: What is known of a sample, in words of ``Outcome.verdict``, and what it is called here; "timeout" if there are any.
KNOWN = {"holds": "certified", "unknown": "unknown", "timeout": "timeout", "violated": "broken"}


def methods_of(report: Report) -> tuple[str, ...]:
    """Return the methods of all networks, in order, each once."""
    return tuple(dict.fromkeys(method for network in report.networks for method in network.evaluation.methods))


def of_all(report: Report) -> tuple[Grid, ...]:
    """Return the tables that hold all networks."""
    return accuracies(report), standings(report)


def accuracies(report: Report) -> Grid:
    """Clean, attacked and certified accuracy per network and radius."""
    methods = methods_of(report)
    rows = []
    for network, place in _places(report):
        row = network.evaluation.rows[place]
        certified = (rate(row.certified[method]) if method in row.certified else "-" for method in methods)
        rows.append((network.name, radius(row.radius), rate(network.evaluation.clean), rate(row.attacked), *certified))
    heads = "network", "radius", "clean", "after attack", *(f"certified\n({method})" for method in methods)
    return Grid("Accuracy in percent (95 % interval)", heads, tuple(rows))


def standings(report: Report) -> Grid:
    """How many samples are certified, unknown and broken; those wrong without any change are a part of the broken."""
    found = [(network, place, _counts(network, place)) for network, place in _places(report)]
    shown = [word for word in KNOWN if word != "timeout" or any(counts["timeout"] for *_, counts in found)]
    rows = []
    for network, place, counts in found:
        clean = network.evaluation.clean
        cells = [counts[word] for word in shown] + [clean.total - clean.count]
        at = radius(network.evaluation.rows[place].radius)
        rows.append((network.name, at, *(f"{cell} ({percent(cell / clean.total)})" for cell in cells)))
    heads = "network", "radius", *(KNOWN[word] for word in shown), "of these wrong\nunchanged"
    return Grid("What is known of how many images", heads, tuple(rows))


def _places(report: Report) -> Iterator[tuple[NetworkReport, int]]:
    for network in report.networks:
        for place in range(len(network.evaluation.rows)):
            yield network, place


def _counts(network: NetworkReport, place: int) -> dict[str, int]:
    words: list[str] = [sample.outcomes[place].verdict for sample in network.evaluation.samples]
    return {word: words.count(word) for word in KNOWN}


def classes(network: NetworkReport) -> Grid:
    """Accuracies class by class, certified by any method."""
    radii = [row.radius for row in network.evaluation.rows]
    heads = ["class", "images", "clean"]
    heads += [f"{what}\n{radius(at)}" for at in radii for what in ("attacked", "proved")]
    groups: dict[int, list[SampleRecord]] = {}
    for sample in network.evaluation.samples:
        groups.setdefault(sample.label, []).append(sample)
    rows = []
    for label, samples in sorted(groups.items()):
        cells = [str(label), str(len(samples)), rate(Rate(sum(s.correct for s in samples), len(samples)))]
        for place in range(len(radii)):
            found = [sample.outcomes[place] for sample in samples]
            cells.append(rate(Rate(sum(not outcome.attacked for outcome in found), len(found))))
            cells.append(rate(Rate(sum(outcome.verdict == "holds" for outcome in found), len(found))))
        rows.append(tuple(cells))
    title = f"Class by class: {network.name}, accuracy in percent (95 % interval)"
    return Grid(title, tuple(heads), tuple(rows), note="proved: certified by any method")


def closest(network: NetworkReport) -> Grid:
    """The images that stand and are not certified: those closest to a proof first."""
    methods = network.evaluation.methods
    open_ = [
        (best, sample, outcome)
        for sample in network.evaluation.samples
        for outcome in sample.outcomes
        if outcome.verdict in ("unknown", "timeout") and (best := _best(outcome)) is not None
    ]
    open_.sort(key=lambda item: (-item[0], item[1].index, item[2].radius))
    rows = []
    for _, sample, outcome in open_[:CLOSEST]:
        values = (sample.margin, outcome.worst, *(outcome.lower.get(method) for method in methods))
        rows.append((str(sample.index), radius(outcome.radius), str(sample.label), *map(number, values)))
    heads = "image", "radius", "class", "margin", "worst\nmet", *(f"proved\n({method})" for method in methods)
    note = f"{len(rows)} of {len(open_)} pairs of image and radius that neither proof nor attack decides"
    return Grid("Closest to a proof", heads, tuple(rows), note=note)


def _best(outcome: Outcome) -> float | None:
    return max((value for value in outcome.lower.values() if value is not None), default=None)


def settings(report: Report) -> Grid:
    """All that repeats the report: command, options, seed, versions."""
    arguments = {name: value for name, value in report.arguments.items() if value is not None}
    rows = [("command", f"certify {report.command}"), ("samples", report.samples), ("seed", str(report.seed))]
    rows += [(f"--{name.replace('_', '-')}", _plain(value)) for name, value in arguments.items() if name != "seed"]
    rows += [(f"version of {name}", version) for name, version in report.versions.items()]
    for network in report.networks:
        found = network.evaluation
        rows += [
            (f"{network.name}: network", f"{network.network}, {network.parameters:,} parameters ({network.source})"),
            (f"{network.name}: normalisation", network.normalisation),
            (f"{network.name}: attack", f"{found.attack}, seed {found.seed}"),
            (f"{network.name}: perturbations", f"{found.norm} balls" + _clip(found.clip)),
            (f"{network.name}: arithmetic", found.arithmetic),
        ]
    return Grid("Settings", ("what", "value"), tuple(rows))


def _clip(clip: tuple[float, float] | None) -> str:
    return "" if clip is None else f", pixels stay in [{clip[0]:g}, {clip[1]:g}]"


def _plain(value: Any) -> str:
    value = encode(value)
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def course(report: Report) -> Grid | None:
    """Where and how long it ran, if anybody kept it."""
    if report.course is None:
        return None
    rows = [("machine", "", report.course.machine)]
    for name, tasks in report.course.seconds.items():
        rows += [(name, task, seconds(spent)) for task, spent in tasks.items()]
    return Grid("Hardware and time", ("network", "task", "value"), tuple(rows))


def contract(report: Report) -> tuple[str, ...]:
    """What the bounds hold for, and what they do not cover."""
    said = []
    for name in dict.fromkeys(network.evaluation.arithmetic for network in report.networks):
        if name == "real":
            said.append("Bounds are those of real arithmetic: how computers round is not covered.")
        else:
            said.append(
                f"Bounds ({name}) hold for the network as float arithmetic computes it, in any order of summation. "
                f"Not covered: {', '.join(EXCLUSIONS)}."
            )
    return tuple(said)
