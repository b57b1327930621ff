"""Pictures of one evaluation: accuracy against radius, and where the margins lie."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from analysis.figures import COLOURS, MARKERS, figure
from analysis.protocol import attack_name

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from analysis.records import Evaluation, Rate
    from analysis.sandwich import Sandwich

#: Bins of the margins, at most, and the share of them beyond either end, which goes into the end bins.
BINS, BEYOND = 40, 0.01


def accuracy_curves(found: Evaluation) -> Figure:
    """Return accuracies by radius with their 95 % intervals: clean at 0, after the attack, and certified by method."""
    made, (axes,) = figure(4.8, 3.2)
    places = [float(row.radius) for row in found.rows]
    _curve(axes, 0, [0.0, *places], [found.clean] * (1 + len(places)), "clean")
    _curve(axes, 1, places, [row.attacked for row in found.rows], "after attack")
    for turn, method in enumerate(found.methods, start=2):
        _curve(axes, turn, places, [row.certified[method] for row in found.rows], f"certified, {method}")
    axes.set_ylim(-2, 102)
    axes.set_xlim(left=0)
    axes.set_xlabel(f"radius ({found.norm})")
    axes.set_ylabel("% right")
    made.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=8)
    return made


def sandwich_curves(found: Sequence[Sandwich]) -> Figure:
    """Return, a panel per network, accuracies by radius: clean, after the first attack, after all, and certified."""
    made, axes = figure(4.2 * len(found), 3.4, columns=len(found))
    for panel, item in zip(axes, found, strict=True):
        radii = [float(row.radius) for row in item.last.rows]
        layers = zip(*(item.layers(place) for place in range(len(radii))), strict=True)
        labels = "clean", f"after {attack_name(item.first.attack)}", "after all attacks", "certified"
        for turn, (label, rates) in enumerate(zip(labels, layers, strict=True)):
            _curve(panel, turn, radii, list(rates), label)
        panel.set_title(item.name, fontsize=9)
        panel.set_ylim(-2, 102)
        panel.set_xlabel(f"radius ({item.last.norm})")
    axes[0].set_ylabel("% right")
    made.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    return made


def _curve(axes: Axes, turn: int, places: list[float], rates: list[Rate], label: str) -> None:
    """One quantity: a line through its values in a band of their intervals."""
    colour, marker = COLOURS[turn % len(COLOURS)], MARKERS[turn % len(MARKERS)]
    low, value, high = ([100 * getattr(rate, end) for rate in rates] for end in ("low", "value", "high"))
    axes.fill_between(places, low, high, color=colour, alpha=0.18, linewidth=0)
    axes.errorbar(
        places,
        value,
        yerr=[np.subtract(value, low), np.subtract(high, value)],
        color=colour,
        marker=marker,
        markersize=4,
        elinewidth=0.8,
        label=label,
    )


def margins(found: Evaluation, place: int = 0) -> Figure:
    """Return how often margins take which values, at the radius of that place: clean, the worst met, the best proved.

    Values beyond the outermost hundredth at either end count in the end bins.
    """
    outcomes = [sample.outcomes[place] for sample in found.samples]
    proved = [max(known) for outcome in outcomes if (known := [v for v in outcome.lower.values() if v is not None])]
    drawn = {
        "clean": [sample.margin for sample in found.samples],
        "worst met": [outcome.worst for outcome in outcomes],
        "best proved": proved,
    }
    every = np.concatenate([np.array(values) for values in drawn.values()])
    low, high = np.quantile(every, (BEYOND, 1 - BEYOND))
    bins = min(BINS, max(8, round(len(outcomes) ** 0.5)))
    edges = np.linspace(low, high if high > low else low + 1, bins + 1)
    made, (axes,) = figure(4.8, 3.2)
    for turn, (label, values) in enumerate(drawn.items()):
        counts = np.histogram(np.clip(values, edges[0], edges[-1]), edges)[0]
        axes.stairs(100 * counts / len(outcomes), edges, label=label, color=COLOURS[turn], linewidth=1.5)
    axes.axvline(0, color="#000000", linewidth=0.8, linestyle=":")
    axes.locator_params(axis="x", nbins=6)
    axes.set_xlabel("margin")
    axes.set_ylabel("% of images")
    made.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    return made
