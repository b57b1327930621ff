"""A report to files: CSV, Markdown, LaTeX and HTML. The same report gives the same bytes."""

from __future__ import annotations

from pathlib import Path

from analysis.records import Report
from cli import latex, markdown, page, spreadsheet
from cli.options import FileOptions
from cli.output import check_targets
from models.files import write

#: How each option's file is written.
TEXTS = {"html": page.text, "markdown": markdown.text, "csv": spreadsheet.text, "latex": latex.text}


def check_files(options: FileOptions, *records: Path | None, **others: str | Path | None) -> None:
    """Raise unless the files that are asked for, and the ``others``, pass ``output.check_targets``."""
    check_targets(*records, **vars(options), **others)


def write_files(report: Report, options: FileOptions) -> tuple[Path, ...]:
    """Write the files that are asked for, all of them or none, and return their paths."""
    asked = {name: Path(path) for name in TEXTS if (path := getattr(options, name)) is not None}
    write({path: TEXTS[name](report).encode() for name, path in asked.items()})
    return tuple(asked.values())
