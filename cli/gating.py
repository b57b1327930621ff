"""``certify gate``: shares that networks must reach, for a machine that decides whether a change goes in."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import typer

from cli.options import (
    AttackOptions,
    BallOptions,
    BoundOptions,
    DataOptions,
    GateOptions,
    NetworkOptions,
    OutputOptions,
)

if TYPE_CHECKING:
    from analysis.gates import Gate
    from analysis.protocol import Protocol
    from analysis.records import Evaluation
    from cli.subjects import Samples, Subject

#: Exit code where a gate failed.
FAILED = 1


def gate(
    networks: NetworkOptions,
    data: DataOptions,
    ball: BallOptions,
    bounding: BoundOptions,
    attack: AttackOptions,
    gates: GateOptions,
    output: OutputOptions,
) -> None:
    """For CI: exit code 1 if a network falls short.

    Wants shares of all images, misclassified ones included, at every radius. Equality is enough. Without
    --min-certified nothing is bounded.
    """
    from dataclasses import replace

    from analysis.gates import judge
    from cli import grids, junit, render, words
    from cli import output as out
    from cli.assessing import protocol_of
    from cli.subjects import samples, subjects
    from models.files import write

    wanted, console = gates_of(gates), out.console(output.json)
    out.check_targets(json=output.json, junit=gates.junit)
    protocol = protocol_of(ball, data.seed, attack, bounding)
    if gates.min_certified is None:
        protocol = replace(protocol, methods=())
    asked = subjects(networks)
    given = samples(data, asked)
    found = {network.name: measured(network, given, protocol) for network in asked}
    results = [result for name, item in found.items() for result in judge(name, item, wanted)]
    console.print(given.text, soft_wrap=True)
    for line in dict.fromkeys(line for item in found.values() for line in render.conditions(item)):
        console.print(line, soft_wrap=True)
    console.print(render.drawn(grids.gates(results)))
    console.print(words.judgement(results), markup=False, soft_wrap=True)
    if gates.junit is not None:
        write({Path(gates.junit): junit.text(found, results, given.text)})
    options = out.arguments(networks, data, ball, bounding, attack, gates)
    out.publish(output.json, "gate", options, {"samples": given.text, "gates": results, "networks": found})
    if not all(result.passed for result in results):
        raise typer.Exit(FAILED)


def gates_of(options: GateOptions) -> tuple[Gate, ...]:
    """Return the gates that are asked for. Raises ``InvalidInput`` where none is: nothing would ever fail."""
    from analysis.gates import QUANTITIES, Gate
    from certify.errors import InvalidInput
    from cli.parsing import share

    given = {quantity: getattr(options, f"min_{quantity}") for quantity in QUANTITIES}
    found = [Gate(name, share(text, f"min-{name}")) for name, text in given.items() if text is not None]
    if not found:
        known = ", ".join(f"--min-{quantity}" for quantity in QUANTITIES)
        raise InvalidInput("no threshold", f"at least one of {known}", "certify gate CKPT --min-certified 0.6")
    return tuple(found)


def measured(network: Subject, given: Samples, protocol: Protocol) -> Evaluation:
    """Return what ``certify report`` measures of a network without its layers; a progress bar is on stderr."""
    from analysis.evaluation import evaluate
    from cli.interrupts import promptly
    from cli.output import progress
    from cli.subjects import inputs

    x = inputs(network, given)
    with promptly("interrupted"), progress(network.name, protocol.work(len(x))) as tick:
        return evaluate(network.model, x, given.y, protocol, index=given.index, dump=Path("alarms"), tick=tick)
