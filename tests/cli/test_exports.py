"""Files of a report: valid, self-contained, small, the same bytes every time, and as safe as plain text."""

from __future__ import annotations

import csv
import io
import re
import shutil
import subprocess
from dataclasses import replace
from fractions import Fraction
from html.parser import HTMLParser
from pathlib import Path

import html5lib
import pytest
from reports import made_up
from rich.console import Console

from analysis.records import Outcome, Report
from certify.errors import InvalidFile
from cli import latex, markdown, overview, page, render, spreadsheet, theme, words
from cli.exports import TEXTS, check_files, write_files
from cli.options import FileOptions

HOSTILE = '<script>alert("x")</script> | & % $ _ \\ `x` "quoted"'
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


@pytest.fixture(scope="module")
def report() -> Report:
    return made_up()


@pytest.fixture(scope="module")
def html(report: Report) -> str:
    return page.text(report)


def strict(text: str) -> None:
    """Raise at the first parse error of HTML5."""
    html5lib.HTMLParser(strict=True).parse(text)


class Elements(HTMLParser):
    """All tags with their attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def test_the_page_is_valid_html5(html: str) -> None:
    strict(html)
    with pytest.raises(html5lib.html5parser.ParseError):  # the parser does notice
        strict(html.replace("</h1>", "</h2>", 1))


def test_ids_are_unique_and_references_have_targets(html: str) -> None:
    elements = Elements(html).found
    ids = [attributes["id"] for _, attributes in elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    targets = re.findall(r"url\(#([^)]+)\)", html)
    links = [str(attributes["href"]) for _, attributes in elements if attributes.get("href")]
    targets += [link[1:] for link in links if link.startswith("#")]
    assert targets
    assert set(targets) <= set(ids)


def test_the_page_asks_nothing_of_any_network(html: str) -> None:
    assert "http" not in html
    assert "@import" not in html
    assert "//" not in re.sub(r"data:image/png;base64,[A-Za-z0-9+/=\s]+", "", html)
    for tag, attributes in Elements(html).found:
        assert tag not in ("script", "link", "iframe", "object", "embed", "base")
        for name in ("src", "href", "xlink:href", "action", "data"):
            assert str(attributes.get(name) or "#").startswith(("#", "data:image/png;base64,"))


def test_every_figure_has_words_that_stand_for_it(html: str, report: Report) -> None:
    figures = [attributes for tag, attributes in Elements(html).found if tag == "svg"]
    assert len(figures) >= 6 * len(report.networks)
    for attributes in figures:
        assert attributes["role"] == "img"
        assert len(str(attributes["aria-label"])) > 40
    assert html.count("<figcaption>") == len(figures)


def test_it_fits_phones_and_both_colour_schemes(html: str) -> None:
    assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in html
    assert "prefers-color-scheme: dark" in html
    drawn = "".join(re.findall(r"<svg.*?</svg>", html, flags=re.DOTALL))
    assert not re.findall(r"(?:fill|stroke): #", drawn)  # every colour comes from the page
    assert html.count("<table") == html.count('<div class="scroll"')


@pytest.mark.parametrize("names", ["ab", pytest.param("abcdef", marks=pytest.mark.slow)])
def test_ten_thousand_samples_stay_below_a_megabyte(names: str) -> None:
    found = page.text(made_up(tuple(names), count=10_000, layers=13))
    strict(found)
    assert len(found.encode()) < 1_000_000


@pytest.mark.parametrize("kind", TEXTS)
def test_the_same_report_gives_the_same_bytes(kind: str, report: Report) -> None:
    again = Report.from_dict(report.to_dict())
    assert TEXTS[kind](again) == TEXTS[kind](report)


def test_names_are_text_and_nothing_else() -> None:
    report = made_up((HOSTILE, "plain"), 40)
    report = replace(report, samples=HOSTILE, arguments={HOSTILE: HOSTILE}, warnings=(HOSTILE,))
    (first, second), evil = report.networks, (f"--set {HOSTILE}",) * 4
    assert first.layers is not None
    first = replace(first, layers=replace(first.layers, sentences=evil))
    report = replace(report, networks=(first, second))
    found = page.text(report)
    strict(found)
    assert "<script" not in found
    assert "&lt;script&gt;" in found
    table = next(line for line in markdown.text(report).splitlines() if line.startswith("| \\<script"))
    assert "<script" not in table.replace("\\<", "")
    assert len(re.findall(r"(?<!\\)\|", table)) == 7  # six columns
    for line in latex.text(report).splitlines():
        if line.startswith("<script"):
            assert len(re.findall(r"(?<!\\)&", line)) == 10
            assert r"\textbackslash{}" in line
            assert not re.findall(r"(?<!\\)[%$_]", line)
    assert next(csv.DictReader(io.StringIO(spreadsheet.text(report))))["network"] == HOSTILE


def test_csv_holds_both_ends_of_every_interval(report: Report) -> None:
    rows = list(csv.DictReader(io.StringIO(spreadsheet.text(report))))
    assert len(rows) == 6
    for row in rows:
        for name in ("clean", "attacked", "certified ibp", "certified crown"):
            assert 0 <= float(row[f"{name} low"]) <= float(row[name]) <= float(row[f"{name} high"]) <= 1
        counts = [int(row[f"count {word}"]) for word in ("certified", "unknown", "timeout", "broken")]
        assert sum(counts) == int(row["samples"]) == 300
        assert counts[0] >= round(300 * float(row["certified crown"]))
    assert [row["radius exact"] for row in rows[:3]] == ["2/255", "1/20", "1/10"]


def test_classes_name_their_network_and_fit_with_four_radii(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("reports.RADII", tuple(Fraction(steps, 255) for steps in (2, 8, 16, 36)))
    report = made_up(("one[red]", "two"), 60, layers=0)
    console = Console(width=theme.PLAIN_WIDTH, file=io.StringIO(), color_system=None)
    for network in report.networks:
        with console.capture() as shown:
            console.print(render.drawn(overview.classes(network)))
        title, _, first, second, *_ = shown.get().splitlines()
        assert f"Class by class: {network.name}," in title
        assert first.split() == ["attacked", "proved"] * 4
        assert second.split()[3:] == [radius for radius in ("2/255", "8/255", "16/255", "36/255") for _ in "ab"]
        for text in (page.text(report), markdown.text(report)):
            assert f"Class by class: {network.name}," in text.replace("\\", "")


def test_radii_in_255ths_are_written_in_255ths(report: Report) -> None:
    (network, _), at = report.networks, Fraction(36, 255)
    rows = tuple(replace(row, radius=at) for row in network.evaluation.rows[:1])
    samples = tuple(replace(s, outcomes=(replace(s.outcomes[0], radius=at),)) for s in network.evaluation.samples)
    network = replace(network, evaluation=replace(network.evaluation, rows=rows, samples=samples))
    for text in TEXTS.values():
        found = text(replace(report, networks=(network,)))
        assert "36/255" in found
        assert "12/85" not in found


def test_latex_has_a_row_per_network(report: Report) -> None:
    text = latex.text(report)
    body = text[text.index(r"\midrule") : text.index(r"\bottomrule")].splitlines()[1:]
    assert [line.split(" & ")[0] for line in body] == ["relu", "kaf"]
    caption = next(line for line in text.splitlines() if line.startswith(r"\caption{"))
    for word in (
        "linf balls",
        "PGD(steps=40, restarts=5)",
        "float32-any-order",
        "300 of 300 test images",
        r"95 \% int",
    ):
        assert word in caption
    assert caption.count("linf balls") == 1  # both networks were asked alike
    columns = text[text.index("{tabular}{") :].splitlines()[0].count("r") - 1
    assert all(line.count(" & ") == columns for line in body)


def test_tables_say_what_the_records_say(report: Report, html: str) -> None:
    text = markdown.text(report)
    for network in report.networks:
        row = network.evaluation.rows[2]
        standing = sum(sample.outcomes[2].verdict == "holds" for sample in network.evaluation.samples)
        for found in (html, text):
            assert str(row.attacked) in found
            assert f"{standing} ({100 * standing / 300:.1f} %)" in found
    for found in (html, text):
        for word in ("a warning that was noted", "a machine of 2 cores", "Winograd", "PGD(steps=40, restarts=5)"):
            assert word in found.replace("\\", "")
    assert "timeout</th>" not in html


def test_what_is_late_is_counted_apart(report: Report, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Outcome, "verdict", property(lambda it: "violated" if it.attacked else "timeout"))
    standing = report.networks[0].evaluation.rows[0].attacked.count
    for text in (page.text(report), markdown.text(report)):
        assert "timeout" in text
        assert f"{standing} ({100 * standing / 300:.1f} %)" in text
        assert "ran out of time" in text


def test_what_lowers_trust_is_said(report: Report) -> None:
    few = made_up(("few",), 20)
    found = replace(few.networks[0].evaluation, arithmetic="real")
    few = replace(few, networks=(replace(few.networks[0], evaluation=found),))
    said = " ".join(words.cautions(few))
    assert "measured on 20 images" in said
    assert "real arithmetic" in said
    assert words.cautions(made_up(("many",), 3000)) == ("a warning that was noted",)


def test_one_image_is_no_images(report: Report) -> None:
    single = made_up(("net",), 1)
    (network,) = single.networks
    assert network.layers is not None
    single = replace(single, networks=(replace(network, layers=replace(network.layers, count=1)),))
    for text in (page.text(single), markdown.text(single)):
        assert "of 1 image." in text
        assert not re.findall(r"\b1 images", text)


def test_a_report_without_layers_classes_or_methods_is_rendered() -> None:
    bare = replace(made_up(("only",), 5, layers=0), course=None, warnings=())
    (network,) = bare.networks
    found = replace(network.evaluation, methods=())
    rows = tuple(replace(row, certified={}) for row in found.rows)
    samples = tuple(
        replace(sample, outcomes=tuple(replace(outcome, lower={}) for outcome in sample.outcomes))
        for sample in found.samples
    )
    found = replace(found, rows=rows, samples=samples)
    bare = replace(bare, networks=(replace(network, evaluation=found),))
    strict(page.text(bare))
    assert "No layer was measured" in page.text(bare)
    for rendered in TEXTS.values():
        assert "nothing was certified" in rendered(bare) or rendered in (latex.text, spreadsheet.text)


def test_files_are_written_together_and_checked_before_the_work(report: Report, tmp_path: Path) -> None:
    options = FileOptions(html=tmp_path / "a.html", csv=tmp_path / "a.csv")
    check_files(options)
    assert write_files(report, options) == (tmp_path / "a.html", tmp_path / "a.csv")
    assert (tmp_path / "a.html").read_text() == page.text(report)
    with pytest.raises(InvalidFile):
        check_files(FileOptions(latex=tmp_path / "no" / "where.tex"))


def test_a_browser_shows_the_page(html: str, tmp_path: Path) -> None:
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip(f"no browser here: none of {', '.join(BROWSERS)}")
    (tmp_path / "page.html").write_text(html)
    picture = tmp_path / "page.png"
    words = ["--headless", "--no-sandbox", "--disable-gpu", "--window-size=390,844", f"--screenshot={picture}"]
    where = [f"--user-data-dir={tmp_path / 'profile'}", (tmp_path / "page.html").as_uri()]
    subprocess.run([browser, *words, *where], capture_output=True, check=True, timeout=100)
    assert picture.read_bytes().startswith(b"\x89PNG")
    words = ["--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"]
    shown = subprocess.run([browser, *words, *where], capture_output=True, check=True, timeout=100, text=True).stdout
    assert shown.count("<svg") == html.count("<svg")
    assert shown.count("<tr") == html.count("<tr")
