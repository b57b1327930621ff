"""Sensitivity of layers: factors that bound each other, shares that add up, sentences that name the right layer."""

from __future__ import annotations

import json
from fractions import Fraction

import pytest
import torch
from torch import Tensor, nn

from analysis.evaluation import Protocol
from analysis.layer_records import Sensitivity
from analysis.layers import layer_sensitivity
from certify.attacks import PGD
from certify.errors import InvalidInput
from models import cnn, mlp

RADIUS = Fraction(1, 20)
PROTOCOL = Protocol(radii=(RADIUS,), attack=PGD(steps=8, random_start=False))


def measured(model: nn.Module, x: Tensor) -> Sensitivity:
    with torch.no_grad():
        y = model(x).argmax(1)
    return layer_sensitivity(model, x, y, PROTOCOL, radius=RADIUS)


@pytest.fixture(scope="module", params=["relu", "kaf-tanh", "tanh"])
def found(request: pytest.FixtureRequest) -> Sensitivity:
    torch.manual_seed(1)
    return measured(mlp([8, 10, 10, 3], request.param).eval(), torch.rand(12, 8))


def test_sampled_factors_never_exceed_certified_ones(found: Sensitivity) -> None:
    for row in found.rows:
        assert row.lipschitz_lower is not None
        assert row.lipschitz_upper is not None
        assert row.lipschitz_lower <= row.lipschitz_upper * (1 + 1e-12)


def test_a_linear_layer_has_its_spectral_norm() -> None:
    torch.manual_seed(1)
    model = mlp([8, 10, 3]).eval()
    rows = {row.name: row for row in measured(model, torch.rand(12, 8)).rows}
    norm = float(torch.linalg.matrix_norm(model.linear1.weight.detach().double(), 2))
    assert rows["linear1"].lipschitz_upper == pytest.approx(norm, rel=1e-6)
    assert rows["linear1"].lipschitz_lower <= norm


def test_shares_add_up_and_only_relaxed_layers_have_one(found: Sensitivity) -> None:
    assert sum(row.share for row in found.rows) == pytest.approx(1)
    for row in found.rows:
        assert (row.share > 0) == row.name.startswith("act")
        assert row.unstable is None or row.gap is None


def test_crown_is_never_wider_than_ibp(found: Sensitivity) -> None:
    for row in found.rows:
        assert row.width_crown <= row.width_ibp * (1 + 1e-6)


def test_movement_stays_within_the_bounds(found: Sensitivity) -> None:
    """A node's l2 movement is at most the root of its size times its largest width; here: of the mean, with room."""
    for row in found.rows:
        assert 0 < row.distance_mean <= row.distance_p95 * (1 + 1e-9)
    flat = next(row for row in found.rows if row.name == "flatten")
    assert flat.moves_only
    assert flat.distance_p95 <= float(RADIUS) * 8**0.5 * (1 + 1e-6)


def test_the_sentence_names_the_layer_with_the_largest_gain(found: Sensitivity) -> None:
    worst = max(found.rows, key=lambda row: row.gain)
    assert worst.gain > 0
    assert found.sentences[0].startswith(f"{worst.name} ({worst.kind}) costs most")


def test_only_layers_that_loosen_the_bounds_have_something_to_gain(found: Sensitivity) -> None:
    for row in found.rows:
        assert row.gain >= 0
        assert row.gain == 0 or row.share > 0


def test_the_planted_layer_is_blamed() -> None:
    """Of two activations the one whose neurons all have their kink inside the bounds is to blame."""
    torch.manual_seed(0)
    model = mlp([4, 6, 6, 2]).eval()
    with torch.no_grad():
        model.linear1.bias.fill_(10.0)  # act1 never switches
        model.linear2.bias.zero_()
        model.linear2.bias.copy_(-model.linear2(model.act1(model.linear1(torch.full((1, 4), 0.5))))[0])
    found = measured(model, 0.5 + 0.01 * torch.rand(8, 4))
    rows = {row.name: row for row in found.rows}
    assert rows["act1"].unstable == 0
    assert rows["act2"].unstable == 1
    assert rows["act2"].share == pytest.approx(1)
    assert found.sentences[0].startswith("act2")


def test_exact_networks_blame_nobody() -> None:
    torch.manual_seed(0)
    found = measured(nn.Sequential(nn.Flatten(), nn.Linear(4, 3)).eval(), torch.rand(5, 4))
    assert found.sentences[0].startswith("No layer loosens")


def test_residual_and_convolutional_nets_have_a_row_per_node() -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.act, self.last = nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(x + self.act(self.first(x)))

    torch.manual_seed(0)
    found = measured(Residual().eval(), torch.rand(6, 6))
    assert [row.name for row in found.rows] == ["first", "act", "add", "last"]
    assert next(row for row in found.rows if row.name == "add").lipschitz_lower is None
    found = measured(cnn((1, 8, 8), 3, width=2).eval(), torch.rand(4, 1, 8, 8))
    assert {row.name: row.shape for row in found.rows}["conv2"] == (4, 2, 2)
    assert found.rows[0].parameters == 2 * 16 + 2


def test_records_survive_json(found: Sensitivity) -> None:
    assert Sensitivity.from_dict(json.loads(json.dumps(found.to_dict(), allow_nan=False))) == found


def test_no_sample_right_is_an_error() -> None:
    torch.manual_seed(0)
    model, x = mlp([4, 5, 2]).eval(), torch.rand(5, 4)
    with torch.no_grad():
        wrong = 1 - model(x).argmax(1)
    with pytest.raises(InvalidInput):
        layer_sensitivity(model, x, wrong, PROTOCOL, radius=RADIUS)
