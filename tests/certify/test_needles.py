"""Networks with a known counterexample that attacks hardly find: no prover may say HOLDS.

A base network with a comfortable margin gets a needle on logit 1, H relu(rho - ||x - x*||_1) / rho, which is 0 outside
a small l1 ball around x*. Box, x*, rho, H and the margin at x* are those of the planted instances; the base is drawn
anew from their seeds.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from shared_data import SHARED
from torch import Tensor, nn

import certify
from certify.attacks import PGD, Ensemble
from certify.registry import METHODS

PLANTED = [] if SHARED is None else sorted((SHARED / "planted").glob("*/truth.json"))
#: Their price on rows of this size is seconds and more.
SLOW = ("sdp", "lipschitz", "auto-lirpa/alpha-crown")


class Needle(nn.Module):
    """A base network, and a needle on logit 1 (height 0: none)."""

    def __init__(self, base: nn.Module, tip: Tensor, rho: float, height: float) -> None:
        super().__init__()
        d = len(tip)
        self.base, self.ends, self.act, self.total = base, nn.Linear(d, 2 * d), nn.ReLU(), nn.Linear(2 * d, 1)
        self.cut, self.raise_ = nn.ReLU(), nn.Linear(1, 2, bias=False)
        with torch.no_grad():
            self.ends.weight.copy_(torch.cat([torch.eye(d), -torch.eye(d)]))
            self.ends.bias.copy_(torch.cat([-tip, tip]))
            self.total.weight.fill_(-1.0)
            self.total.bias.fill_(rho)
            self.raise_.weight.copy_(torch.tensor([[0.0], [height / rho]]))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.raise_(self.cut(self.total(self.act(self.ends(x)))))


def _instance(path: Path) -> tuple[dict[str, Any], nn.Module, certify.Box, certify.Spec]:
    truth = json.loads(path.read_text())
    torch.manual_seed(truth["seed"])
    layers: list[nn.Module] = [nn.Linear(truth["d"], truth["width"]), nn.ReLU()]
    for _ in range(truth["depth"] - 1):
        layers += [nn.Linear(truth["width"], truth["width"]), nn.ReLU()]
    base = nn.Sequential(*layers, nn.Linear(truth["width"], 2)).eval()
    lower, upper = (torch.tensor(truth[end])[None] for end in ("lower", "upper"))
    box = certify.Box(lower, upper)
    tip = torch.tensor(truth.get("counterexample") or truth["x0"])
    height = truth.get("needle_height") or 0.0
    with torch.no_grad():
        y = base(tip[None])[0]
        base[-1].bias[0] += truth.get("base_margin_at_cex", 4.0) - (y[0] - y[1])
    model = Needle(base, tip, truth.get("rho") or 0.1, height).eval()
    return truth, model, box, certify.class_margins(torch.tensor([0]), 2)


@pytest.mark.skipif(not PLANTED, reason="the planted instances (../shared/data/planted) are absent")
@pytest.mark.parametrize("path", PLANTED, ids=lambda path: path.parent.name)
def test_no_prover_holds_where_a_counterexample_is_known(path: Path) -> None:
    truth, model, box, spec = _instance(path)
    if truth["truth"] == "sat":
        tip = torch.tensor(truth["counterexample"])[None]
        assert bool(box.contains(tip))
        assert float(spec.rows(model(tip)).detach().amin()) < 0, "the counterexample is one"
    said = {}
    for name in sorted(set(METHODS) - set(SLOW)):
        arithmetic = "real" if name.startswith("auto-lirpa") else "float"
        said[name] = certify.prove(model, box, spec, name, arithmetic=arithmetic).verdicts[0]
    said["attacked"] = certify.prove(model, box, spec, "crown", attack=PGD(steps=20)).verdicts[0]
    if truth["truth"] == "sat":
        assert certify.Verdict.HOLDS not in said.values(), said
    else:
        assert said["crown"] is certify.Verdict.HOLDS
        assert certify.Verdict.VIOLATED not in said.values(), said


@pytest.mark.skipif(not PLANTED, reason="the planted instances (../shared/data/planted) are absent")
def test_the_needles_are_hard_to_find_and_the_wide_ones_are_not() -> None:
    """So that the test above is one of provers: where an attack finds the needle, no prover is asked."""
    found = {}
    for path in PLANTED:
        truth, model, box, spec = _instance(path)
        if truth["truth"] == "sat":
            attack = Ensemble(attacks=(PGD(steps=50, restarts=5),))
            result = attack(model, box, spec, generator=torch.Generator().manual_seed(0))
            found.setdefault(truth["kind"], []).append(bool(result.success))
    assert not any(found["needle"])
    assert len(found["needle"]) == len(found["wide"]) == 5
