"""``certify report`` as a run: prepared, computed, kept, gone on with, or shown again."""

from __future__ import annotations

import dataclasses
import math
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import typer

from analysis.runs import Heading, Interrupted, Result, Way, carry_out
from analysis.shard import Shard
from analysis.units import Stage
from certify.errors import InvalidInput
from cli import output
from cli.assessing import case_of, check_layer, plan_of, protocol_of
from cli.complaints import INTERRUPTED
from cli.interrupts import promptly
from cli.options import AttackOptions, BallOptions, BoundOptions, DataOptions, LayerOptions, NetworkOptions, RunOptions
from cli.subjects import Samples, samples, subjects

#: Options that decide no number: how a run is gone through, and what of it is shown.
_SHOWN = ("layer", "pixels")
_WAYS = ("out", "resume", "from_", "jobs", "shard", "slurm", "time_limit", *_SHOWN)


@dataclass(frozen=True, kw_only=True)
class Asked:
    """All that the command line said about a run."""

    networks: NetworkOptions
    data: DataOptions
    ball: BallOptions
    bounding: BoundOptions
    attack: AttackOptions
    layers: LayerOptions
    run: RunOptions

    @property
    def arguments(self) -> dict[str, Any]:
        """The settings that decide the numbers."""
        bundles = [getattr(self, field.name) for field in dataclasses.fields(self)]
        return {name: value for name, value in output.arguments(*bundles).items() if name not in _WAYS}


def carried_out(asked: Asked) -> Result:
    """Compute what was asked; an interruption ends the command, with words about what is saved."""
    with promptly(f"interrupted: {tell(asked, 'all finished')}"):
        try:
            return _run(asked)
        except Interrupted as stop:
            typer.echo(f"interrupted: {tell(asked, f'{stop.done} of {stop.asked}')}", err=True)
            raise typer.Exit(INTERRUPTED) from None


def _run(asked: Asked) -> Result:
    """Compute what was asked, with a progress bar on stderr."""
    deadline = math.inf if asked.run.time_limit is None else time.monotonic() + asked.run.time_limit
    way = Way(
        folder=asked.run.out,
        resume=asked.run.resume,
        jobs=asked.run.jobs,
        shard=None if asked.run.shard is None else Shard.parse(asked.run.shard),
        deadline=deadline,
        load=partial(stage_of, asked),
    )
    stage, given = prepared(asked)
    units = stage.units if way.shard is None else way.shard.take(stage.units)
    with output.progress("report", sum(map(stage.work, units))) as tick:
        return carry_out(stage, Heading("report", asked.arguments, given.text), way, tick)


def prepared(asked: Asked) -> tuple[Stage, Samples]:
    """Return what a run works on, and its samples."""
    limit = asked.run.sample_time_limit
    protocol = dataclasses.replace(
        protocol_of(asked.ball, asked.data.seed, asked.attack, asked.bounding),
        batch=asked.run.batch,
        sample_seconds=math.inf if limit is None else limit,
    )
    plan, networks = plan_of(asked.layers, protocol), subjects(asked.networks)
    given = samples(asked.data, networks)
    check_layer(networks, given, asked.layers.layer)
    cases = tuple(case_of(network, given, protocol) for network in networks)
    return Stage(cases, protocol, plan, Path("alarms") if asked.run.out is None else asked.run.out / "alarms"), given


def stage_of(asked: Asked) -> Stage:
    """Return what a run works on; other processes call it."""
    return prepared(asked)[0]


def check(asked: Asked) -> None:
    """Raise ``InvalidInput`` for options that contradict each other."""
    run = asked.run
    if run.from_ is not None:
        _check_from(asked)
    for name in ("resume", "shard", "slurm"):
        if getattr(run, name) and run.out is None:
            raise InvalidInput(f"--{name} without --out", "the folder of the run", f"--{name} with --out FOLDER")
    for option, seconds in (("time-limit", run.time_limit), ("sample-time-limit", run.sample_time_limit)):
        if seconds is not None and not 0 < seconds < math.inf:
            raise InvalidInput(f"--{option} {seconds:g}", "seconds > 0", f"--{option} 3600")
    if (run.shard or run.slurm) and any(getattr(asked.layers, name) is not None for name in _SHOWN):
        raise InvalidInput("--layer or --pixels with a part of a run", "a whole run", "certify merge, then --from")
    if run.slurm is not None and run.shard is not None:
        raise InvalidInput("--slurm with --shard", "one of them", "--slurm N, which submits all N shards")


def _check_from(asked: Asked) -> None:
    """With --from all is said: any other option would be ignored in silence."""
    for bundle in dataclasses.fields(asked):
        given = getattr(asked, bundle.name)
        for field in dataclasses.fields(given):
            if getattr(given, field.name) not in (field.default, []) and field.name not in ("from_", *_SHOWN):
                name = "a network" if field.name == "checkpoints" else f"--{field.name.replace('_', '-')}"
                raise InvalidInput(f"{name} with --from", "--from alone: the records know the rest", "leave it out")


def tell(asked: Asked, done: str) -> str:
    """Return what is saved, ``done`` of the units of work, and how to go on."""
    if asked.run.out is None:
        return "nothing is kept: with --out FOLDER finished work stays"
    return f"{done} units of work are in {asked.run.out}; the same command with --resume goes on"
