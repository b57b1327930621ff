"""``certify audit``: whether what attacks say about a network can be trusted."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cli.options import BallOptions, DataOptions, NetworkOptions, OutputOptions

if TYPE_CHECKING:
    from rich.table import Table

    from analysis.audit import Audit

#: Exit code where a check was flagged.
FLAGGED = 1
#: Images that are looked at where none are asked for: every attack runs on all of them.
IMAGES = 100


def audit(
    networks: NetworkOptions,
    data: DataOptions,
    ball: BallOptions,
    output: OutputOptions,
    surrogate: Annotated[
        Path | None, typer.Option(metavar="CKPT", help="A checkpoint whose counterexamples are tried as well.")
    ] = None,
) -> None:
    """Can attacks on this network be trusted?

    Signs of masked gradients and of attacks that are too weak: AutoAttack's flags and Carlini's checklist, each with
    its evidence, at the smallest radius. Exit code 1 where a check is flagged.
    """
    from dataclasses import replace

    from rich.markup import escape

    from analysis.audit import audit as ask
    from cli import output as out
    from cli.assessing import protocol_of
    from cli.subjects import inputs, samples, subjects

    console = out.console(output.json)
    protocol, asked = protocol_of(ball, data.seed), subjects(networks)
    given = samples(data if data.samples is not None else replace(data, samples=IMAGES), asked)
    other = None if surrogate is None else subjects(NetworkOptions(checkpoints=[surrogate]))[0].model
    found = {}
    for network in asked:
        with out.progress(f"{network.name}: audit", 1):
            result = ask(
                network.model,
                inputs(network, given),
                given.y,
                protocol,
                radius=protocol.radii[0],
                index=given.index,
                surrogate=other,
            )
        found[network.name] = result
        console.print(f"[bold]{escape(network.name)}[/]: {network.network}, on {given.text}", soft_wrap=True)
        console.print(table_of(result))
        console.print(verdict(result), soft_wrap=True)
    options = out.arguments(networks, data, ball, surrogate=surrogate)
    out.publish(output.json, "audit", options, {"samples": given.text, "networks": found})
    if not all(result.trusted for result in found.values()):
        raise typer.Exit(FLAGGED)


def table_of(found: Audit) -> Table:
    """Return a row per check."""
    from cli.theme import BAD, DIM, GOOD, radius, table

    styles = {"passed": GOOD, "flagged": BAD, "not run": DIM}
    made = table(f"Audit at radius {radius(found.radius)} ({found.norm})", "check", "verdict", "evidence")
    made.columns[1].justify = made.columns[2].justify = "left"
    for finding in found.findings:
        made.add_row(finding.check, f"[{styles[finding.verdict]}]{finding.verdict}[/]", finding.evidence)
    return made


def verdict(found: Audit) -> str:
    """Return what the findings mean."""
    flagged = [finding.check for finding in found.findings if finding.verdict == "flagged"]
    if not flagged and not found.enough:
        return f"Nothing was flagged, on {found.count} images: too few to tell. More --samples."
    if not flagged:
        return f"Nothing speaks against trusting attacks on this network ({found.count} images)."
    return f"Do not trust attacks on this network: {', '.join(flagged)}. Certified accuracy is not affected."
