"""A report as Markdown: the sentences and tables of the page, for issues and pull requests."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from analysis.records import NetworkReport, Report
from cli import grids, overview, words
from cli.grids import Grid


def text(report: Report) -> str:
    """Return the Markdown file's text."""
    return "\n\n".join(_parts(report)) + "\n"


def _parts(report: Report) -> Iterator[str]:
    yield f"# {plain(words.title(report))}"
    yield bullets(" ".join(words.verdict(network)) for network in report.networks)
    cautions = words.cautions(report)
    if cautions:
        yield "**Warnings**"
        yield bullets(cautions)
    yield from table(overview.accuracies(report))
    yield from table(overview.standings(report))
    differences = [line for pair in words.contrasts(report.networks) for line in pair]
    if differences:
        yield bullets(differences)
    for network in report.networks:
        yield from _network(network)
    for grid in (overview.settings(report), overview.course(report)):
        if grid is not None:
            yield from table(grid)
    yield bullets(overview.contract(report))


def _network(network: NetworkReport) -> Iterator[str]:
    yield f"## {plain(network.name)}"
    yield from table(overview.classes(network))
    yield from table(overview.closest(network))
    if network.layers is not None:
        yield bullets(network.layers.sentences)
        for grid in grids.layer_grids(network.layers):
            yield from table(grid)


def table(grid: Grid) -> Iterator[str]:
    """Yield the title, the table and its note; nothing for a table without rows."""
    if not grid.rows:
        return
    yield f"### {plain(grid.title)}"
    head, *body = ["| " + " | ".join(map(plain, cells)) + " |" for cells in (grid.head, *grid.rows)]
    rule = "|---|" + "---:|" * (len(grid.head) - 1)
    yield "\n".join([head, rule, *body])
    if grid.note:
        yield plain(grid.note)


def bullets(lines: Iterable[str]) -> str:
    """Return the lines as a list."""
    return "\n".join(f"- {plain(line)}" for line in lines)


def plain(line: str) -> str:
    """Return the text so that Markdown shows it as it is, in one line."""
    return re.sub(r"([\\`*_\[\]<>|#])", r"\\\1", " ".join(line.split()))
