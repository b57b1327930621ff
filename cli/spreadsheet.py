"""A report as CSV: a row per network and radius, every rate as a share with both ends of its 95 % interval."""

from __future__ import annotations

import csv
import io

from analysis.records import NetworkReport, RadiusRow, Rate, Report
from cli.overview import KNOWN, methods_of
from cli.theme import fraction

ENDS = ("", " low", " high")


def text(report: Report) -> str:
    """Return the CSV file's text."""
    methods = methods_of(report)
    rates = ["clean", "attacked", *(f"certified {method}" for method in methods)]
    heads = ["network", "source", "parameters", "norm", "radius", "radius exact", "samples"]
    heads += (
        [f"{name}{end}" for name in rates for end in ENDS]
        + [f"count {word}" for word in KNOWN.values()]
        + ["arithmetic", "seed"]
    )
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(heads)
    for network in report.networks:
        for place, row in enumerate(network.evaluation.rows):
            writer.writerow(_line(network, place, row, methods))
    return stream.getvalue()


def _line(network: NetworkReport, place: int, row: RadiusRow, methods: tuple[str, ...]) -> list[object]:
    found = network.evaluation
    rates = [found.clean, row.attacked, *(row.certified.get(method) for method in methods)]
    words: list[str] = [sample.outcomes[place].verdict for sample in found.samples]
    return [
        *(
            network.name,
            network.source,
            network.parameters,
            found.norm,
            float(row.radius),
            fraction(row.radius),
            found.count,
        ),
        *(end for rate in rates for end in _ends(rate)),
        *(words.count(word) for word in KNOWN),
        *(found.arithmetic, found.seed),
    ]


def _ends(rate: Rate | None) -> tuple[object, ...]:
    return ("", "", "") if rate is None else (rate.value, rate.low, rate.high)
