"""Number formats and styles of all tables."""

from __future__ import annotations

import math
from decimal import ROUND_CEILING, ROUND_FLOOR, ROUND_HALF_EVEN, Decimal
from fractions import Fraction

from rich import box
from rich.table import Table

from analysis.records import Rate

GOOD, WARN, BAD, DIM, NAME = "green", "yellow", "red", "dim", "bold"

#: Signs of the longest fraction that is written out.
LONGEST = 24

#: Width of what is not printed to a terminal.
PLAIN_WIDTH = 120


def table(title: str, *columns: str, caption: str | None = None) -> Table:
    """Return an empty table: the first column to the left, the others to the right; nothing is ever cut off."""
    made = Table(
        title=title,
        caption=caption,
        box=box.SIMPLE_HEAD,
        title_justify="left",
        caption_justify="left",
        title_style="bold",
        pad_edge=False,
        min_width=len(title),  # else a narrow table would fold it
    )
    for place, name in enumerate(columns):
        made.add_column(name, justify="right" if place else "left", overflow="fold")
    return made


def percent(share: float) -> str:
    """96.4 %."""
    return f"{100 * share:.1f} %"


def rate(value: Rate) -> str:
    """96.4 (94-98): percent with its 95 % interval, rounded outward."""
    return str(value)


def number(value: float | None) -> str:
    """Three significant digits; - where there is no number."""
    if value is None:
        return "-"
    if not math.isfinite(value) or value == 0:
        return f"{value:g}"
    if 0.01 <= abs(value) < 1000:
        return f"{value:.{max(0, 2 - math.floor(math.log10(abs(value))))}f}"
    return f"{value:.2g}"


def bound(value: float | None, side: str) -> str:
    """Four significant digits, an upper bound rounded up and a lower one down; - where there is no number."""
    if value is None or not math.isfinite(value) or value == 0:
        return number(value)
    mode = {"upper": ROUND_CEILING, "lower": ROUND_FLOOR}.get(side, ROUND_HALF_EVEN)
    exact = Decimal(value)
    return f"{exact.quantize(Decimal(1).scaleb(exact.adjusted() - 3), rounding=mode):.4g}"


def span(ends: tuple[float, float]) -> str:
    """-0.13 .. 1.48: both ends rounded outward."""
    return f"{bound(ends[0], 'lower')} .. {bound(ends[1], 'upper')}"


def radius(value: Fraction) -> str:
    """0.05 where that is exact and short, else 8/255; 1e-400 where a fraction has no end."""
    return _decimal(value) or _bounded(fraction(value), value)


def fraction(value: Fraction) -> str:
    """36/255 for what is a number of 255ths, else in lowest terms: exact."""
    steps = value.denominator > 1 and 255 % value.denominator == 0
    return f"{255 * value}/255" if steps else str(value)


def share(value: Fraction) -> str:
    """60, or 200/3: percent, exact but for what is too long to read."""
    return _decimal(100 * value) or _bounded(str(100 * value), 100 * value)


def _decimal(value: Fraction) -> str:
    """The number where six digits hold it exactly, else nothing."""
    text = f"{float(value):.6g}"
    return text if Fraction(text) == value else ""


def _bounded(text: str, value: Fraction) -> str:
    """The text where it is short, else twelve digits."""
    decimal = (Decimal(value.numerator) / value.denominator).normalize()
    return text if len(text) <= LONGEST else f"{decimal:.12g}".lower()


def count(value: int) -> str:
    """166,406."""
    return f"{value:,}" if value else "-"


def images(count: int) -> str:
    """1 image, 200 images."""
    return f"{count:,} image{'' if count == 1 else 's'}"


def shape(value: tuple[int, ...]) -> str:
    """32x7x7."""
    return "x".join(map(str, value))


def seconds(value: float) -> str:
    """2.1 s."""
    return f"{value:.1f} s" if value < 100 else f"{value:.0f} s"
