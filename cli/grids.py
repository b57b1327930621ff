"""Tables as text, before anything is drawn: the terminal, Markdown and the page show the same cells."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from analysis.gates import GateResult
from analysis.layer_records import LayerRow, Neuron, Neurons, Sensitivity
from certify.errors import InvalidInput
from cli.theme import BAD, DIM, GOOD, NAME, count, images, number, percent, radius, rate, shape, share, span
from cli.words import QUANTITY


@dataclass(frozen=True)
class Grid:
    """A table: heads may hold line breaks; ``tones`` are row styles of theme.py, "" where there is none.

    ``note`` is a line below it.
    """

    title: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    tones: tuple[str, ...] = ()
    note: str = ""


def layer_grids(found: Sensitivity) -> tuple[Grid, ...]:
    """Return what each layer is and does to distances, what it does to bounds, and the learned functions."""
    functions = (learned_functions(found),) if found.shapes else ()
    return (distances(found), costs(found), *functions)


def distances(found: Sensitivity) -> Grid:
    """How far each layer carries a change."""
    head = ("layer", "kind", "output", "params", "stretch\nat least", "stretch\nat most", "moved", "moved\n95th pct")
    rows = tuple(
        (row.name, row.kind, shape(row.shape), count(row.parameters), *map(number, _measured(row)))
        for row in found.rows
    )
    tones = tuple(DIM if row.moves_only else "" for row in found.rows)
    return Grid("How far each layer carries a change", head, rows, tones)


def _measured(row: LayerRow) -> tuple[float | None, ...]:
    return row.lipschitz_lower, row.lipschitz_upper, row.distance_mean, row.distance_p95


#: Columns about bounds; one that is empty for every layer is left out.
COSTS: dict[str, Callable[[LayerRow], str]] = {
    "width\n(ibp)": lambda row: number(row.width_ibp),
    "width\n(crown)": lambda row: number(row.width_crown),
    "growth": lambda row: "" if row.growth is None else f"x {row.growth:.1f}",
    "unstable": lambda row: "" if row.unstable is None else percent(row.unstable),
    "gap": lambda row: "" if row.gap is None else number(row.gap),
    "slack": lambda row: percent(row.share) if row.share > 0 else "",
    "gain\n(margin)": lambda row: number(row.gain) if row.share > 0 else "",
    "gradient": lambda row: number(row.gradient),
}


def costs(found: Sensitivity) -> Grid:
    """What each layer costs the bounds."""
    columns = {title: column for title, column in COSTS.items() if any(column(row) for row in found.rows)}
    rows = tuple((row.name, *(column(row) or "-" for column in columns.values())) for row in found.rows)
    worst = max((row.gain for row in found.rows), default=0.0)
    tones = tuple(DIM if row.moves_only else NAME if row.gain == worst > 0 else "" for row in found.rows)
    return Grid("What each layer costs the bounds", ("layer", *columns), rows, tones)


def learned_functions(found: Sensitivity) -> Grid:
    """Certified ranges of the first two derivatives of learned activation functions."""
    rows = tuple(
        (item.layer, span(item.slope), "-" if item.curvature is None else span(item.curvature)) for item in found.shapes
    )
    return Grid("Learned functions, certified ranges", ("layer", "slope f'", "curvature f''"), rows)


def neurons(found: Sensitivity, layer: str) -> Grid:
    """The most costly neurons of one layer; raises ``InvalidInput`` for an unknown one, listing the known ones."""
    inside = {item.layer: item for item in found.neurons}
    if layer not in inside:
        raise InvalidInput(f"no layer {layer!r}", f"one of {', '.join(inside)}", "pick a layer from that list")
    return _inside(inside[layer], f"means over {images(found.count)} at radius {radius(found.radius)}")


def _inside(found: Neurons, where: str) -> Grid:
    columns = {title: cell for title, cell in NEURONS.items() if any(cell(row) for row in found.rows)}
    rows = tuple((str(row.place), *(cell(row) or "-" for cell in columns.values())) for row in found.rows)
    title = f"Inside {found.layer} ({found.kind}): {len(rows)} of {found.total} {found.unit}s, most costly first"
    exact = "an exact layer: widest bounds times weight first"
    note = f"{where}; {f'the layer has {percent(found.share)} of the slack' if found.share > 0 else exact}"
    return Grid(title, (found.unit, *columns), rows, note=note)


#: Columns about neurons; one that is empty for all of them is left out.
NEURONS: dict[str, Callable[[Neuron], str]] = {
    "bounds in": lambda row: "" if row.low_in is None or row.high_in is None else span((row.low_in, row.high_in)),
    "bounds out": lambda row: span((row.low_out, row.high_out)),
    "unstable": lambda row: "" if row.unstable is None else percent(row.unstable),
    "gap": lambda row: "" if row.gap is None else number(row.gap),
    "share of\nslack": lambda row: percent(row.share) if row.share > 0 else "",
    "weight in\nmargins": lambda row: number(row.weight),
}


def gates(results: Sequence[GateResult]) -> Grid:
    """What was wanted and what was measured, a row per gate, network and radius."""
    head = ("network", "radius", "quantity", "wanted", "measured", "images", "verdict")
    rows = tuple(_gate(result) for result in results)
    tones = tuple(GOOD if result.passed else BAD for result in results)
    return Grid("Gates, in percent of all images (95 % interval)", head, rows, tones)


def _gate(result: GateResult) -> tuple[str, ...]:
    met = result.measured
    return (
        result.network,
        "-" if result.radius is None else radius(result.radius),
        QUANTITY[result.quantity],
        f">= {share(result.wanted)}",
        rate(met),
        f"{met.count} of {met.total}",
        "passed" if result.passed else "failed",
    )
