"""A report to files: CSV, Markdown, LaTeX and HTML. The same report gives the same bytes."""

from __future__ import annotations

from pathlib import Path

from analysis.records import Report
from cli import latex, markdown, page, spreadsheet
from cli.options import FileOptions
from cli.output import check_target
from models.files import write

#: How each option's file is written.
TEXTS = {"html": page.text, "markdown": markdown.text, "csv": spreadsheet.text, "latex": latex.text}


def check_files(options: FileOptions) -> None:
    """Raise ``InvalidFile`` unless all files that are asked for can be written: before the work, not after it."""
    for name in TEXTS:
        check_target(getattr(options, name))


def write_files(report: Report, options: FileOptions) -> tuple[Path, ...]:
    """Write the files that are asked for, all of them or none, and return their paths."""
    asked = {name: Path(path) for name in TEXTS if (path := getattr(options, name)) is not None}
    write({path: TEXTS[name](report).encode() for name, path in asked.items()})
    return tuple(asked.values())
