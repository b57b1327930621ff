"""A report to files: CSV, Markdown, LaTeX and HTML. The same report gives the same bytes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from analysis.records import Report
from cli import latex, markdown, page, spreadsheet
from cli.extra import NOTHING, Extra
from cli.options import FileOptions
from cli.output import check_targets
from models.files import write

#: How each option's file is written: those for people take what a command adds to its report.
WORDS = {"html": page.text, "markdown": markdown.text}
NUMBERS = {"csv": spreadsheet.text, "latex": latex.text}
TEXTS: dict[str, Callable[[Report], str]] = {**WORDS, **NUMBERS}


def check_files(options: FileOptions, *records: Path | None, **others: str | Path | None) -> None:
    """Raise unless the files that are asked for, and the ``others``, pass ``output.check_targets``."""
    check_targets(*records, **vars(options), **others)


def write_files(report: Report, options: FileOptions, extra: Extra = NOTHING) -> tuple[Path, ...]:
    """Write the files that are asked for, all of them or none, and return their paths."""
    asked = {name: Path(path) for name in TEXTS if (path := getattr(options, name)) is not None}
    texts = TEXTS | {name: partial(text, extra=extra) for name, text in WORDS.items()}
    write({path: texts[name](report).encode() for name, path in asked.items()})
    return tuple(asked.values())
