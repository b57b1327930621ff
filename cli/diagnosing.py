"""``certify diagnose``: why a network trains badly, and what its activations became."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli.learning import ArchitectureOptions
from cli.options import DataOptions, OutputOptions

if TYPE_CHECKING:
    from rich.table import Table

    from analysis.diagnosis import Diagnosis

#: Ratios of gradients beyond which they explode, or vanish.
EXPLODED = 100.0


def diagnose(
    architecture: ArchitectureOptions,
    data: DataOptions,
    output: OutputOptions,
    checkpoint: Annotated[
        Path | None,
        typer.Argument(metavar="[CKPT]", help="A checkpoint of `certify train`; without one, --arch at its start."),
    ] = None,
    radius: Annotated[
        str | None, typer.Option(metavar="R", help="Compare pre-activations clean and attacked at this radius (linf).")
    ] = None,
    plots: Annotated[Path | None, typer.Option(metavar="FOLDER", help="Draw gradients, histograms and KAFs.")] = None,
    kind: Annotated[str, typer.Option(metavar="KIND", help="Of the pictures: svg, png or pdf.")] = "svg",
) -> None:
    """Gradients layer by layer, gains of activations, where NaN begins, learned KAFs.

    Gradient norms are those of one batch, at the start and at the checkpoint's weights. Their first-to-last ratio is
    near 1 in a network that trains; far above, gradients explode.
    """
    from analysis import figures
    from analysis.diagnosis import diagnose as ask
    from cli import output as out
    from cli.parsing import radii, single

    console = out.console(output.json)
    figures.check_kind(f"plot.{kind}")
    start, model, name, given = _subject(checkpoint, architecture, data)
    shift = 0.0 if radius is None else float(single(radii(radius), "radius"))
    log = [] if plots is None or checkpoint is None else _log(checkpoint)  # refused before anything is computed
    found = ask(start, model, given.x, given.y, radius=shift, seed=data.seed)
    console.print(f"{name}, on {given.text}\n", soft_wrap=True)
    console.print(table_of(found, trained=checkpoint is not None))
    for sentence in sentences(found, trained=checkpoint is not None):
        console.print(sentence, soft_wrap=True)
    if plots is not None:
        drawn = {"gradients": figures.gradients(found, log)}
        if found.histograms:
            drawn["histograms"] = figures.histograms(found.histograms)
        if found.shapes:
            drawn["kafs"] = figures.shapes(found.shapes)
        for word, picture in drawn.items():
            console.print(f"plot: {figures.save(picture, plots / f'{word}.{kind}')}", soft_wrap=True)
    options = out.arguments(architecture, data, checkpoint=checkpoint, radius=radius)
    out.publish(output.json, "diagnose", options, found)


def table_of(found: Diagnosis, *, trained: bool) -> Table:
    """Return a row per layer with its gradients, and per activation with its gain and certified ranges.

    A learned function that nothing certifies has "-" in their place.
    """
    from cli.theme import number, span, table

    columns = ["gradient at start", *(["gradient now"] if trained else []), "gain", "slopes f'", "curvature f''"]
    made = table("Layers", "layer", *columns)
    shapes = {shape.layer: shape for shape in found.shapes}
    for name, norm in found.start.items():
        now = [number(found.now[name])] if trained else []
        made.add_row(name, number(norm), *now, "", "", "")
    made.add_section()
    for name, value in found.gains.items():
        shape, ranges = shapes.get(name), ["", ""]
        if shape is not None:
            ends = [shape.slope if math.isfinite(shape.slope[1]) else None, shape.curvature]
            ranges = ["-" if end is None else span(end) for end in ends]
        made.add_row(name, *[""] * (1 + trained), number(value), *ranges)
    return made


def sentences(found: Diagnosis, *, trained: bool) -> list[str]:
    """Return what the numbers say."""
    from cli.theme import number

    pairs = [("At the start", found.ratio_start), *([("Now", found.ratio_now)] if trained else [])]
    said = [
        f"{when} the first layer's gradient is {number(ratio)} times the last hidden one's." for when, ratio in pairs
    ]
    if found.ratio_start > EXPLODED:
        said.append(
            "Gradients explode: an activation after an addition multiplies the skip path, block by block. "
            "Pre-activation blocks (resnet56's default) or a base with a small KAF on it (silu+kaf) keep them level."
        )
    elif found.ratio_start < 1 / EXPLODED:
        said.append("Gradients vanish: the first layers hardly learn. Residual blocks or normalisation pass them on.")
    said.append("No NaN or infinity appears." if found.origin is None else f"NaN or infinity begins in {found.origin}.")
    said.append(
        "Gain: E f'^2 / Var f for a normal input; what a normalised layer does to squared gradients (ReLU 1.47)."
    )
    return said


def _subject(checkpoint: Path | None, architecture: ArchitectureOptions, data: DataOptions) -> tuple[Any, ...]:
    """The network at its start and as it is, its name, and samples."""
    from dataclasses import replace

    from cli.learning import architecture_of
    from cli.options import NetworkOptions
    from cli.subjects import inputs, samples, samples_of, subjects
    from models import checkpoint as checkpoints
    from models import data as sets
    from models.networks import build

    if checkpoint is None:
        found = sets.load(data.data or "digits", data_dir=data.data_dir, download=data.download)
        model = build(architecture_of(architecture, found), seed=data.seed).eval()
        name = f"{architecture.arch} with {architecture.activation} at its start (seed {data.seed})"
        return model, model, name, samples_of(found, data)
    meta = checkpoints.load(checkpoint).meta
    (network,) = subjects(NetworkOptions(checkpoints=[checkpoint]))
    given = samples(data, [network])
    start = build(meta["architecture"], seed=int(meta.get("seed", 0))).eval()
    return start, network.model, f"{network.name}: {network.network}", replace(given, x=inputs(network, given))


def _log(checkpoint: Path) -> list[dict[str, Any]]:
    """The lines of the run's log, if it is there; raises ``InvalidFile`` where it is damaged."""
    import json

    from certify.errors import InvalidFile
    from models.files import read_bytes

    path = (checkpoint if checkpoint.is_dir() else checkpoint.parent) / "log.jsonl"
    if not path.is_file():
        return []
    try:
        lines = [json.loads(line) for line in read_bytes(path).splitlines()]
    except (ValueError, RecursionError):
        lines = [None]
    if not all(isinstance(line, dict) for line in lines):
        raise InvalidFile(f"{path} is damaged or truncated", "an object of JSON per line", "copy it again")
    return lines
