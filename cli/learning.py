"""``certify train``: a network of ours on a data set, to a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from models.data import Dataset
    from models.recipe import Recipe

#: Data sets with more training images than this get few epochs by default.
LARGE, FEW_EPOCHS, MANY_EPOCHS = 10_000, 5, 40


@dataclass(frozen=True, kw_only=True)
class ArchitectureOptions:
    """Which network."""

    arch: Annotated[str, typer.Option(metavar="NAME", help="mlp or cnn.")] = "mlp"
    activation: Annotated[str, typer.Option(metavar="NAME", help="relu, kaf, kaf-elu, ... (see `certify ops`).")] = (
        "relu"
    )
    hidden: Annotated[str, typer.Option(metavar="N,...", help="Hidden layers of an mlp.")] = "64,64"
    width: Annotated[int, typer.Option(metavar="N", help="Channels of a cnn's first layer.")] = 8
    normalise: Annotated[
        bool, typer.Option("--normalise", help="Normalise with the training images' mean and deviation.")
    ] = False


@dataclass(frozen=True, kw_only=True)
class RecipeOptions:
    """How to train."""

    epochs: Annotated[int | None, typer.Option(metavar="N", help="Epochs [40; 5 for more than 10,000 images].")] = None
    batch: Annotated[int, typer.Option(metavar="N", help="Images per step.")] = 128
    optimizer: Annotated[str, typer.Option(metavar="NAME", help="adam or sgd.")] = "adam"
    lr: Annotated[float, typer.Option(metavar="RATE", help="Peak of the one-cycle learning rate.")] = 5e-3
    kaf_lr: Annotated[float, typer.Option(metavar="X", help="Factor on the rate for KAF parameters.")] = 1.0
    weight_decay: Annotated[float, typer.Option(metavar="X", help="l2 penalty on weights.")] = 0.0
    method: Annotated[
        str, typer.Option(metavar="NAME", help="standard, or adversarial: fast (one step), pgd (several).")
    ] = "standard"
    radius: Annotated[str, typer.Option(metavar="R", help="Radius of adversarial training.")] = "0"
    norm: Annotated[str, typer.Option(metavar="NORM", help="Its norm: linf, l2 or l1.")] = "linf"
    steps: Annotated[int, typer.Option(metavar="N", help="Steps of pgd.")] = 7
    device: Annotated[str, typer.Option(metavar="NAME", help="auto, cpu or cuda.")] = "auto"
    patience: Annotated[
        int | None, typer.Option(metavar="N", help="Stop after N epochs without a better validation score.")
    ] = None


def train(
    architecture: ArchitectureOptions,
    recipe: RecipeOptions,
    data: Annotated[str, typer.Option(metavar="NAME", help="digits, mnist, ... (see `certify ops`).")] = "digits",
    data_dir: Annotated[Path | None, typer.Option(metavar="FOLDER", help="torchvision's root folder.")] = None,
    download: Annotated[bool, typer.Option("--download", help="Fetch the data if it is not there.")] = False,
    seed: Annotated[int, typer.Option(min=0, metavar="N", help="Decides everything random.")] = 0,
    out: Annotated[Path | None, typer.Option(metavar="FOLDER", help="The checkpoint [runs/DATA-ARCH-ACT].")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in --out exactly.")] = False,
) -> None:
    """Train a network and save it.

    The best weights by validation become a checkpoint, after every epoch; Ctrl-C keeps them, --resume continues.
    """
    from cli.output import console as open_console
    from models import data as sets
    from models.networks import build

    console = open_console()
    found = sets.load(data, data_dir=data_dir, download=download)
    chosen = _recipe(recipe, found, seed)
    model = build(_architecture(architecture, found), seed=seed)
    place = out or Path("runs") / f"{data.rpartition('/')[2]}-{architecture.arch}-{architecture.activation}"
    _check_place(place, resume)
    parameters = sum(p.numel() for p in model.parameters())
    console.print(
        f"{architecture.arch} with {architecture.activation}, {parameters:,} parameters, on {len(found.train_x):,} "
        f"images of {found.name}; {chosen.method} training, {chosen.epochs} epochs, seed {seed}",
        soft_wrap=True,
    )
    _run(model, found, chosen, place, resume, console)


def _run(model: Any, found: Dataset, recipe: Recipe, place: Path, resume: bool, console: Any) -> None:
    """Train with a line per epoch, and say what came out."""
    from cli.output import progress
    from cli.theme import percent, seconds
    from models.adversary import accuracy
    from models.training import train as train_model

    with progress("training", recipe.epochs) as tick:

        def say(record: Any) -> None:
            robust = "" if record.val_robust is None else f", under attack {percent(record.val_robust)}"
            console.print(
                f"epoch {record.epoch:>3}: loss {record.loss:.4f}, validation {percent(record.val_accuracy)}{robust}, "
                f"{seconds(record.seconds)}"
            )
            tick(1)

        result = train_model(model, found, recipe, directory=place, resume=resume, on_epoch=say)
    if result.status == "interrupted":
        saved = f"the best weights are in {place}; --resume continues" if result.best_epoch else "nothing saved yet"
        typer.echo(f"interrupted; {saved}", err=True)
        raise typer.Exit(130)
    console.print(
        f"{result.status} after {seconds(result.seconds)}; best epoch {result.best_epoch}; test accuracy "
        f"{percent(accuracy(result.model, found.test_x, found.test_y))} of {len(found.test_x):,} images"
    )
    console.print(f"checkpoint: {place}   next: certify report {place}", soft_wrap=True)


def _architecture(options: ArchitectureOptions, found: Dataset) -> dict[str, Any]:
    from cli.parsing import integers
    from models.networks import architecture

    given: dict[str, Any] = {"mean": list(found.mean), "std": list(found.std)} if options.normalise else {}
    if options.arch == "cnn":
        given["width"] = options.width
    hidden = integers(options.hidden, "hidden", "64,64")
    return architecture(options.arch, found.input_shape, found.classes, options.activation, hidden=hidden, **given)


def _recipe(options: RecipeOptions, found: Dataset, seed: int) -> Recipe:
    from dataclasses import asdict

    from certify.errors import InvalidInput
    from cli.parsing import radii
    from models.recipe import Recipe

    given = asdict(options)
    if given["epochs"] is None:
        given["epochs"] = FEW_EPOCHS if len(found.train_x) > LARGE else MANY_EPOCHS
    (radius, *more) = radii(options.radius)
    if more:
        raise InvalidInput(f"--radius {options.radius}", "one radius to train with", "--radius 8/255")
    return Recipe(**given | {"radius": float(radius), "seed": seed})


def _check_place(place: Path, resume: bool) -> None:
    from certify.errors import InvalidInput

    if not resume and (place / "model.json").exists():
        raise InvalidInput(
            f"{place} holds a run already", "a new folder", "--out FOLDER, or --resume to continue that run"
        )
