"""``certify train``: a network of ours on a data set, to a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli.options import MOST_SEED
from cli.settings import assignments, put

if TYPE_CHECKING:
    from models.data import Dataset
    from models.training import EpochRecord, TrainConfig, TrainingResult

#: Data sets with more training images than this get few epochs by default.
LARGE, FEW_EPOCHS, MANY_EPOCHS = 10_000, 5, 40
CNN_WIDTH = 8

#: What says the options of a network that ``--net`` must not say.
SAID_BY = {
    "network": "--arch",
    "activation": "--activation",
    "hidden": "--hidden",
    "sizes": "--hidden",
    "input_shape": "--data",
    "classes": "--data",
}


@dataclass(frozen=True, kw_only=True)
class ArchitectureOptions:
    """Which network."""

    arch: Annotated[str, typer.Option(metavar="NAME", help="mlp, cnn, vgg, resnet20, ... (see `certify ops`).")] = "mlp"
    activation: Annotated[str, typer.Option(metavar="NAME", help="relu, kaf, kaf-elu, ... (see `certify ops`).")] = (
        "relu"
    )
    hidden: Annotated[str, typer.Option(metavar="N,...", help="Hidden layers of an mlp.")] = "64,64"
    width: Annotated[
        int | None, typer.Option(metavar="N", help="Channels of the first layer [cnn: 8; others: as published].")
    ] = None
    net: Annotated[
        list[str] | None,
        typer.Option("--net", metavar="KEY=VALUE", help="Other options of the network: preactivation=false, init=..."),
    ] = None
    normalise: Annotated[
        bool, typer.Option("--normalise", help="Normalise with the training images' mean and deviation.")
    ] = False


@dataclass(frozen=True, kw_only=True)
class SourceOptions:
    """What to train on."""

    data: Annotated[str, typer.Option(metavar="NAME", help="digits, mnist, ... (see `certify ops`).")] = "digits"
    data_dir: Annotated[Path | None, typer.Option(metavar="FOLDER", help="torchvision's root folder.")] = None
    download: Annotated[bool, typer.Option("--download", help="Fetch the data if it is not there.")] = False


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """How to train: a config file, and options that go before it."""

    config: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A TOML file of the run's options; those given here go before.")
    ] = None
    set: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Any option by its name in that file: optimizer.clip=1."),
    ] = None
    epochs: Annotated[int | None, typer.Option(metavar="N", help="Epochs [40; 5 for more than 10,000 images].")] = None
    batch: Annotated[int | None, typer.Option(metavar="N", help="Images per step [128].")] = None
    method: Annotated[
        str | None, typer.Option(metavar="NAME", help="The recipe: standard, fast, pgd, ibp, ... (see `certify ops`).")
    ] = None
    radius: Annotated[str | None, typer.Option(metavar="R", help="Radius of adversarial or certified training.")] = None
    norm: Annotated[str | None, typer.Option(metavar="NORM", help="Its norm: linf, l2 or l1 [linf].")] = None
    steps: Annotated[int | None, typer.Option(metavar="N", help="Steps of the recipe's attack.")] = None
    optimizer: Annotated[str | None, typer.Option(metavar="NAME", help="adam, adamw or sgd [adam].")] = None
    lr: Annotated[float | None, typer.Option(metavar="RATE", help="Peak of the learning rate [0.005].")] = None
    kaf_lr: Annotated[float | None, typer.Option(metavar="X", help="Factor on the rate for KAF parameters [1].")] = None
    weight_decay: Annotated[float | None, typer.Option(metavar="X", help="l2 penalty on weights [0].")] = None
    device: Annotated[str | None, typer.Option(metavar="NAME", help="auto, cpu or cuda [auto].")] = None
    patience: Annotated[
        int | None, typer.Option(metavar="N", help="Stop after N epochs without a better validation score.")
    ] = None
    seed: Annotated[
        int | None, typer.Option(min=0, max=MOST_SEED, metavar="N", help="Decides everything random [0].")
    ] = None


#: Where the options above stand in a config; the others have their own name there.
PLACES = {
    "method": "recipe.name",
    "radius": "recipe.radius",
    "norm": "recipe.norm",
    "steps": "recipe.steps",
    "optimizer": "optimizer.name",
    "lr": "optimizer.lr",
    "kaf_lr": "optimizer.kaf_lr",
    "weight_decay": "optimizer.weight_decay",
    "device": "engine.device",
    "patience": "watch.patience",
}


def train(
    architecture: ArchitectureOptions,
    options: RunOptions,
    source: SourceOptions,
    out: Annotated[Path | None, typer.Option(metavar="FOLDER", help="The checkpoint [runs/DATA-ARCH-ACT].")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in --out exactly.")] = False,
) -> None:
    """Train a network and save it.

    The best weights by validation become a checkpoint, after every epoch; Ctrl-C keeps them, --resume continues.
    """
    from cli.output import console as open_console
    from models.networks import build
    from models.training import launched

    console = open_console()
    found = data_of(source)
    chosen = config_of(options, found)
    model = build(architecture_of(architecture, found), seed=chosen.seed)
    place = out or Path("runs") / f"{source.data.rpartition('/')[2]}-{architecture.arch}-{architecture.activation}"
    _check_place(place, resume)
    parameters = sum(p.numel() for p in model.parameters())
    console.print(
        f"{architecture.arch} with {architecture.activation}, {parameters:,} parameters, on {len(found.train_x):,} "
        f"images of {found.name}; {recipe_words(chosen)}, {chosen.epochs} epochs, seed {chosen.seed}",
        soft_wrap=True,
    )
    with launched() as group:
        _run(model, found, chosen, place, resume, console if group.main else open_console(quiet=True))


def _run(model: Any, found: Dataset, config: TrainConfig, place: Path, resume: bool, console: Any) -> None:
    """Train with a line per epoch, and say what came out."""
    from cli.output import progress
    from cli.theme import percent, seconds
    from models.training import train as train_model
    from models.training.validation import accuracy

    with progress("training", config.epochs) as tick:

        def say(record: EpochRecord) -> None:
            console.print(epoch_words(record), soft_wrap=True)
            tick(1)

        result = train_model(model, found, config, directory=place, resume=resume, on_epoch=say)
    for epoch in result.overfitted:
        console.print(overfitting_words(epoch, config, result), soft_wrap=True)
    if result.status == "interrupted":
        saved = f"the best weights are in {place}; --resume continues" if result.best_epoch else "nothing saved yet"
        typer.echo(f"interrupted; {saved}", err=True)
        raise typer.Exit(130)
    console.print(
        f"{result.status} after {seconds(result.seconds)}; best epoch {result.best_epoch}; test accuracy "
        f"{percent(accuracy(result.model, found.test_x, found.test_y))} of {len(found.test_x):,} images"
    )
    console.print(f"checkpoint: {place}   next: certify report {place}", soft_wrap=True)


def epoch_words(record: EpochRecord) -> str:
    """Return the line of one epoch."""
    from cli.theme import count, percent, seconds

    parts = [f"epoch {record.epoch:>3}: loss {record.loss:.4f}", f"validation {percent(record.val_accuracy)}"]
    if record.val_robust is not None:
        parts.append(f"under attack {percent(record.val_robust)}")
    if record.val_certified is not None:
        parts.append(f"certified {percent(record.val_certified)}")
    return ", ".join([*parts, seconds(record.seconds), f"{count(round(record.images_per_second))} images/s"])


def overfitting_words(epoch: int, config: TrainConfig, result: TrainingResult) -> str:
    """Return what was noticed after ``epoch``, and what was done about it."""
    answers = {
        "switch": "went back to the best weights and on with PGD training",
        "stop": "stopped there with the best weights",
        "report": "went on all the same",
    }
    stopped = result.status == "overfitted" and epoch < config.epochs
    answered = epoch < len(result.records) or stopped
    answer = answers[config.watch.overfitting] if answered else "no epoch came after it; the best weights are kept"
    return (
        f"catastrophic overfitting after epoch {epoch}: {config.recipe.name} holds against its own attack and not "
        f"against PGD; {answer}"
    )


def recipe_words(config: TrainConfig) -> str:
    """Return the recipe in words: "fast training against linf 0.1"."""
    threat = config.recipe.threat
    against = "" if threat is None else f" against {threat.norm} {threat.radius:.4g}"
    return f"{config.recipe.name} training{against}"


def data_of(options: SourceOptions) -> Dataset:
    """Return the data set that the options name, which must have images to train on."""
    from models import data as sets

    return sets.trainable(sets.load(options.data, data_dir=options.data_dir, download=options.download))


def architecture_of(options: ArchitectureOptions, found: Dataset) -> dict[str, Any]:
    """Return the architecture that the options name, for that data."""
    from cli.parsing import integers
    from models.networks import architecture, said_elsewhere

    given: dict[str, Any] = {"mean": list(found.mean), "std": list(found.std)} if options.normalise else {}
    if options.width is not None or options.arch == "cnn":
        given["width"] = CNN_WIDTH if options.width is None else options.width
    named = assignments(options.net or (), example="--net width=8")
    said_elsewhere(named, SAID_BY)
    given |= named
    hidden = integers(options.hidden, "hidden", "64,64")
    return architecture(options.arch, found.input_shape, found.classes, options.activation, hidden=hidden, **given)


def config_of(options: RunOptions, found: Dataset) -> TrainConfig:
    """Return the config of the file, changed by ``--set`` and by the options that were given, in this order."""
    from models.training.config import TrainConfig, load_toml

    tables = load_toml(options.config) if options.config else {}
    assignments(options.set or (), tables)
    for name, value in vars(options).items():
        if name not in ("config", "set") and value is not None:
            put(tables, PLACES.get(name, name), value)
    tables.setdefault("epochs", FEW_EPOCHS if len(found.train_x) > LARGE else MANY_EPOCHS)
    return TrainConfig.from_dict(tables)


def _check_place(place: Path, resume: bool) -> None:
    from certify.errors import InvalidInput

    if not resume and (place / "model.json").exists():
        raise InvalidInput(
            f"{place} holds a run already", "a new folder", "--out FOLDER, or --resume to continue that run"
        )
