"""The options that commands share, as nouns. Plain text stays text here: its meaning is found when a command runs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

#: The largest seed, as in ``models.training.config``, which would import torch.
MOST_SEED = 2**63 - 1


@dataclass(frozen=True, kw_only=True)
class NetworkOptions:
    """Which networks: checkpoints of ours, or a network of the user's own."""

    checkpoints: Annotated[
        list[Path] | None,
        typer.Argument(metavar="[CKPT]...", help="Checkpoints of `certify train`: folder, .json or .safetensors."),
    ] = None
    model: Annotated[
        str | None,
        typer.Option(metavar="MODULE:FACTORY", help="Your own network: a function that returns it in eval mode."),
    ] = None
    weights: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Its weights: .safetensors, or a state_dict as .pt.")
    ] = None
    input_shape: Annotated[str | None, typer.Option(metavar="C,H,W", help="The shape of one of its inputs.")] = None
    mean: Annotated[
        str | None, typer.Option(metavar="M,...", help="Normalisation to put before it: one mean per channel ...")
    ] = None
    std: Annotated[str | None, typer.Option(metavar="S,...", help="... and one standard deviation.")] = None


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """Which samples: a random, seeded subset of a data set's test split."""

    data: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="digits, mnist, fashion-mnist, cifar10 or npz:PATH [the checkpoint's own]."),
    ] = None
    data_dir: Annotated[Path | None, typer.Option(metavar="FOLDER", help="torchvision's root folder.")] = None
    download: Annotated[bool, typer.Option("--download", help="Fetch the data if it is not there.")] = False
    samples: Annotated[
        int | None, typer.Option(metavar="N", help="Test samples, drawn at random with the seed [200, or all].")
    ] = None
    seed: Annotated[int, typer.Option(min=0, max=MOST_SEED, metavar="N", help="Decides samples and random starts.")] = 0


@dataclass(frozen=True, kw_only=True)
class BallOptions:
    """Which perturbations, in the units of images in [0, 1]."""

    radius: Annotated[str, typer.Option(metavar="R,...", help="Radii, exact: 8/255 or 0.1.")] = "2/255,8/255"
    norm: Annotated[str, typer.Option(metavar="NORM", help="linf, l2 or l1.")] = "linf"


@dataclass(frozen=True, kw_only=True)
class BoundOptions:
    """How to bound."""

    methods: Annotated[str, typer.Option(metavar="M,...", help="Bound methods (see `certify ops`).")] = "ibp,crown"
    arithmetic: Annotated[
        str, typer.Option(metavar="KIND", help="float: holds for the network in floats; real: rounding is ignored.")
    ] = "float"


@dataclass(frozen=True, kw_only=True)
class AttackOptions:
    """How to attack."""

    attack: Annotated[str, typer.Option(metavar="NAME", help="The attack (see `certify ops`).")] = "pgd"
    steps: Annotated[int | None, typer.Option(metavar="N", help="Its steps [pgd: 40].")] = None
    restarts: Annotated[int | None, typer.Option(metavar="N", help="Its random restarts [pgd: 5].")] = None


@dataclass(frozen=True, kw_only=True)
class GateOptions:
    """Which shares of the images a network must reach, and where CI reads the verdicts."""

    min_certified: Annotated[
        str | None, typer.Option(metavar="P", help="At least this share certified, by any method: 0.6 or 60%.")
    ] = None
    min_attacked: Annotated[str | None, typer.Option(metavar="P", help="At least this share right after attack.")] = (
        None
    )
    min_clean: Annotated[str | None, typer.Option(metavar="P", help="At least this share right unchanged.")] = None
    junit: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the verdicts as JUnit XML.")] = None


@dataclass(frozen=True, kw_only=True)
class OutputOptions:
    """Where the numbers go beside the tables."""

    json: Annotated[
        str | None, typer.Option("--json", metavar="FILE", help="Write all numbers as JSON; - is stdout.")
    ] = None


@dataclass(frozen=True, kw_only=True)
class FileOptions:
    """Files to write a report to, for people and other programs."""

    html: Annotated[Path | None, typer.Option(metavar="FILE", help="One page with tables and figures.")] = None
    markdown: Annotated[Path | None, typer.Option(metavar="FILE", help="Tables and sentences as Markdown.")] = None
    csv: Annotated[Path | None, typer.Option(metavar="FILE", help="A row per network and radius.")] = None
    latex: Annotated[Path | None, typer.Option(metavar="FILE", help="A table for a paper (booktabs).")] = None


@dataclass(frozen=True, kw_only=True)
class LayerOptions:
    """Whether and where to look at the layers."""

    layers: Annotated[bool, typer.Option(help="Measure each layer too.")] = True
    layer_radius: Annotated[str | None, typer.Option(metavar="R", help="At this radius [the smallest one].")] = None
    layer_samples: Annotated[int, typer.Option(min=1, metavar="N", help="On at most so many samples.")] = 50
    layer: Annotated[
        str | None, typer.Option(metavar="NAME", help="Look into this layer: its most costly neurons or channels.")
    ] = None
    pixels: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw which pixels the bounds depend on: .svg, .png or .pdf.")
    ] = None


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """How to go through a long run, and where it is kept."""

    out: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Keep records.jsonl, timings.jsonl and manifest.json here.")
    ] = None
    resume: Annotated[bool, typer.Option("--resume", help="Go on with what --out holds.")] = False
    from_: Annotated[
        Path | None, typer.Option("--from", metavar="PATH", help="Show what an earlier --out, or its records, holds.")
    ] = None
    jobs: Annotated[
        int, typer.Option(min=1, metavar="N", help="Processes that share the work; with --out each has one thread.")
    ] = 1
    shard: Annotated[
        str | None, typer.Option(metavar="I/N", help="Only every N-th unit of work, from the I-th; see certify merge.")
    ] = None
    slurm: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Submit N shards to SLURM instead (needs submitit).")
    ] = None
    time_limit: Annotated[
        float | None,
        typer.Option(metavar="S", help="Begin nothing new after S seconds (exit code 4)."),
    ] = None
    sample_time_limit: Annotated[
        float | None, typer.Option(metavar="S", help="Seconds per sample; what is late says timeout.")
    ] = None
    batch: Annotated[int, typer.Option(min=1, metavar="N", help="Samples computed together: a unit of work.")] = 100
