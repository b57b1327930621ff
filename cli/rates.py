"""``certify lr-find``: which learning rates a network bears."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cli.learning import ArchitectureOptions, RunOptions, SourceOptions
from cli.options import OutputOptions

#: Rows of the printed curve.
ROWS = 12


def lr_find(
    architecture: ArchitectureOptions,
    options: RunOptions,
    source: SourceOptions,
    output: OutputOptions,
    low: Annotated[float, typer.Option(metavar="RATE", help="The first rate.")] = 1e-5,
    high: Annotated[float, typer.Option(metavar="RATE", help="The last rate.")] = 1.0,
    tries: Annotated[int, typer.Option(metavar="N", help="Steps from one to the other.")] = 100,
    plot: Annotated[Path | None, typer.Option(metavar="FILE", help="Draw the curve: .svg, .png or .pdf.")] = None,
) -> None:
    """Find the learning rate: the loss while the rate grows.

    Takes the options of `certify train`. The peak of a one-cycle schedule lies between the rate at which the loss falls
    fastest and the one at which it is least.
    """
    from analysis import figures
    from cli import output as out
    from cli.learning import architecture_of, config_of, data_of, recipe_words
    from cli.theme import number, table
    from models.networks import build
    from models.training import find_rate

    console = out.console(output.json)
    out.check_picture(plot)
    out.check_targets(json=output.json, plot=plot)
    found = data_of(source)
    config = config_of(options, found)
    model = build(architecture_of(architecture, found), seed=config.seed)
    curve = find_rate(model, found, config, low=low, high=high, steps=tries)
    shown = table("Loss while the learning rate grows", "rate", "loss")
    for index in range(0, len(curve.rates), max(1, len(curve.rates) // ROWS)):
        shown.add_row(number(curve.rates[index]), number(curve.losses[index]))
    console.print(f"{architecture.arch} with {architecture.activation} on {found.name}, {recipe_words(config)}\n")
    console.print(shown)
    console.print(
        f"It falls fastest at {number(curve.suggestion)} and is least at {number(curve.limit)}: "
        f"try --lr {number(curve.suggestion)}."
    )
    if plot is not None:
        console.print(f"plot: {figures.save(figures.rate_curve(curve), plot)}", soft_wrap=True)
    given = out.arguments(architecture, options, source, low=low, high=high, tries=tries, seed=config.seed)
    out.publish(output.json, "lr-find", given, curve.to_dict())
