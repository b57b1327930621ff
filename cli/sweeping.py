"""``certify sweep``: many networks from one file, in one table."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli.options import OutputOptions
from cli.settings import assignments

if TYPE_CHECKING:
    from rich.table import Table

    from analysis.summary import Mean, Summary
    from analysis.sweep import Result, Sweep
    from models.data import Dataset


def sweep(
    output: OutputOptions,
    file: Annotated[
        str, typer.Argument(metavar="FILE", help="A TOML file, or one of ours: vgg-fastat, resnet20-fastat.")
    ],
    data: Annotated[str | None, typer.Option(metavar="NAME", help="Another data set than the file's.")] = None,
    data_dir: Annotated[Path | None, typer.Option(metavar="FOLDER", help="torchvision's root folder.")] = None,
    images: Annotated[int | None, typer.Option(metavar="N", help="Train on N random images only.")] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change the file: train.epochs=2, seeds=[0,1,2]."),
    ] = None,
    out: Annotated[Path | None, typer.Option(metavar="FOLDER", help="Results go here [sweeps/FILE].")] = None,
) -> None:
    """Train, attack and certify many networks: one table of means and intervals.

    Every network's result is kept as soon as it is there; run it again to go on where it stopped. The folder holds a
    checkpoint per network, table.csv, table.md and scatter.svg (accuracy against robustness).
    """
    from analysis import figures
    from analysis.summary import summarise
    from analysis.sweep import load_sweep, run
    from cli import output as writer
    from models import data as sets
    from models.files import write

    console = writer.console(output.json)
    plan = load_sweep(file, assignments(set_ or ()) | ({} if data is None else {"data": data}))
    found = _fewer(sets.trainable(sets.load(plan.data, data_dir=data_dir)), images)
    folder = out or Path("sweeps") / Path(file).stem
    cells = plan.cells
    console.print(
        f"{plan.title}: {len(cells)} networks on {len(found.train_x):,} images of {found.name}", soft_wrap=True
    )
    results: list[Result] = []
    with writer.progress("networks", len(cells)) as tick:
        for result in run(plan, found, folder):
            results.append(result)
            console.print(result_words(result), soft_wrap=True)
            tick(1)
    rows = summarise(results)
    console.print()
    console.print(table_of(plan, rows))
    console.print(
        "Intervals are 95 %: over seeds (Student) and over test images (Clopper-Pearson) together.", style="dim"
    )
    lines = [heads(plan), *(_cells(row, plan) for row in rows)]
    write({folder / "table.csv": _csv(plan, rows).encode(), folder / "table.md": _markdown(lines).encode()})
    figures.save(figures.accuracy_scatter(rows, plan.judge.radii[0]), folder / "scatter.svg")
    console.print(f"results: {folder}   table.csv, table.md, scatter.svg, a checkpoint per network", soft_wrap=True)
    given = {"file": file, "data": found.name, "images": images, "set": list(set_ or ()), "seed": plan.judge.seed}
    writer.publish(output.json, "sweep", given, {"title": plan.title, "rows": rows, "results": results})


def result_words(result: Result) -> str:
    """Return one network's line."""
    from typing import get_args

    from cli.theme import percent, seconds
    from models.training.records import Status

    if result.clean is None:
        return f"{result.cell.name}: {result.status}"
    parts = [f"clean {percent(result.clean.value)}"]
    for name, rates in (("attacked", result.attacked), ("certified", result.certified)):
        if rates:
            parts.append(f"{name} {' / '.join(percent(rate.value) for rate in rates)}")
    words = f"{result.cell.name}: {', '.join(parts)} ({seconds(result.seconds)}"
    words = f"{words}, overfitted in epoch {result.overfitted[0]})" if result.overfitted else f"{words})"
    return words if result.status in get_args(Status) else f"{words}; {result.status}"


def heads(plan: Sweep) -> list[str]:
    """Return the table's columns."""
    judged = ["attacked", *(["certified"] if plan.judge.methods else [])]
    return [
        "network",
        "activation",
        "recipe",
        "seeds",
        "clean %",
        *(f"{what} {radius} %" for what in judged for radius in plan.judge.radii),
        "train s",
    ]


def table_of(plan: Sweep, rows: Sequence[Summary]) -> Table:
    """Return the table of all rows."""
    from cli.theme import table

    made = table(plan.title, *heads(plan))
    for row in rows:
        made.add_row(*_cells(row, plan))
    return made


def _cells(row: Summary, plan: Sweep) -> list[str]:
    judged = [row.attacked, *([row.certified] if plan.judge.methods else [])]
    missing: list[Mean | None] = [None] * len(plan.judge.radii)
    rates = [rate for rates in judged for rate in (rates or missing)]
    seeds = f"{row.seeds}" if not row.failed else f"{row.seeds}, {row.failed} failed"
    shown = [_mean(rate) for rate in (row.clean, *rates)]
    return [row.network, row.activation, row.recipe, seeds, *shown, f"{row.seconds:.0f}"]


def _mean(value: Mean | None) -> str:
    """77.5 (75-80): the interval rounded outward."""
    import math

    if value is None:
        return "-"
    return f"{100 * value.value:.1f} ({math.floor(100 * value.low)}-{math.ceil(100 * value.high)})"


def _csv(plan: Sweep, rows: Sequence[Summary]) -> str:
    """Numbers for other programs: every mean with both ends of its interval, in columns of their own."""
    import csv
    import io

    judged = ["attacked", *(["certified"] if plan.judge.methods else [])]
    names = ["clean", *(f"{what} {radius}" for what in judged for radius in plan.judge.radii)]
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    ends = [f"{name}{end}" for name in names for end in ("", " low", " high")]
    writer.writerow(["network", "activation", "recipe", "seeds", "failed", *ends, "train seconds"])
    for row in rows:
        means: list[Mean | None] = [row.clean, *row.attacked, *row.certified]
        means += [None] * (len(names) - len(means))
        numbers = [x for mean in means for x in (("", "", "") if mean is None else (mean.value, mean.low, mean.high))]
        writer.writerow([row.network, row.activation, row.recipe, row.seeds, row.failed, *numbers, row.seconds])
    return stream.getvalue()


def _markdown(lines: Sequence[Sequence[str]]) -> str:
    head, *body = ["| " + " | ".join(line) + " |" for line in lines]
    return "\n".join([head, "|" + "---|" * len(lines[0]), *body]) + "\n"


def _fewer(found: Dataset, images: int | None) -> Any:
    """The data set with so many of its training images."""
    from dataclasses import replace

    from models.data import subset

    if images is None:
        return found
    x, y, _ = subset(found.train_x, found.train_y, images, 0)
    return replace(found, train_x=x, train_y=y)
