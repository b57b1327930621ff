"""The commands that ask questions of networks: report, bounds, attack, lipschitz."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from cli.complaints import TIMEOUT
from cli.options import (
    AttackOptions,
    BallOptions,
    BoundOptions,
    DataOptions,
    FileOptions,
    LayerOptions,
    NetworkOptions,
    OutputOptions,
    RunOptions,
)

_ESTIMATORS = "recursion,eclipse-fast,product,jacobian"


def report(
    networks: NetworkOptions,
    data: DataOptions,
    ball: BallOptions,
    bounding: BoundOptions,
    attack: AttackOptions,
    layers: LayerOptions,
    run: RunOptions,
    files: FileOptions,
    output: OutputOptions,
) -> None:
    """Accuracy for certain and under attack, and layer by layer.

    Several networks are measured on the same samples and put side by side. With --out every finished unit of work is
    on disk: after an interruption the same command with --resume goes on, and --from shows the report again.
    """
    from analysis import journal
    from certify.errors import InvalidInput
    from cli import output as out
    from cli.assessing import check_shown, draw_pixels, show_all
    from cli.exports import check_files, write_files
    from cli.extra import Extra
    from cli.running import Asked, carried_out, check, tell

    console = out.console(output.json)
    asked = Asked(networks=networks, data=data, ball=ball, bounding=bounding, attack=attack, layers=layers, run=run)
    check(asked)
    if (run.shard or run.slurm) and (output.json or any(vars(files).values())):
        raise InvalidInput("files of a report with a part of a run", "a whole run", "certify merge, then --from")
    out.check_picture(layers.pixels)
    check_files(files, run.out, run.from_, json=output.json, pixels=layers.pixels)
    if run.slurm is not None and run.out is not None:
        from cli.slurm import submit

        names = submit(asked, run.out, run.slurm)
        console.print(f"jobs {', '.join(names)}; then: certify merge {run.out}/shard-* --out FOLDER", soft_wrap=True)
        return
    result = None if run.from_ is not None else carried_out(asked)
    found = journal.read(run.from_ or "") if result is None else result.report
    if run.from_ is not None:
        check_shown(found, layers)
    if run.shard is None:
        show_all(console, found, layers.layer)
        draw_pixels(console, found.networks, layers.pixels)
        for path in write_files(found, files, Extra(layer=layers.layer)):
            console.print(f"written: {path}", markup=False, soft_wrap=True)
        out.publish_report(output.json, found)
    if result is not None and result.done < result.asked:
        typer.echo(f"time limit: {tell(asked, f'{result.done} of {result.asked}')}", err=True)
        raise typer.Exit(TIMEOUT)
    if run.shard is not None:
        console.print(f"shard {run.shard} is in {run.out}; certify merge joins all shards", soft_wrap=True)


def bounds(
    networks: NetworkOptions, data: DataOptions, ball: BallOptions, bounding: BoundOptions, output: OutputOptions
) -> None:
    """Certified bounds of single samples.

    Margins of 5 samples (or --samples), and the outputs of the first one.
    """
    from dataclasses import replace

    from rich.markup import escape

    from analysis.outputs import output_bounds
    from cli import output as out
    from cli import render
    from cli.assessing import protocol_of
    from cli.subjects import inputs, samples, subjects

    console = out.console(output.json)
    protocol, asked = protocol_of(ball, data.seed, bounding=bounding), subjects(networks)
    given = samples(data if data.samples is not None else replace(data, samples=5), asked)
    console.print(f"{given.text}; {protocol.norm} balls; arithmetic: {protocol.arithmetic}\n")
    found = {}
    for network in asked:
        rows = output_bounds(network.model, inputs(network, given), given.y, protocol, index=given.index)
        found[network.name] = rows
        console.print(f"[bold]{escape(network.name)}[/]: {network.network}; normalisation: {network.normalisation}")
        console.print(render.margins(rows))
        console.print(render.outputs(rows[-len(given.x)]))
    out.publish(output.json, "bounds", out.arguments(networks, data, ball, bounding), {"networks": found})


def attack(
    networks: NetworkOptions,
    data: DataOptions,
    ball: BallOptions,
    attack: AttackOptions,
    output: OutputOptions,
    out_file: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", help="Save the attacked samples as .npz.")
    ] = None,
) -> None:
    """Attack networks and count what survives."""
    from rich.markup import escape

    from cli import output as out
    from cli import render
    from cli.assessing import protocol_of, targets
    from cli.attacking import attacked, save
    from cli.subjects import samples, subjects

    console = out.console(output.json)
    out.check_targets(json=output.json, out=out_file)
    protocol, asked = protocol_of(ball, data.seed, attack), subjects(networks)
    places = {} if out_file is None else targets(out_file, [network.name for network in asked])
    given = samples(data, asked)
    console.print(given.text)
    found = {}
    for network in asked:
        result = attacked(network, given, protocol)
        found[network.name] = result.evaluation
        for line in (f"\n[bold]{escape(network.name)}[/]: {network.network}", *render.conditions(result.evaluation)):
            console.print(line)
        console.print(render.accuracies(result.evaluation))
        if places:
            save(places[network.name], result)
    out.publish(output.json, "attack", out.arguments(networks, data, ball, attack), {"networks": found})


def lipschitz(
    networks: NetworkOptions,
    output: OutputOptions,
    norm: Annotated[str, typer.Option(metavar="NORM", help="l2 or linf, of inputs and outputs.")] = "l2",
    methods: Annotated[str, typer.Option(metavar="M,...", help="Estimators (see `certify ops`).")] = _ESTIMATORS,
) -> None:
    """How much a change of the input can change the outputs.

    Bounds of the Lipschitz constant over the whole space, from above (certified) and from below (met), for the
    network and for its layers alone.
    """
    from rich.markup import escape

    from certify.errors import UnsupportedOperation
    from certify.lipschitz import lipschitz_constant
    from cli import output as out
    from cli import render
    from cli.parsing import distinct, exponent
    from cli.subjects import required_shape, subjects

    console = out.console(output.json)
    found = {}
    estimators = distinct(methods, "methods", _ESTIMATORS)
    for network in subjects(networks):
        shape, p = required_shape(network), exponent(norm)
        answers = []
        for name in estimators:
            start, estimate, refusal = time.perf_counter(), None, ""
            try:
                estimate = lipschitz_constant(network.model, p=p, method=name, input_shape=shape)
            except UnsupportedOperation as error:
                if len(estimators) == 1:
                    raise
                refusal = error.got
            answers.append(render.Answer(name, estimate, refusal, time.perf_counter() - start))
        found[network.name] = [
            {**answer.estimate.to_dict(), "seconds": answer.seconds} for answer in answers if answer.estimate
        ]
        console.print(f"[bold]{escape(network.name)}[/]: {network.network}; normalisation: {network.normalisation}")
        for part in render.lipschitz(answers, norm):
            console.print(part)
    out.publish(output.json, "lipschitz", out.arguments(networks, norm=norm, methods=methods), {"networks": found})
