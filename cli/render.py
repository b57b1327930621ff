"""Records to rich tables."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

from rich.markup import escape
from rich.table import Table

from analysis.records import Evaluation, NetworkReport, OutputBounds
from certify.results import LipschitzEstimate
from cli.grids import Grid
from cli.theme import BAD, GOOD, NAME, WARN, bound, number, radius, rate, seconds, table

VERDICTS = {"holds": GOOD, "violated": BAD, "unknown": WARN, "timeout": WARN}


def heading(report: NetworkReport) -> Iterable[str]:
    """Lines that say what was measured and how."""
    found = report.evaluation
    name, source = escape(report.name), escape(report.source)
    yield f"[{NAME}]{name}[/] ({source}): {report.network}, {report.parameters:,} parameters"
    yield f"normalisation: {report.normalisation}"
    yield from conditions(found)


def conditions(found: Evaluation) -> Iterable[str]:
    """Lines about perturbations, attack and arithmetic."""
    clip = "" if found.clip is None else f", pixels stay in [{found.clip[0]:g}, {found.clip[1]:g}]"
    yield f"perturbations: {found.norm} balls{clip}; attack: {found.attack}, seed {found.seed}"
    if found.methods:
        yield f"certificates: {', '.join(found.methods)}; arithmetic: {found.arithmetic}"


def accuracies(found: Evaluation, title: str = "Accuracy in percent (95 % interval)") -> Table:
    """One row per radius: clean, attacked, certified."""
    made = table(title, "radius", "clean", "after attack", *(f"certified\n({method})" for method in found.methods))
    for row in found.rows:
        certified = [rate(row.certified[method]) for method in found.methods]
        made.add_row(radius(row.radius), rate(found.clean), rate(row.attacked), *certified)
    return made


def side_by_side(reports: Sequence[NetworkReport]) -> Table:
    """One column per network, on the same samples."""
    names = [report.name for report in reports]
    made = table("Side by side, accuracy in percent (95 % interval)", "", *names)
    found = [report.evaluation for report in reports]
    made.add_row("clean", *(rate(item.clean) for item in found), end_section=True)
    for place, row in enumerate(found[0].rows):
        at = f"at {radius(row.radius)}"
        made.add_row(f"{at}: after attack", *(rate(item.rows[place].attacked) for item in found))
        for method in found[0].methods:
            cells = (rate(item.rows[place].certified[method]) for item in found)
            made.add_row(f"{at}: certified, {method}", *cells, end_section=method == found[0].methods[-1])
    return made


def drawn(grid: Grid) -> Table:
    """Return the table for the terminal."""
    made = table(escape(grid.title), *grid.head)
    for row, tone in zip(grid.rows, grid.tones or [""] * len(grid.rows), strict=True):
        made.add_row(*map(escape, row), style=tone or None)
    return made


def timings(spent: Mapping[str, float]) -> str:
    """A line with the seconds spent per task."""
    return f"time: {', '.join(f'{name} {seconds(value)}' for name, value in spent.items())}"


def margins(rows: Sequence[OutputBounds]) -> Table:
    """One row per sample and radius: certified margins and the verdict."""
    methods = list(dict.fromkeys(row.method for row in rows))
    made = table("Certified lower bounds of the smallest margin", "sample", "radius", "label", "predicted", *methods)
    made.add_column("verdict")
    groups: dict[tuple[int, Fraction], list[OutputBounds]] = {}
    for row in rows:
        groups.setdefault((row.index, row.radius), []).append(row)
    for (place, at), group in sorted(groups.items()):
        words = {row.verdict for row in group}
        word = next(word for word in VERDICTS if word in words)
        cells = (number(row.margin) for row in group)
        made.add_row(
            *(str(place), radius(at), str(group[0].label), str(group[0].predicted), *cells),
            f"[{VERDICTS[word]}]{word}[/]",
        )
    return made


def outputs(row: OutputBounds) -> Table:
    """What each output of one sample can become."""
    title = f"Outputs of sample {row.index} at radius {radius(row.radius)}, by {row.method}"
    made = table(title, "class", "value", "lower", "upper")
    for place, cells in enumerate(zip(row.value, row.lower, row.upper, strict=True)):
        made.add_row(str(place), *map(number, cells), style=NAME if place == row.label else None)
    return made


@dataclass(frozen=True)
class Answer:
    """What one estimator said: an estimate, or why it refused; and how long it took."""

    method: str
    estimate: LipschitzEstimate | None
    refusal: str
    seconds: float


def lipschitz(answers: Sequence[Answer], norm: str) -> Iterable[Table | str]:
    """The constants of the whole network by every method, the bracket that they make, and those of the layers."""
    made = table(f"Lipschitz constant ({norm} to {norm})", "method", "side", "network", "time")
    for answer in answers:
        found = answer.estimate
        side, value = ("refused", "-") if found is None else (found.side, bound(found.value, found.side))
        made.add_row(answer.method, side, value, seconds(answer.seconds))
    yield made
    yield from (f"{answer.method}: {escape(answer.refusal)}" for answer in answers if answer.refusal)
    known = [answer.estimate for answer in answers if answer.estimate is not None]
    low, high = _bracket([(found.side, found.value) for found in known])
    yield f"bracket of the network: {bound(low, 'lower')} <= L <= {bound(high, 'upper')}"
    names = list(dict.fromkeys(name for found in known for name in found.layers))
    if names:
        layers = table(f"Layers alone ({norm} to {norm})", "layer", "lower", "upper")
        for name in names:
            low, high = _bracket([(found.side, found.layers[name]) for found in known if name in found.layers])
            layers.add_row(name, bound(low, "lower"), bound(high, "upper"))
        yield layers


def _bracket(values: Sequence[tuple[str, float]]) -> tuple[float | None, float | None]:
    """The largest lower and the smallest upper bound; estimates say nothing."""
    lower, upper = ([value for side, value in values if side == wanted] for wanted in ("lower", "upper"))
    return max(lower, default=None), min(upper, default=None)
