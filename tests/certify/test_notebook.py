"""Results in notebooks: valid tables that say what the results hold, and nothing but text."""

from __future__ import annotations

from fractions import Fraction

import html5lib
import torch
from reports import made_up
from torch import nn

import certify
from analysis.audit import Audit, Finding
from analysis.records import Rate
from analysis.sandwich import Sandwich
from analysis.smoothing import SmoothedAccuracy
from certify.notebook import SHOWN, table


def valid(fragment: str) -> str:
    html5lib.HTMLParser(strict=True).parseFragment(fragment)
    return fragment


def test_certificates_and_attacks_are_tables_of_their_samples() -> None:
    model, x = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)).eval(), torch.rand(25, 4)
    domain, spec = certify.LpBall(x, 0.05), certify.class_margins(torch.zeros(25, dtype=torch.long), 3)
    cert = certify.prove(model, domain, spec)
    text = valid(cert._repr_html_())
    for verdict in certify.Verdict:
        assert f"{cert.verdicts.count(verdict)} {verdict.value}" in text
    assert text.count("<tr>") == 1 + SHOWN + 1
    assert "and 5 more" in text
    found = certify.attacks.PGD(steps=2)(model, domain, spec)
    assert f"{int(found.success.sum())} of 25 samples broken" in valid(found._repr_html_())


def test_a_lipschitz_estimate_says_on_which_side_it_stands() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)).eval()
    found = certify.lipschitz_constant(model, input_shape=(4,), method="product")
    text = valid(found._repr_html_())
    assert f"&lt;= {found.value:.4g}" in text
    assert all(f"&lt;= {value:.4g}" in text for value in found.layers.values())


def test_smoothing_is_labelled_as_no_proof() -> None:
    model, x = nn.Linear(4, 3).eval(), torch.rand(3, 4)
    found = certify.certify_smoothed(model, x, certify.Smoothing(sigma=0.1, count=100), generator=torch.arange(3))
    assert "PROBABLE, not proved" in valid(found._repr_html_())
    rate = Rate(3, 4)
    every = SmoothedAccuracy(0.1, 0.001, 4, rate, Rate(1, 4), (Fraction(1, 4),), (rate,), ())
    assert f"<td>certified within 1/4 (l2)</td><td>{rate}</td>" in valid(every._repr_html_())


def test_an_audit_shows_every_finding() -> None:
    found = Audit(Fraction(1, 10), "linf", 60, (Finding("a", "passed", "<b>"), Finding("b", "flagged", "c")))
    text = valid(found._repr_html_())
    assert "60 images" in text
    assert "<td>b</td><td>flagged</td><td>c</td>" in text


def test_layers_and_comparisons_show_their_rows() -> None:
    network = made_up(("a", "b"), 30).networks[0]
    assert network.layers is not None
    assert all(f"<td>{row.name}</td>" in valid(network.layers._repr_html_()) for row in network.layers.rows)
    found = Sandwich("a", network.evaluation, network.evaluation, "crown", ())
    for place in range(len(network.evaluation.rows)):
        assert all(f"<td>{rate}</td>" in valid(found._repr_html_()) for rate in found.layers(place))


def test_reports_show_every_rate() -> None:
    report = made_up(("<b>a</b>", "b"), 30)
    text = valid(report._repr_html_())
    assert "<b>" not in text
    for network in report.networks:
        for row in network.evaluation.rows:
            assert str(row.attacked) in text


def test_what_is_put_into_a_table_is_text() -> None:
    assert "<i>" not in valid(table("<i>", ("<i>",), [("<i>",), (0.123456,)]))
