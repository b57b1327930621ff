"""Pictures of results: drawn off screen, written atomically as SVG, PNG or PDF, the same bytes every time."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from certify.errors import InvalidInput
from models.files import write

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from analysis.diagnosis import Diagnosis
    from analysis.layer_records import Histogram, Pixels, Shape
    from analysis.summary import Summary
    from models.training import RateCurve

#: Colours that stay apart for colour-blind readers and in print (Okabe, Ito 2008).
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "os^Dv*PX"
#: Functions drawn of a layer, at most.
CURVES = 64
KINDS = ("svg", "png", "pdf")


def figure(width: float = 6.0, height: float = 3.6, *, rows: int = 1, columns: int = 1) -> tuple[Figure, list[Axes]]:
    """Return an empty figure (inches) and its axes, row by row."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    made = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(made)
    axes = made.subplots(rows, columns, squeeze=False).flatten().tolist()
    for place in axes:
        place.spines[["top", "right"]].set_visible(False)
        place.grid(alpha=0.25)
        place.set_prop_cycle(color=COLOURS)
    return made, axes


def save(made: Figure, path: str | Path) -> Path:
    """Write the figure in the format of the path's ending and return the path.

    Raises ``InvalidInput`` for other endings than .svg, .png and .pdf, ``InvalidFile`` where it cannot be written.
    """
    place = Path(path)
    check_kind(place)
    write({place: encoded(made, place.suffix.removeprefix(".").lower())})
    return place


def encoded(made: Figure, kind: str, **options: Any) -> bytes:
    """Return the figure as a file of that kind, the same bytes every time; ``options`` are savefig's."""
    import matplotlib as mpl

    stream = io.BytesIO()
    words = "none" if options.get("transparent") else "path"  # see-through figures are parts of pages, with their fonts
    with mpl.rc_context({"svg.hashsalt": "kafcert", "svg.fonttype": words}):
        undated = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}.get(kind)
        made.savefig(stream, format=kind, dpi=150, metadata=undated, **options)
    return stream.getvalue()


def check_kind(path: str | Path) -> None:
    """Raise ``InvalidInput`` unless the path ends in a format that ``save`` writes."""
    kind = Path(path).suffix.removeprefix(".").lower()
    if kind not in KINDS:
        raise InvalidInput(f"a picture named {path}", "an ending among .svg, .png and .pdf", f"{Path(path).stem}.svg")


def rate_curve(curve: RateCurve) -> Figure:
    """Return the loss against the learning rate, with the rates where it falls fastest and where it is least."""
    made, (axes,) = figure()
    axes.semilogx(curve.rates, curve.losses)
    for rate, words, side in ((curve.suggestion, "falls fastest", "right"), (curve.limit, "least", "left")):
        axes.axvline(rate, color="0.5", linestyle=":")
        axes.annotate(
            f"{words}\n{rate:.2g}",
            (rate, max(curve.losses)),
            ha=side,
            va="top",
            xytext=(-4 if side == "right" else 4, 0),
            textcoords="offset points",
        )
    axes.set_xlabel("learning rate")
    axes.set_ylabel("loss (smoothed)")
    return made


def accuracy_scatter(rows: Sequence[Summary], radius: str) -> Figure:
    """Return clean against attacked accuracy, a point with its intervals per row: colours are activations."""
    made, (axes,) = figure(7.5, 4.2)
    names = list(dict.fromkeys(row.activation for row in rows))
    groups = list(dict.fromkeys((row.network, row.recipe) for row in rows))
    for row in rows:
        if row.clean is None or not row.attacked:
            continue
        x, y = row.clean, row.attacked[0]
        axes.errorbar(
            100 * x.value,
            100 * y.value,
            xerr=[[100 * (x.value - x.low)], [100 * (x.high - x.value)]],
            yerr=[[100 * (y.value - y.low)], [100 * (y.high - y.value)]],
            color=_turn(COLOURS, names.index(row.activation)),
            marker=_turn(MARKERS, groups.index((row.network, row.recipe))),
            linestyle="none",
            elinewidth=0.6,
        )
    axes.set_xlabel("clean accuracy, %")
    axes.set_ylabel(f"accuracy under attack at {radius}, %")
    marks = [axes.plot([], [], "s", color=_turn(COLOURS, i), linestyle="none")[0] for i in range(len(names))]
    marks += [axes.plot([], [], color="0.3", marker=_turn(MARKERS, i), linestyle="none")[0] for i in range(len(groups))]
    made.legend(marks, [*names, *(", ".join(group) for group in groups)], loc="outside right upper", frameon=False)
    return made


