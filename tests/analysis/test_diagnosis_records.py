"""The whole diagnosis: histograms of what the attack moved, certified ranges of learned functions, pictures."""

from __future__ import annotations

import json
import math

import pytest
import torch

from analysis import figures
from analysis.diagnosis import Diagnosis, diagnose
from models import mlp
from models.data import load
from models.training import TrainConfig, train


@pytest.fixture(scope="module")
def found() -> Diagnosis:
    data = load("digits")
    torch.manual_seed(0)
    start, model = (mlp([64, 12, 12, 10], "kaf-elu") for _ in range(2))
    model = train(model, data, TrainConfig(epochs=3)).model
    return diagnose(start.eval(), model, data.test_x[:100], data.test_y[:100], radius=0.1)


def test_histograms_hold_all_values_and_the_attack_moves_some(found: Diagnosis) -> None:
    assert [histogram.layer for histogram in found.histograms] == ["act1", "act2"]
    for histogram in found.histograms:
        assert sum(histogram.clean) == pytest.approx(1)
        assert sum(histogram.attacked) == pytest.approx(1)
        assert len(histogram.edges) == len(histogram.clean) + 1
        assert histogram.clean != histogram.attacked


def test_certified_ranges_hold_the_slopes_of_the_drawn_functions(found: Diagnosis) -> None:
    for shape in found.shapes:
        values, places = torch.tensor(shape.values, dtype=torch.float64), torch.tensor(shape.places).double()
        steps = values.diff(dim=1) / places.diff()
        assert shape.slope[0] - 1e-3 <= float(steps.min()) <= float(steps.max()) <= shape.slope[1] + 1e-3
        assert float(steps.max()) > 0.9 * shape.slope[1]  # and are no wider than they need be
        assert shape.curvature is not None
        assert shape.curvature[0] < 0 < shape.curvature[1]


@pytest.mark.parametrize("options", ["kernel=laplacian", "kernel=relu", "gamma=2000"])
def test_functions_that_nothing_certifies_are_diagnosed_all_the_same(options: str) -> None:
    torch.manual_seed(0)
    model = mlp([64, 12, 10], f"kaf:{options}").eval()
    found = diagnose(model, model, torch.rand(8, 1, 8, 8), torch.zeros(8, dtype=torch.long), radius=0.1)
    assert found.origin is None
    assert found.gains["act1"] is not None
    (shape,) = found.shapes
    assert (shape.slope, shape.curvature) == ((-math.inf, math.inf), None)
    assert Diagnosis.from_dict(json.loads(json.dumps(found.to_dict(), allow_nan=False))) == found
    assert figures.shapes(found.shapes).axes


def test_it_survives_json_and_is_drawn(found: Diagnosis) -> None:
    assert Diagnosis.from_dict(json.loads(json.dumps(found.to_dict()))) == found
    log = [{"gradients": found.start}, {"gradients": found.now}]
    for made in (figures.gradients(found, log), figures.histograms(found.histograms), figures.shapes(found.shapes)):
        assert made.axes


def test_a_network_that_is_not_finite_is_diagnosed_all_the_same() -> None:
    torch.manual_seed(0)
    start, model = (mlp([64, 12, 10], "relu").eval() for _ in range(2))
    with torch.no_grad():
        model.linear1.weight[0, 0] = torch.nan
    found = diagnose(start, model, torch.rand(8, 1, 8, 8), torch.zeros(8, dtype=torch.long), radius=0.1)
    assert found.origin == "the parameter linear1.weight"
    assert found.histograms == ()
