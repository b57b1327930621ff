"""Options to questions, and reports to the terminal: what ``report`` and ``demo`` share."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape

from analysis.chunk import Batch
from analysis.evaluation import fit
from analysis.lines import NetworkLine
from analysis.manifest import tensor_digest
from analysis.protocol import Protocol
from analysis.records import Course, NetworkReport, Report
from analysis.units import Case, LayerPlan
from cli import render, theme, words
from cli.options import AttackOptions, BallOptions, BoundOptions, LayerOptions
from cli.parsing import attack_of, exponent, items, radii, single
from cli.subjects import Samples, Subject, inputs


def protocol_of(
    ball: BallOptions, seed: int, attack: AttackOptions | None = None, bounding: BoundOptions | None = None
) -> Protocol:
    """Return what the options ask; without attack options its defaults, without bound options no certificates."""
    attack = attack or AttackOptions()
    return Protocol(
        radii=radii(ball.radius),
        p=exponent(ball.norm),
        methods=() if bounding is None else items(bounding.methods, "methods", "ibp,crown"),
        attack=attack_of(attack.attack, steps=attack.steps, restarts=attack.restarts),
        arithmetic="float" if bounding is None else bounding.arithmetic,
        seed=seed,
    )


def plan_of(options: LayerOptions, protocol: Protocol) -> LayerPlan:
    """Return how the layers are measured."""
    given = protocol.radii[:1] if options.layer_radius is None else radii(options.layer_radius)
    radius = single(given, "layer-radius")
    return LayerPlan(radius, options.layer_samples) if options.layers else LayerPlan(None, 0)


def case_of(network: Subject, given: Samples, protocol: Protocol) -> Case:
    """Return the network and its samples as a run takes them."""
    x, y, classes = fit(network.model, inputs(network, given), given.y)
    about = NetworkLine(
        name=network.name,
        source=network.source,
        network=network.network,
        parameters=network.parameters,
        normalisation=network.normalisation,
        weights_sha256=tensor_digest(network.model.state_dict()),
        conditions=protocol.conditions(x.dtype),
    )
    return Case(about, Batch(network.model, x, y, classes, given.index))


def show_all(console: Console, report: Report) -> None:
    """Print a report as the command ``report`` does."""
    console.print(f"{report.samples}\n")
    for warning in report.warnings:
        console.print(f"[{theme.WARN}]warning:[/] {escape(warning)}")
    if report.warnings:
        console.print()
    for network in report.networks:
        show(console, network, report.course)
    if len(report.networks) > 1:
        show_together(console, report.networks)
    legend(console, words.LEGEND + (words.LAYER_LEGEND if report.arguments.get("layers") else ()))


def show(console: Console, report: NetworkReport, course: Course | None) -> None:
    """Print one network's report, and the time that it took where that is known."""
    for line in render.heading(report):
        console.print(line)
    console.print(render.accuracies(report.evaluation))
    if report.layers is not None:
        at = f"radius {theme.radius(report.layers.radius)}, on {report.layers.count} images that it gets right"
        console.print(f"The layers of {escape(report.name)} at {at}")
        for made in render.layers(report.layers):
            console.print(made)
        for sentence in report.layers.sentences:
            console.print(escape(sentence))
    elif report.evaluation.clean.count == 0:
        console.print("No layer was measured: the network is right on none of these images.")
    if course is not None:
        console.print(render.timings(course.seconds.get(report.name, {})), style="dim")
    console.print()


def show_together(console: Console, reports: Sequence[NetworkReport]) -> None:
    """Print several networks side by side."""
    console.print(render.side_by_side(reports))
    for other in reports[1:]:
        if other.evaluation.count == reports[0].evaluation.count:  # else one of them is not finished
            for sentence in words.contrast(reports[0], other):
                console.print(escape(sentence))
    console.print()


def legend(console: Console, lines: Sequence[str]) -> None:
    """Print what the columns mean."""
    for line in lines:
        console.print(line, style="dim")
    console.print()
