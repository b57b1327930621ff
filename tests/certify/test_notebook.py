"""Results in notebooks: valid tables that say what the results hold, and nothing but text."""

from __future__ import annotations

import html5lib
import torch
from reports import made_up
from torch import nn

import certify
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


def test_reports_show_every_rate() -> None:
    report = made_up(("<b>a</b>", "b"), 30)
    text = valid(report._repr_html_())
    assert "<b>" not in text
    for network in report.networks:
        for row in network.evaluation.rows:
            assert str(row.attacked) in text


def test_what_is_put_into_a_table_is_text() -> None:
    assert "<i>" not in valid(table("<i>", ("<i>",), [("<i>",), (0.123456,)]))
