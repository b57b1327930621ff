"""Measure networks and print what came out: what ``report`` and ``demo`` share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from analysis.evaluation import Protocol, evaluate
from analysis.layers import layer_sensitivity
from analysis.records import NetworkReport, Sensitivity
from cli import render, theme, words
from cli.options import AttackOptions, BallOptions, BoundOptions, LayerOptions
from cli.output import progress
from cli.parsing import attack_of, exponent, items, radii, single
from cli.subjects import Samples, Subject, inputs


@dataclass(frozen=True)
class LayerPlan:
    """At which radius and on how many samples the layers are measured; where a sample is saved after an alarm."""

    radius: Fraction | None
    samples: int
    dump: Path = Path("alarms")


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


def assess(network: Subject, given: Samples, protocol: Protocol, plan: LayerPlan) -> NetworkReport:
    """Return all that is measured of one network, with a progress bar on stderr."""
    x, y = inputs(network, given), given.y
    with progress(network.name, protocol.work(len(x))) as tick:
        found = evaluate(network.model, x, y, protocol, index=given.index, dump=plan.dump, tick=tick)
    layers: Sensitivity | None = None
    right = [place for place, sample in enumerate(found.samples) if sample.correct][: plan.samples]
    if plan.radius is not None and right:
        with progress(f"{network.name}: layers", len(right)):
            layers = layer_sensitivity(network.model, x[right], y[right], protocol, radius=plan.radius)
    return NetworkReport(
        name=network.name,
        source=network.source,
        network=network.network,
        parameters=network.parameters,
        normalisation=network.normalisation,
        evaluation=found,
        layers=layers,
    )


def show(console: Console, report: NetworkReport) -> None:
    """Print one network's report."""
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
    console.print(render.timings(report.evaluation), style="dim")
    console.print()


def show_together(console: Console, reports: Sequence[NetworkReport]) -> None:
    """Print several networks side by side."""
    console.print(render.side_by_side(reports))
    for other in reports[1:]:
        for sentence in words.contrast(reports[0], other):
            console.print(escape(sentence))
    console.print()


def legend(console: Console, lines: Sequence[str]) -> None:
    """Print what the columns mean."""
    for line in lines:
        console.print(line, style="dim")
    console.print()
