"""A report as a LaTeX table: a row per network, for a paper that uses the package booktabs."""

from __future__ import annotations

from analysis.records import NetworkReport, Rate, Report
from cli.overview import methods_of
from cli.render import conditions
from cli.theme import radius, rate

#: What has a meaning in LaTeX, and how it is written.
SPECIAL = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    **{sign: rf"\{sign}" for sign in "&%$#_{}"},
}


def text(report: Report) -> str:
    """Return the table; accuracies in percent with 95 % intervals, after the attack and certified, per radius."""
    methods = methods_of(report)
    radii = list(dict.fromkeys(row.radius for network in report.networks for row in network.evaluation.rows))
    block = 1 + len(methods)
    spans = [rf"\multicolumn{{{block}}}{{c}}{{radius {escaped(radius(at))}}}" for at in radii]
    rules = [rf"\cmidrule(lr){{{3 + block * i}-{2 + block * (i + 1)}}}" for i in range(len(radii))]
    names = ["attacked", *(f"certified ({escaped(method)})" for method in methods)] * len(radii)
    lines = [
        r"% \usepackage{booktabs}",
        r"\begin{table}",
        r"\centering",
        rf"\caption{{{_caption(report)}}}",
        rf"\begin{{tabular}}{{lr{'r' * block * len(radii)}}}",
        r"\toprule",
        " & ".join(["", "", *spans]) + r" \\",
        "".join(rules),
        " & ".join(["network", "clean", *names]) + r" \\",
        r"\midrule",
        *(_line(network, report) for network in report.networks),
        r"\bottomrule",
        r"\end{tabular}",
        r"\end{table}",
    ]
    return "\n".join(lines) + "\n"


def _caption(report: Report) -> str:
    """What was measured, on which samples, and under which perturbations, attack and arithmetic."""
    told = dict.fromkeys(line for network in report.networks for line in conditions(network.evaluation))
    return escaped(f"Accuracy in percent (95 % interval) on {report.samples}; {'; '.join(told)}.")


def _line(network: NetworkReport, report: Report) -> str:
    """A network's row; a radius or a method that it was not asked about stays empty."""
    rows = {row.radius: row for row in network.evaluation.rows}
    radii = dict.fromkeys(row.radius for other in report.networks for row in other.evaluation.rows)
    cells = [escaped(network.name), _cell(network.evaluation.clean)]
    for at in radii:
        row = rows.get(at)
        cells.append(_cell(None if row is None else row.attacked))
        cells += [_cell(None if row is None else row.certified.get(method)) for method in methods_of(report)]
    return " & ".join(cells) + r" \\"


def _cell(value: Rate | None) -> str:
    return "" if value is None else escaped(rate(value)).replace("-", "--")


def escaped(line: str) -> str:
    """Return the text so that LaTeX shows it as it is, in one line."""
    return "".join(SPECIAL.get(sign, sign) for sign in " ".join(line.split()))
