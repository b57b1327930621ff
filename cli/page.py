"""A report as one HTML page that needs nothing else: no script, no font, no picture from anywhere."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from itertools import chain

import jinja2
from markupsafe import Markup, escape

from analysis.advice import TOP
from analysis.records import NetworkReport, Report
from cli import grids, overview, words
from cli.extra import NOTHING, Extra
from cli.grids import Grid
from cli.pictures import Picture, of_evaluation, of_layers
from cli.theme import radius


@dataclass(frozen=True)
class Section:
    """What the page says of one network: tables; of its layers sentences, tables, pictures, and tables of neurons."""

    network: NetworkReport
    anchor: str
    tables: tuple[Grid, ...]
    radius: str = ""
    ranked: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()
    layers: tuple[Grid, ...] = ()
    inside: tuple[Grid, ...] = ()
    pictures: tuple[Picture, ...] = ()


def text(report: Report, extra: Extra = NOTHING) -> str:
    """Return the page: HTML5, the same bytes for the same report; what the report holds is escaped."""
    sections = tuple(_section(network, place, report, extra.layer) for place, network in enumerate(report.networks))
    drawn = chain(*(of_evaluation(network, f"n{place}") for place, network in enumerate(report.networks)))
    return _template().render(
        title=words.title(report),
        report=report,
        verdicts=[(network.name, " ".join(words.verdict(network))) for network in report.networks],
        cautions=words.cautions(report),
        differences=tuple(chain(*words.contrasts(report.networks))),
        tables=extra.tables or overview.of_all(report),
        pictures=[*extra.pictures, *drawn],
        sections=sections,
        measures_layers=report.command != "compare",
        legends=(words.LEGEND, words.LAYER_LEGEND),
        settings=[grid for grid in (overview.settings(report), overview.course(report)) if grid is not None],
        contract=overview.contract(report),
    )


def _section(network: NetworkReport, place: int, report: Report, layer: str | None) -> Section:
    found, anchor = network.layers, f"n{place}"
    tables = overview.classes(network), overview.closest(network)
    if found is None:
        return Section(network, anchor, tables)
    top = min(TOP, len(found.ranking))
    wanted = dict.fromkeys((*found.ranking[:top], *([] if layer is None else [layer])))
    return Section(
        network,
        anchor,
        tables,
        radius=radius(found.radius),
        ranked=found.sentences[:top],
        remarks=found.sentences[top:],
        layers=grids.layer_grids(found),
        inside=tuple(grids.neurons(found, layer) for layer in wanted),
        pictures=tuple(of_layers(found, anchor, len(report.networks))),
    )


def _options(sentence: str) -> Markup:
    """The escaped sentence, with options of the command line as code that is not broken into lines."""
    parts = re.split(r"(--[a-z][a-z-]*(?: [^\s,;:)]+)?)", sentence)  # every other one is an option
    return Markup("").join(Markup("<code>{}</code>").format(p) if i % 2 else escape(p) for i, p in enumerate(parts))


@cache
def _template() -> jinja2.Template:
    """The page's frame; everything put into it is escaped, but for what filters return."""
    made = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    made.filters |= {"svg": Markup, "options": _options}
    return made.from_string(files("cli").joinpath("page.html").read_text(encoding="utf-8"))
