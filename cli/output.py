"""Where things go: tables on stdout, progress on stderr, numbers in a JSON file."""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from analysis.journal import MANIFEST, RECORDS, TIMINGS
from analysis.manifest import versions
from analysis.plain import encode
from analysis.records import Report
from certify.errors import InvalidFile, InvalidInput
from cli.theme import PLAIN_WIDTH
from models.files import write

SCHEMA_VERSION = 1
STDOUT = "-"


def console(target: str | None = None, *, quiet: bool = False) -> Console:
    """Return the console for tables: stdout, or stderr where ``target`` sends JSON to stdout.

    A ``quiet`` one prints nothing. Raises ``InvalidFile`` if the JSON cannot be written to ``target``: before the
    work, not after it.
    """
    check_target(target)
    stream = sys.stderr if target == STDOUT else sys.stdout
    narrow = stream.isatty() or "COLUMNS" in os.environ
    colors: Any = None if os.environ.get("NO_COLOR") else "auto"  # None: no bold type either
    return Console(
        file=stream, width=None if narrow else PLAIN_WIDTH, highlight=False, color_system=colors, quiet=quiet
    )


def check_target(target: str | Path | None) -> None:
    """Raise ``InvalidFile`` unless a file can be written at ``target``."""
    if target is None or target == STDOUT:
        return
    path = Path(target)
    if path.is_dir():
        raise InvalidFile(f"cannot write {path}: it is a folder", "the name of a file", f"{path / 'NAME'}")
    if not path.parent.is_dir():
        raise InvalidFile(
            f"cannot write {path}", "a file in an existing folder", f"mkdir -p {path.parent}, or another name"
        )
    if not os.access(path.parent, os.W_OK):
        raise InvalidFile(f"cannot write {path}", "a folder that can be written to", "another folder")


def check_targets(*records: Path | None, **targets: str | Path | None) -> None:
    """Raise unless each of the ``targets``, named by its option, can be written and is a file of its own.

    None may be a file of the ``records`` (folders of runs, or files in them). Raises ``InvalidFile`` or
    ``InvalidInput``: before the work, not after it.
    """
    taken = {file: "a file of the records" for place in records if place is not None for file in _kept(place)}
    for name, target in targets.items():
        check_target(target)
        if target is None or target == STDOUT:
            continue
        place = Path(target).resolve()
        if place in taken:
            raise InvalidInput(f"--{name} {target}: that is {taken[place]}", "a file of its own", "another name")
        taken[place] = f"the target of --{name}"


def _kept(place: Path) -> Iterator[Path]:
    """The files in which a run is kept: those of a folder, or of the one that a file lies in."""
    folder = place.parent if place.is_file() else place
    for name in (place.resolve(), RECORDS, TIMINGS, MANIFEST):
        yield folder.resolve() / name


def check_picture(target: Path | None) -> None:
    """Raise ``InvalidInput`` unless ``target`` has the ending of a picture."""
    from analysis.figures import check_kind

    if target is not None:
        check_kind(target)


@contextmanager
def progress(label: str, total: int) -> Iterator[Callable[[int], None]]:
    """Show a bar on stderr while the work goes on (nothing where stderr is no terminal); yields its tick."""
    screen = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=screen, transient=True, disable=not screen.is_terminal) as bar:
        task = bar.add_task(label, total=total)
        yield lambda done: bar.advance(task, done)


def publish(target: str | None, command: str, arguments: dict[str, Any], results: Any) -> None:
    """Write the results as JSON, with all that is needed to repeat them; atomically, or to stdout for "-"."""
    document = {
        "command": command,
        "arguments": encode(arguments),
        "seed": arguments.get("seed", 0),
        "versions": versions(),
        "machine": {"system": platform.platform(), "cores": os.cpu_count()},
        "results": encode(results),
    }
    _deliver(target, document)


def publish_report(target: str | None, report: Report) -> None:
    """Write a report as JSON: all of it, and nothing that it does not hold."""
    results = report.to_dict()
    shared = {name: results[name] for name in ("command", "arguments", "seed", "versions")}
    _deliver(target, {**shared, "results": results})


def _deliver(target: str | None, document: dict[str, Any]) -> None:
    if target is None:
        return
    text = json.dumps({"schema_version": SCHEMA_VERSION, **document}, indent=1, allow_nan=False) + "\n"
    if target == STDOUT:
        sys.stdout.write(text)
    else:
        write({Path(target): text.encode()})


def arguments(*bundles: Any, **others: Any) -> dict[str, Any]:
    """Return the options of a command as plain data."""
    found: dict[str, Any] = {}
    for bundle in bundles:
        found.update(asdict(bundle))
    found.update(others)
    return found
