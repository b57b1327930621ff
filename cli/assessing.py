"""Options to questions, and reports to the terminal: what ``report`` and ``demo`` share."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from analysis.chunk import Batch
from analysis.evaluation import fit
from analysis.lines import NetworkLine
from analysis.protocol import Protocol
from analysis.records import Course, NetworkReport, Report
from analysis.units import Case, LayerPlan
from certify.errors import InvalidInput
from certify.graph import trace
from cli import grids, render, theme, words
from cli.options import AttackOptions, BallOptions, BoundOptions, LayerOptions
from cli.output import check_target
from cli.parsing import attack_of, distinct, exponent, radii, single
from cli.subjects import Samples, Subject, inputs
from models.files import tensor_digest


def protocol_of(
    ball: BallOptions, seed: int, attack: AttackOptions | None = None, bounding: BoundOptions | None = None
) -> Protocol:
    """Return what the options ask; without attack options its defaults, without bound options no certificates."""
    attack = attack or AttackOptions()
    return Protocol(
        radii=radii(ball.radius),
        p=exponent(ball.norm),
        methods=() if bounding is None else distinct(bounding.methods, "methods", "ibp,crown"),
        attack=attack_of(attack.attack, steps=attack.steps, restarts=attack.restarts),
        arithmetic="float" if bounding is None else bounding.arithmetic,
        seed=seed,
    )


def plan_of(options: LayerOptions, protocol: Protocol) -> LayerPlan:
    """Return how the layers are measured."""
    given = protocol.radii[:1] if options.layer_radius is None else radii(options.layer_radius)
    radius = single(given, "layer-radius")
    if not options.layers:
        asked = next((name for name in ("layer", "pixels") if getattr(options, name) is not None), None)
        if asked is not None:
            raise InvalidInput(f"--{asked} with --no-layers", "one of the two", "leave out --no-layers")
        return LayerPlan(None, 0)
    return LayerPlan(radius, options.layer_samples)


def check_layer(networks: Sequence[Subject], given: Samples, layer: str | None) -> None:
    """Raise ``InvalidInput`` unless every network has the layer: before the work, not after it."""
    for network in networks if layer is not None else ():
        names = trace(network.model, inputs(network, given)[:1]).nodes
        if layer not in names:
            raise InvalidInput(
                f"no layer {layer!r} in {network.name}", f"one of {', '.join(names)}", "pick a layer from that list"
            )


def check_shown(report: Report, options: LayerOptions) -> None:
    """Raise ``InvalidInput`` where records do not hold what is to be shown of the layers.

    A network that is right on no image has no layers, and nothing is amiss.
    """
    asked = next((name for name in ("layer", "pixels") if getattr(options, name) is not None), None)
    for network in report.networks if asked is not None else ():
        if network.layers is not None:
            if options.layer is not None:
                grids.neurons(network.layers, options.layer)
        elif network.evaluation.clean.count > 0:
            raise InvalidInput(
                f"--{asked} with records that hold no layers of {network.name}",
                "records of a whole run that measured them",
                "the run again without --no-layers, or to its end with --resume",
            )


def case_of(network: Subject, given: Samples, protocol: Protocol) -> Case:
    """Return the network and its samples as a run takes them."""
    x, y, classes = fit(network.model, inputs(network, given), given.y)
    if protocol.methods:
        trace(network.model, x[:1])  # what cannot be bounded is refused before anything is attacked
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


def show_all(console: Console, report: Report, layer: str | None = None) -> None:
    """Print a report as the command ``report`` does, with the neurons of the ``layer`` that is named."""
    console.print(f"{report.samples}\n", soft_wrap=True)
    for warning in words.cautions(report):
        console.print(f"[{theme.WARN}]warning:[/] {escape(warning)}")
    if words.cautions(report):
        console.print()
    for network in report.networks:
        show(console, network, report.course, layer)
    if len(report.networks) > 1:
        show_together(console, report.networks)
    legend(console, words.LEGEND + (words.LAYER_LEGEND if report.arguments.get("layers") else ()))


def show(console: Console, report: NetworkReport, course: Course | None, layer: str | None = None) -> None:
    """Print one network's report, the time that it took where that is known, and the neurons of a layer."""
    for line in render.heading(report):
        console.print(line)
    console.print(render.accuracies(report.evaluation))
    if report.layers is not None:
        at = f"radius {theme.radius(report.layers.radius)}, on {theme.images(report.layers.count)} that it gets right"
        console.print(f"The layers of {escape(report.name)} at {at}")
        for grid in grids.layer_grids(report.layers):
            console.print(render.drawn(grid))
        for sentence in report.layers.sentences:
            console.print(escape(sentence))
        if layer is not None:
            inside = grids.neurons(report.layers, layer)
            console.print(render.drawn(inside))
            console.print(inside.note, style="dim")
    elif report.evaluation.clean.count == 0:
        console.print("No layer was measured: the network is right on none of these images.")
    if course is not None:
        console.print(render.timings(course.seconds.get(report.name, {})), style="dim")
    console.print()


def show_together(console: Console, reports: Sequence[NetworkReport]) -> None:
    """Print several networks side by side."""
    console.print(render.side_by_side(reports))
    for lines in words.contrasts(reports):
        for sentence in lines:
            console.print(escape(sentence))
    console.print()


def draw_pixels(console: Console, reports: Sequence[NetworkReport], target: Path | None) -> None:
    """Save each network's map of the pixels that its bounds depend on."""
    from analysis import figures

    if target is None:
        return
    places = targets(target, [report.name for report in reports])
    for report in reports:
        if report.layers is not None and report.layers.pixels is not None:
            saved = figures.save(figures.pixel_map(report.layers.pixels), places[report.name])
            console.print(f"pixels of {report.name}: {saved}", markup=False, soft_wrap=True)


def targets(path: Path, names: Sequence[str]) -> dict[str, Path]:
    """Return a file per network: the path itself for a single one, else with the network's name in it.

    What would make a folder of a name becomes a dash. Raises ``InvalidInput`` where two names would share a file.
    """
    if len(names) == 1:
        return {names[0]: path}
    found = {name: path.with_stem(f"{path.stem}-{name.strip('/').replace('/', '-')}") for name in names}
    if len({*found.values()}) < len(found):
        listed = ", ".join(names)
        raise InvalidInput(f"one file for several of {listed}", "names that differ without their /", "one at a time")
    for place in found.values():
        check_target(place)
    return found


def legend(console: Console, lines: Sequence[str]) -> None:
    """Print what the columns mean."""
    for line in lines:
        console.print(line, style="dim")
    console.print()