def gradients(found: Diagnosis, log: Sequence[Mapping[str, Any]]) -> Figure:
    """Return gradient norms by layer, at the start and now; beside them, if there is a log, by epoch."""
    grown = [line["gradients"] for line in log if line.get("gradients")]
    made, axes = figure(8.0 if grown else 6.0, 3.6, columns=2 if grown else 1)
    for norms, words in ((found.start, "at the start"), (found.now, "now")):
        if words == "at the start" or found.now != found.start:
            axes[0].semilogy(range(1, len(norms) + 1), [max(v, 1e-30) for v in norms.values()], ".-", label=words)
    axes[0].set_xticks(range(1, len(found.start) + 1, max(1, len(found.start) // 8)))
    axes[0].set_xlabel("layer")
    axes[0].set_ylabel("gradient norm")
    axes[0].legend(frameon=False)
    if grown:
        names = list(grown[0])
        for place in sorted({0, len(names) // 2, len(names) - 1}):
            values = [max(norms[names[place]], 1e-30) for norms in grown]
            axes[1].semilogy(range(1, len(grown) + 1), values, ".-", label=names[place])
        axes[1].set_xlabel("epoch")
        axes[1].legend(frameon=False)
    return made


def histograms(found: Sequence[Histogram]) -> Figure:
    """Return the pre-activations of every layer, clean and attacked."""
    made, axes = _grid(len(found))
    for place, histogram in zip(axes, found, strict=True):
        place.stairs(histogram.clean, histogram.edges, label="clean")
        place.stairs(histogram.attacked, histogram.edges, label="attacked")
        place.set_title(histogram.layer, fontsize=8)
        place.set_yticks([])
        place.locator_params(axis="x", nbins=5)
        place.tick_params(labelsize=7)
    handles, labels = axes[0].get_legend_handles_labels()
    made.legend(handles, labels, loc="outside upper right", ncols=2, frameon=False)
    return made


def shapes(found: Sequence[Shape]) -> Figure:
    """Return the learned functions of every KAF layer: all channels thin, their mean thick."""
    made, axes = _grid(len(found))
    for place, shape in zip(axes, found, strict=True):
        for values in shape.values[:CURVES]:
            place.plot(shape.places, values, color=COLOURS[0], alpha=0.25, linewidth=0.6)
        mean = [sum(column) / len(shape.values) for column in zip(*shape.values, strict=True)]
        place.plot(shape.places, mean, color=COLOURS[1], linewidth=1.5)
        place.set_title(f"{shape.layer}: f' in [{shape.slope[0]:.2g}, {shape.slope[1]:.2g}]", fontsize=8)
        place.tick_params(labelsize=7)
    return made


def pixel_map(found: Pixels) -> Figure:
    """Return the input's map: bright where a pixel's interval costs the margin's bound most; channels are summed."""
    values = np.array(found.values).reshape(found.shape)
    plane = values.sum(tuple(range(values.ndim - 2))) if values.ndim > 1 else values[None]
    made, (axes,) = figure(3.4, 3.0)
    axes.grid(visible=False)
    axes.spines[["left", "bottom"]].set_visible(False)
    axes.set_xticks([])
    axes.set_yticks([])
    image = axes.imshow(plane, cmap="cividis", vmin=0, aspect="equal" if values.ndim > 1 else "auto")
    made.colorbar(image, label="part of the bound", shrink=0.85)
    return made


def _grid(count: int) -> tuple[Figure, list[Axes]]:
    """A figure of so many small axes, four in a row."""
    columns = min(4, count)
    rows = -(-count // columns)
    made, axes = figure(2.6 * columns, 2.0 * rows, rows=rows, columns=columns)
    for spare in axes[count:]:
        spare.set_visible(False)
    return made, axes[:count]


def _turn(items: Sequence[str], index: int) -> str:
    """The item of that number, counted around."""
    return items[index % len(items)]
