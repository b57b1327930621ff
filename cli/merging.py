"""``certify merge``: the shards of one run, joined."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cli.options import OutputOptions


def merge(
    output: OutputOptions,
    folders: Annotated[list[Path], typer.Argument(metavar="FOLDER...", help="One folder per shard, in any order.")],
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="The whole run goes here.")],
) -> None:
    """Join the shards of one run.

    The records are those that `certify report` would have written without --shard, byte for byte.
    """
    from analysis.merge import merge as joined
    from cli import output as writer
    from cli.assessing import show_all

    console = writer.console(output.json)
    writer.check_targets(*folders, out, json=output.json)
    report = joined(folders, out)
    show_all(console, report)
    writer.publish_report(output.json, report)
