"""A figure as a part of an HTML page: SVG with the page's own colours and fonts, and words that stand for it."""

from __future__ import annotations

import re
from html import escape
from typing import TYPE_CHECKING

from analysis.figures import COLOURS, encoded

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: What is black or grey in a figure has the colour of the page's text; the others are the page's variables --c0, ...
INK = ("#000000", "#b0b0b0", "#808080", "#cccccc")
HUES = {colour.lower(): f"var(--c{place})" for place, colour in enumerate(COLOURS) if colour != "#000000"}
#: Digits of coordinates, which are 1/72 of an inch.
DIGITS = 1


def inline(made: Figure, name: str, words: str) -> str:
    """Return the figure as an <svg> element; ``name`` makes its ids unique on the page, ``words`` stand for it."""
    text = encoded(made, "svg", transparent=True).decode()
    box = re.search(r'viewBox="([\d. ]+)"', text)
    assert box is not None
    body = text[text.index(">", text.index("<svg")) + 1 :]
    for gone in (r"<metadata>.*?</metadata>", r"<defs>\s*<style.*?</style>\s*</defs>", r"<!--.*?-->"):
        body = re.sub(gone, "", body, flags=re.DOTALL)
    body = re.sub(r' style="([^"]*)"', lambda found: f' style="{_themed(found[1])}"', body)
    body = re.sub(r' (d|x|y)="([^"]*)"', lambda found: f' {found[1]}="{_rounded(found[2])}"', body)
    body = (
        re.sub(r' transform="rotate\(-?0 [^"]*"', "", body)
        .replace("xlink:href=", "href=")
        .replace("base64,\n", "base64,")
    )
    used = set(re.findall(r'(?:url\(|href=")#([^)"]+)', body))
    body = re.sub(r' id="([^"]*)"', lambda found: f' id="{name}-{found[1]}"' if found[1] in used else "", body)
    body = body.replace("url(#", f"url(#{name}-").replace('href="#', f'href="#{name}-')
    width = float(box[1].split()[2])
    head = f'<svg role="img" aria-label="{escape(words)}" viewBox="{box[1]}" style="max-width: {1.5 * width:.0f}px">'
    return head + re.sub(r"\n\s*", "\n", body).strip()


def _themed(style: str) -> str:
    """The style with the page's colours and its font."""
    for colour in INK:
        style = style.replace(colour, "currentColor")
    for colour, variable in HUES.items():
        style = style.replace(colour, variable)
    return re.sub(r"font-family: [^;]*;? ?", "", style)


def _rounded(path: str) -> str:
    """The path with short numbers, in one line."""
    path = re.sub(r"-?\d+\.\d+", lambda found: f"{float(found[0]):.{DIGITS}f}".rstrip("0").rstrip("."), path)
    return " ".join(path.split())
