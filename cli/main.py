"""The command ``certify``. Nothing heavy is imported here: torch waits until a command runs."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from cli import questions
from cli.auditing import audit
from cli.bundles import at_home, bundled
from cli.catalogue import ops
from cli.comparing import compare
from cli.complaints import complain
from cli.demo import demo
from cli.diagnosing import diagnose
from cli.gating import gate
from cli.learning import train
from cli.merging import merge
from cli.rates import lr_find
from cli.smoothing import smooth
from cli.streams import outlive_readers
from cli.sweeping import sweep

app = typer.Typer(
    name="certify",
    help="How robust is a network: for certain, under attack, and which layer is to blame.",
    epilog="Start with: certify demo",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
_ASKING = (questions.report, merge, compare, questions.bounds, questions.attack, questions.lipschitz)
_JUDGING = (audit, smooth, gate)
for _command in (demo, train, lr_find, sweep, diagnose, *_ASKING, *_JUDGING, ops):
    app.command(_command.__name__.replace("_", "-"))(bundled(at_home(_command)))


def main(arguments: list[str] | None = None) -> int:
    """Run one command and return its exit code.

    0 proved or done, 1 falsified, 2 usage, 3 unknown, 4 timeout, 5 bad input file, 6 soundness alarm or internal
    error, 130 interrupted. Errors are at most three lines on stderr.
    """
    # Read when torch loads. OpenMP's waiting threads spin by default, which on a busy machine takes the cores from
    # those that work: ten times slower with as many other processes as cores.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    given = sys.argv[1:] if arguments is None else arguments
    try:
        code = typer.main.get_command(app)(args=given or ["--help"], prog_name="certify", standalone_mode=False)
    except (Exception, KeyboardInterrupt) as error:
        return complain(error)
    return code if isinstance(code, int) else 0


def run() -> None:
    """Run the command line's arguments and exit."""
    outlive_readers()
    sys.exit(main())


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(version("kafcert"))
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")] = False,
) -> None:
    pass
