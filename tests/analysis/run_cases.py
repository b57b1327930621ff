"""A small run that tests share, and that worker processes can load."""

from __future__ import annotations

from fractions import Fraction

import torch

from analysis.chunk import Batch
from analysis.evaluation import fit
from analysis.lines import NetworkLine
from analysis.protocol import Protocol
from analysis.runs import Heading
from analysis.units import Case, LayerPlan, Stage
from certify.attacks import PGD
from models import mlp
from models.files import tensor_digest

RADII = (Fraction(1, 50), Fraction(1, 10))
PROTOCOL = Protocol(radii=RADII, methods=("ibp", "crown"), attack=PGD(steps=5), batch=4)
HEADING = Heading("report", {"radius": "0.02,0.1"}, "18 samples")
COUNT = 18


def case(name: str, seed: int, protocol: Protocol = PROTOCOL) -> Case:
    """A random network, and labels that are its predictions but for every fifth."""
    torch.manual_seed(seed)
    model, x = mlp([6, 8, 4]).eval(), torch.rand(COUNT, 6)
    with torch.no_grad():
        y = model(x).argmax(1)
    y[::5] = (y[::5] + 1) % 4
    x, y, classes = fit(model, x, y)
    conditions, weights = protocol.conditions(x.dtype), tensor_digest(model.state_dict())
    about = NetworkLine(name, f"nets/{name}", "mlp with relu", 92, "none", weights, conditions)
    return Case(about, Batch(model, x, y, classes, torch.arange(COUNT) * 3))


def stage(protocol: Protocol = PROTOCOL) -> Stage:
    """Two networks, 5 chunks of samples and the layers of each: 12 units."""
    return Stage((case("one", 3, protocol), case("two", 4, protocol)), protocol, LayerPlan(RADII[0], 6))
