"""A report as Markdown: the sentences and tables of the page, for issues and pull requests."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from analysis.records import NetworkReport, Report
from cli import grids, overview, words
from cli.extra import NOTHING, Extra
from cli.grids import Grid


def text(report: Report, extra: Extra = NOTHING) -> str:
    """Return the Markdown file's text."""
    return "\n\n".join(_parts(report, extra)) + "\n"


def _parts(report: Report, extra: Extra) -> Iterator[str]:
    yield f"# {plain(words.title(report))}"
    yield bullets(" ".join(words.verdict(network)) for network in report.networks)
    cautions = words.cautions(report)
    if cautions:
        yield "**Warnings**"
        yield bullets(cautions)
    for grid in extra.tables or overview.of_all(report):
        yield from table(grid)
    differences = [line for pair in words.contrasts(report.networks) for line in pair]
    if differences:
        yield bullets(differences)
    for network in report.networks:
        yield from _network(network, extra.layer)
    for kept in (overview.settings(report), overview.course(report)):
        if kept is not None:
            yield from table(kept)
    yield bullets(overview.contract(report))


def _network(network: NetworkReport, layer: str | None) -> Iterator[str]:
    yield f"## {plain(network.name)}"
    yield from table(overview.classes(network))
    yield from table(overview.closest(network))
    if network.layers is not None:
        yield bullets(network.layers.sentences)
        inside = () if layer is None else (grids.neurons(network.layers, layer),)
        for grid in (*grids.layer_grids(network.layers), *inside):
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
