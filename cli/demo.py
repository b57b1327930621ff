"""``certify demo``: two networks on handwritten digits, from training to the layer to blame."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from cli.subjects import Samples, Subject
    from models.data import Dataset
    from models.training import TrainConfig

#: Name to activation: a ReLU net and a KAF net (which starts as an ELU) of the same shape.
NETWORKS = {"relu": "relu", "kaf": "kaf-elu"}
HIDDEN = (64, 64)
RADII = "0.02,0.05,0.1"
LAYER_RADIUS = "0.05"
RADIUS = 0.1  # of training
EPOCHS, QUICK_EPOCHS = 40, 6
LAYER_SAMPLES, QUICK_SAMPLES = 100, 40


def demo(
    out: Annotated[
        Path, typer.Option(metavar="FOLDER", help="Checkpoints, report.html and report.json go here.")
    ] = Path("demo"),
    quick: Annotated[bool, typer.Option("--quick", help="Few epochs and images: a check, not a result.")] = False,
) -> None:
    """Start here: two small networks, from training to the layer to blame.

    Trains a ReLU net and a KAF net of the same shape on handwritten digits, attacks them, bounds them, and says in
    plain words what came out. Needs no network and about half a minute.
    """
    import torch

    from analysis.protocol import Protocol
    from analysis.runs import Heading, carry_out
    from analysis.units import LayerPlan, Stage
    from cli import output, words
    from cli.assessing import case_of, legend, show, show_together
    from cli.exports import write_files
    from cli.options import FileOptions
    from cli.parsing import attack_of, radii

    torch.set_num_threads(1)  # layers of 64 neurons only lose to a second thread, ten-fold on a busy machine
    console = output.console()
    given, networks = _trained(console, out, quick)
    protocol = Protocol(radii=radii(RADII), methods=("ibp", "crown"), attack=attack_of("pgd"))
    plan = LayerPlan(radii(LAYER_RADIUS)[0], QUICK_SAMPLES if quick else LAYER_SAMPLES)
    stage = Stage(tuple(case_of(network, given, protocol) for network in networks), protocol, plan, out)
    with output.progress("evaluating", sum(map(stage.work, stage.units))) as tick:
        report = carry_out(stage, Heading("demo", {"out": out, "quick": quick}, given.text), tick=tick).report
    console.print(f"\nEvaluated on {given.text}.\n")
    for network in report.networks:
        show(console, network, report.course)
    show_together(console, report.networks)
    legend(console, (*words.LEGEND, *words.LAYER_LEGEND))
    console.print("In plain words", style="bold")
    for sentence in words.closing(report.networks):
        console.print(sentence, markup=False)
    output.publish_report(str(out / "report.json"), report)
    (page,) = write_files(report, FileOptions(html=out / "report.html"))
    places = f"all numbers: {out / 'report.json'}; the networks: {out / 'relu'}, {out / 'kaf'}"
    console.print(f"\nThe report as a page: {page}; {places}", markup=False, soft_wrap=True)


def _trained(console: Console, out: Path, quick: bool) -> tuple[Samples, list[Subject]]:
    """Train both networks and return them with the test images."""
    from cli.options import DataOptions, NetworkOptions
    from cli.subjects import samples, subjects
    from models import data

    digits, config = data.load("digits"), _config(quick)
    console.print(
        f"Training two networks of the same shape ({digits.train_x[0].numel()}-{'-'.join(map(str, HIDDEN))}-"
        f"{digits.classes}) on {len(digits.train_x)} handwritten digits of 8x8 pixels: one with ReLU, one with "
        "trainable kernel activation functions (KAF). Every image is attacked while they learn (fast adversarial "
        f"training, radius {RADIUS:g}, {config.epochs} epochs, weight decay {config.optimizer.weight_decay:g}, KAF "
        f"parameters at {config.optimizer.kaf_lr:g} of the rate, seed {config.seed}).",
    )
    for name in NETWORKS:
        _train(console, out / name, name, digits, config)
    networks = subjects(NetworkOptions(checkpoints=[out / name for name in NETWORKS]))
    chosen = DataOptions(samples=QUICK_SAMPLES if quick else len(digits.test_x))
    return samples(chosen, networks), networks


def _train(console: Console, place: Path, name: str, digits: Dataset, config: TrainConfig) -> None:
    from cli.output import progress
    from cli.theme import percent, seconds
    from models.networks import architecture, build
    from models.training import train

    shape = architecture("mlp", digits.input_shape, digits.classes, NETWORKS[name], hidden=HIDDEN)
    with progress(f"training {name}", config.epochs) as tick:
        result = train(build(shape, seed=config.seed), digits, config, directory=place, on_epoch=lambda _: tick(1))
    if result.status == "interrupted":
        raise KeyboardInterrupt
    best = result.records[result.best_epoch - 1]
    console.print(f"  {name}: {seconds(result.seconds)}, validation accuracy {percent(best.val_accuracy)}")


def _config(quick: bool) -> TrainConfig:
    """Fast adversarial training; weight decay and a low rate for the KAF parameters keep functions smooth."""
    from models.training import Engine, Fast, Optimizer, TrainConfig

    return TrainConfig(
        epochs=QUICK_EPOCHS if quick else EPOCHS,
        recipe=Fast(radius=RADIUS),
        optimizer=Optimizer(weight_decay=1e-3, kaf_lr=0.2),
        engine=Engine(device="cpu"),
    )
