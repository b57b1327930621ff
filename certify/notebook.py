"""Small HTML tables for notebooks; whatever is put into them is escaped."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

#: Rows shown; the others are counted.
SHOWN = 20


def table(caption: str, head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return an HTML table of the first rows under a caption; floats have three digits."""
    every = list(rows)
    lines = [_line("th", head), *(_line("td", row) for row in every[:SHOWN])]
    if len(every) > SHOWN:
        lines.append(f'<tr><td colspan="{len(head)}">... and {len(every) - SHOWN} more</td></tr>')
    return f"<table><caption>{escape(caption)}</caption>{''.join(lines)}</table>"


def _line(tag: str, cells: Sequence[object]) -> str:
    return f"<tr>{''.join(f'<{tag}>{escape(_cell(cell))}</{tag}>' for cell in cells)}</tr>"


def _cell(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
