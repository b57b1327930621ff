"""The figures of a report as parts of a page, each with a caption and with words that stand for it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from analysis import curves, figures
from analysis.layer_records import Pixels, Sensitivity
from analysis.protocol import attack_name
from analysis.records import Evaluation, NetworkReport
from analysis.sandwich import Sandwich
from cli.inline import inline
from cli.theme import number, percent, radius, span

#: Layers of all networks together whose values and functions are drawn, and of one at most: the most costly ones.
ALL_DRAWN, DRAWN = 12, 4


@dataclass(frozen=True)
class Picture:
    """A figure: its <svg> element and what stands below it."""

    svg: str
    caption: str


def of_evaluation(network: NetworkReport, name: str) -> Iterator[Picture]:
    """Yield accuracy against radius and the distribution of margins; ``name`` begins the ids."""
    found = network.evaluation
    yield Picture(
        inline(curves.accuracy_curves(found), f"{name}-curve", _rates_in_words(network.name, found)),
        f"{network.name}: accuracy by radius, bands are 95 % intervals",
    )
    at = radius(found.rows[0].radius)
    broken = sum(sample.outcomes[0].worst < 0 for sample in found.samples)
    words = (
        f"Distribution of margins of {network.name} at radius {at}: clean, the worst met and the best proved. "
        f"{broken} of {found.count} worst margins are below zero."
    )
    yield Picture(
        inline(curves.margins(found), f"{name}-margins", words),
        f"{network.name}: margins at radius {at}; below 0 is wrong, and proved ones above 0 are certified",
    )


def _rates_in_words(name: str, found: Evaluation) -> str:
    parts = [f"clean {percent(found.clean.value)}"]
    for row in found.rows:
        certified = (f"certified by {method} {percent(rate.value)}" for method, rate in row.certified.items())
        after = f"after attack {percent(row.attacked.value)}"
        parts.append(f"at radius {radius(row.radius)} {', '.join([after, *certified])}")
    return f"Accuracy of {name} against radius: {'; '.join(parts)}."


def of_sandwich(found: Sandwich, name: str) -> Picture:
    """Return accuracy against radius, clean, after the first attack, after all and certified by any method."""
    words = []
    for place, row in enumerate(found.last.rows):
        clean, first, every, certified = (percent(rate.value) for rate in found.layers(place))
        alone = f"after {attack_name(found.first.attack)} {first}, after all {every}"
        words.append(f"at radius {radius(row.radius)} clean {clean}, {alone}, certified {certified}")
    drawn = inline(curves.sandwich_curves([found]), name, f"Accuracy of {found.name}: {'; '.join(words)}.")
    return Picture(drawn, f"{found.name}: accuracy between attacks and proofs, bands are 95 % intervals")


def of_layers(found: Sensitivity, name: str, networks: int = 1) -> Iterator[Picture]:
    """Yield the values and learned functions of the most costly layers, and the map of the pixels.

    The more ``networks`` there are on the page, the fewer layers of each: it stays small.
    """
    most = max(1, min(DRAWN, ALL_DRAWN // networks))
    costly = found.ranking[:most] or tuple(item.layer for item in found.histograms[:most])
    for place, item in enumerate(item for item in found.histograms if item.layer in costly):
        ends = span((item.edges[0], item.edges[-1]))
        words = f"Histogram of what goes into {item.layer}, clean and attacked; values lie in {ends}."
        drawn = figures.histograms([item])
        yield Picture(inline(drawn, f"{name}-values{place}", words), f"What goes into {item.layer}, clean and attacked")
    for place, shape in enumerate(shape for shape in found.shapes if shape.layer in costly):
        bent = "" if shape.curvature is None else f", curvatures in {span(shape.curvature)}"
        words = f"Learned functions of {shape.layer}: certified slopes in {span(shape.slope)}{bent}."
        caption = f"Functions of {shape.layer}: some thin, their mean thick; certified slopes {span(shape.slope)}{bent}"
        yield Picture(inline(figures.shapes([shape]), f"{name}-functions{place}", words), caption)
    if found.pixels is not None:
        drawn = figures.pixel_map(found.pixels)
        caption = "What each pixel's own interval takes from the smallest margin's bound, on average"
        yield Picture(inline(drawn, f"{name}-pixels", _pixels_in_words(found.pixels)), caption)


def _pixels_in_words(found: Pixels) -> str:
    """Where the map is brightest."""
    most = max(range(len(found.values)), key=found.values.__getitem__)
    place, rest = [], most
    for size in reversed(found.shape):
        place.append(rest % size)
        rest //= size
    return (
        f"Map of the input: the bound depends most on the element at {tuple(reversed(place))} of {found.shape}, which "
        f"takes {number(found.values[most])} of {number(sum(found.values))}."
    )
