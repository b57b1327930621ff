"""``certify compare``: proofs and attacks side by side, image by image, and networks against each other."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cli.options import (
    AttackOptions,
    BallOptions,
    BoundOptions,
    DataOptions,
    FileOptions,
    NetworkOptions,
    OutputOptions,
)

if TYPE_CHECKING:
    from analysis.protocol import Protocol
    from analysis.records import Report
    from analysis.sandwich import Sandwich
    from analysis.smoothing import SmoothedAccuracy
    from certify.smoothing import Smoothing
    from cli.grids import Grid
    from cli.subjects import Samples, Subject

#: Images where none are asked for: Square alone asks 5,000 times for each that survives.
IMAGES = 100
#: Shares of the images at which radii are shown.
SHARES = (0.1, 0.5, 0.9)


def compare(
    networks: NetworkOptions,
    data: DataOptions,
    ball: BallOptions,
    bounding: BoundOptions,
    attack: AttackOptions,
    files: FileOptions,
    output: OutputOptions,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw accuracy against radius: .svg, .png or .pdf.")
    ] = None,
    sigma: Annotated[
        float | None, typer.Option(metavar="S", help="With --norm l2: also smooth by such noise, probable, no proof.")
    ] = None,
) -> None:
    """Empirical against certified robustness, per image.

    clean >= attack >= ensemble >= certified at every radius; the radius proved beside the nearest adversarial example;
    networks on the same images, paired (McNemar); class by class.
    """
    from dataclasses import replace

    from analysis import curves, figures
    from analysis.manifest import versions
    from analysis.records import NetworkReport, Report
    from cli import output as out
    from cli import overview
    from cli.assessing import protocol_of
    from cli.exports import check_files, write_files
    from cli.extra import Extra
    from cli.pictures import of_sandwich
    from cli.render import drawn
    from cli.subjects import samples, subjects

    console = out.console(output.json)
    out.check_picture(plot)
    check_files(files, json=output.json, plot=plot)
    protocol = protocol_of(ball, data.seed, attack, bounding)
    smoothing = _smoothing(sigma, protocol.norm)
    asked = subjects(networks)
    given = samples(data if data.samples is not None else replace(data, samples=IMAGES), asked)
    console.print(f"{given.text}\n", soft_wrap=True)
    found = [_laid(network, given, protocol) for network in asked]
    smoothed = [_smoothed(network, given, protocol, smoothing) for network in asked] if smoothing else []
    options = out.arguments(networks, data, ball, bounding, attack) | {"sigma": sigma}
    reports = tuple(
        NetworkReport(n.name, n.source, n.network, n.parameters, n.normalisation, item.last)
        for n, item in zip(asked, found, strict=True)
    )
    report = Report("compare", options, given.text, data.seed, versions(), reports)
    tables = tables_of(found, smoothed, report)
    for grid in (*tables, *map(overview.classes, reports)):
        console.print(drawn(grid))
        if grid.note:
            console.print(grid.note, style="dim", soft_wrap=True)
    if plot is not None:
        console.print(f"plot: {figures.save(curves.sandwich_curves(found), plot)}", soft_wrap=True)
    pictures = tuple(of_sandwich(item, f"s{place}") for place, item in enumerate(found)) if files.html else ()
    for path in write_files(report, files, Extra(tables, pictures)):
        console.print(f"written: {path}", markup=False, soft_wrap=True)
    results = {"samples": given.text, "networks": found, "smoothed": smoothed}
    out.publish(output.json, "compare", options, results)


def _smoothing(sigma: float | None, norm: str) -> Smoothing | None:
    """The smoothing that is asked for; it certifies in l2 alone."""
    from certify.errors import InvalidInput
    from certify.smoothing import Smoothing

    if sigma is not None and norm != "l2":
        raise InvalidInput(f"--sigma with --norm {norm}", "l2: what smoothing certifies", "--norm l2")
    return None if sigma is None else Smoothing(sigma=sigma)


def _laid(network: Subject, given: Samples, protocol: Protocol) -> Sandwich:
    """Proofs and attacks of one network, with a progress bar on stderr."""
    from analysis.sandwich import sandwich, work
    from cli.output import progress
    from cli.subjects import inputs

    x = inputs(network, given)
    with progress(network.name, work(len(x), protocol)) as tick:
        return sandwich(network.name, network.model, x, given.y, protocol, index=given.index, tick=tick)


def _smoothed(network: Subject, given: Samples, protocol: Protocol, smoothing: Smoothing) -> SmoothedAccuracy:
    """The smoothed version of one network, with a progress bar on stderr."""
    from analysis.smoothing import smoothed_accuracy
    from cli.output import progress
    from cli.subjects import inputs

    x = inputs(network, given)
    with progress(f"{network.name}: smoothing", len(x)) as tick:
        return smoothed_accuracy(network.model, x, given.y, smoothing, protocol, index=given.index, tick=tick)


def tables_of(found: Sequence[Sandwich], smoothed: Sequence[SmoothedAccuracy], report: Report) -> tuple[Grid, ...]:
    """Return the tables that hold all networks: accuracies, what is known, radii, pairs."""
    from cli import overview

    paired = (pairs(found),) if len(found) > 1 else ()
    return (accuracies(found, smoothed), overview.standings(report), radii(found), *paired)


def accuracies(found: Sequence[Sandwich], smoothed: Sequence[SmoothedAccuracy]) -> Grid:
    """Four accuracies per network and radius, each at most the one before; beside them that of the smoothed network."""
    from analysis.protocol import attack_name
    from cli.grids import Grid
    from cli.theme import radius, rate

    rows = []
    for i, item in enumerate(found):
        for place, row in enumerate(item.last.rows):
            probable = [rate(smoothed[i].certified[place])] if smoothed else []
            rows.append((item.name, radius(row.radius), *map(rate, item.layers(place)), *probable))
    first, methods = found[0].first.attack, " or ".join(found[0].last.methods)
    alone = f"after {attack_name(first)}"
    note = f"{alone}: {first}. after all: that, APGD-CE, APGD-T, FMN and Square. certified: by {methods}."
    heads = ["network", "radius", "clean", alone, "after all", "certified"]
    if smoothed:
        heads.append("PROBABLE\n(smoothed)")
        note += (
            f" PROBABLE: no proof, and about the smoothed network alone (sigma {smoothed[0].sigma:g}); each "
            f"image's certificate is wrong with probability {smoothed[0].alpha:g} at most."
        )
    return Grid("Accuracy in percent (95 % interval)", tuple(heads), tuple(rows), note=note)


def radii(found: Sequence[Sandwich]) -> Grid:
    """Quantiles of the radii up to which images are proved, and at which they are broken."""
    from cli.grids import Grid
    from cli.theme import bound

    rows = []
    for item in found:
        proved = sorted(pair.certified for pair in item.pairs)
        met = sorted(float("inf") if pair.adversarial is None else pair.adversarial for pair in item.pairs)
        for words, values, side in (("proved up to", proved, "lower"), ("broken at", met, "upper")):
            cells = (bound(_quantile(values, share), side) for share in SHARES) if values else ("-",) * len(SHARES)
            rows.append((item.name, words, str(len(values)), *cells))
    heads = "network", "radius", "images", *(f"{100 * share:.0f} %" for share in SHARES)
    note = (
        f"proved up to: by {found[0].method}, bisected, or by any method at a radius above. broken at: the nearest "
        "adversarial example of all attacks. The true distance of every image that is right lies between the two."
    )
    return Grid(
        f"Radii ({found[0].last.norm}), quantiles over the images that are right", heads, tuple(rows), note=note
    )


def pairs(found: Sequence[Sandwich]) -> Grid:
    """McNemar's exact test for every two networks and quantity."""
    from analysis.comparison import compare as paired
    from cli.grids import Grid
    from cli.theme import number, radius

    rows = []
    for one, other in combinations(found, 2):
        for row in paired(one.last, other.last):
            at = "" if row.radius is None else f" at {radius(row.radius)}"
            counts = str(row.first_only), str(row.second_only)
            rows.append((f"{one.name} / {other.name}", f"{row.quantity}{at}", *counts, number(row.p_value)))
    heads = "networks", "right", "only\nthe first", "only\nthe second", "p"
    note = "p: how likely such a difference is by chance (McNemar, exact, on the same images)"
    return Grid("Networks against each other", heads, tuple(rows), note=note)


def _quantile(values: Sequence[float], share: float) -> float:
    """The value that this share of the sorted ones does not exceed: one of them, never between two."""
    from math import ceil

    return values[max(0, ceil(share * len(values)) - 1)]
