"""``certify lr-find``: which learning rates a network bears."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cli.learning import ArchitectureOptions, RunOptions
from cli.options import MOST_SEED, OutputOptions

#: Rows of the printed curve.
ROWS = 12


def lr_find(
    architecture: ArchitectureOptions,
    options: RunOptions,
    output: OutputOptions,
    data: Annotated[str, typer.Option(metavar="NAME", help="digits, mnist, ... (see `certify ops`).")] = "digits",
    data_dir: Annotated[Path | None, typer.Option(metavar="FOLDER", help="torchvision's root folder.")] = None,
    low: Annotated[float, typer.Option(metavar="RATE", help="The first rate.")] = 1e-5,
    high: Annotated[float, typer.Option(metavar="RATE", help="The last rate.")] = 1.0,
    tries: Annotated[int, typer.Option(metavar="N", help="Steps from one to the other.")] = 100,
    seed: Annotated[
        int | None, typer.Option(min=0, max=MOST_SEED, metavar="N", help="Decides everything random [0].")
    ] = None,
    plot: Annotated[Path | None, typer.Option(metavar="FILE", help="Draw the curve: .svg, .png or .pdf.")] = None,
) -> None:
    """Find the learning rate: the loss while the rate grows.

    Takes the options of `certify train`. The peak of a one-cycle schedule lies between the rate at which the loss falls
    fastest and the one at which it is least.
    """
    from analysis import figures
    from cli import output as out
    from cli.learning import architecture_of, config_of, recipe_words, trainable
    from cli.theme import number, table
    from models import data as sets
    from models.networks import build
    from models.training import find_rate

    console = out.console(output.json)
    out.check_picture(plot)
    out.check_targets(json=output.json, plot=plot)
    found = trainable(sets.load(data, data_dir=data_dir))
    config = config_of(options, found, seed)
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
    given = out.arguments(architecture, options, data=data, low=low, high=high, tries=tries, seed=config.seed)
    out.publish(output.json, "lr-find", given, curve.to_dict())
