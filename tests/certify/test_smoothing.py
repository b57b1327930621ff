"""Randomised smoothing: below the exact radius of linear classifiers, near it with many copies, and honest in doubt."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from torch import Tensor, nn

from analysis.protocol import Protocol
from analysis.smoothing import SmoothedAccuracy, smoothed_accuracy
from certify import Smoothing, certify_smoothed
from certify.errors import InvalidInput, InvalidModel
from certify.smoothing import ABSTAIN
from models.data import load
from models.networks import architecture, build
from models.training import NoiseTraining, TrainConfig, train
from models.training.recipe import Batch


def _linear() -> tuple[nn.Linear, Tensor, Tensor]:
    """A linear classifier of two classes, points, and their exact l2 distances: its smoothed version is itself."""
    torch.manual_seed(0)
    model = nn.Linear(5, 2).eval()
    x = torch.randn(40, 5)
    with torch.no_grad():
        y = model(x)
        distance = (y[:, 0] - y[:, 1]).abs() / (model.weight[0] - model.weight[1]).norm()
    return model, x, distance.double()


def test_radii_stay_below_the_exact_ones_and_come_near() -> None:
    model, x, distance = _linear()
    smoothing = Smoothing(sigma=0.5, count=5000)
    found = certify_smoothed(model, x, smoothing, generator=torch.arange(40))
    sure = found.predicted != ABSTAIN
    assert torch.equal(found.predicted[sure], model(x).argmax(1)[sure])
    assert bool((found.radius <= distance).all()), "each of 40 may fail with probability .001"
    near = sure & (distance > 0.1) & (distance < 0.8)
    assert int(near.sum()) >= 10
    assert bool((found.radius[near] > distance[near] - 0.1).all())
    assert bool((found.radius[~sure] == 0).all())


def test_in_doubt_it_abstains() -> None:
    model = nn.Linear(3, 2)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0, 0, 0], [-1.0, 0, 0]]))
        model.bias.zero_()
    found = certify_smoothed(model, torch.zeros(1, 3), Smoothing(sigma=1.0, count=500), generator=torch.tensor([3]))
    assert found.predicted.tolist() == [ABSTAIN]
    assert not bool(found.certified(torch.tensor([0]), 0.0).any())


def test_no_certificate_is_more_than_all_copies_allow() -> None:
    """All of n copies agree: p = alpha^(1/n), so that the radius is sigma Phi^-1(alpha^(1/n)) and no more."""
    model, x, _ = _linear()
    with torch.no_grad():
        model.bias[0] += 1e4
    found = certify_smoothed(model, x[:3], Smoothing(sigma=0.5, count=200), generator=torch.arange(3))
    limit = 0.5 * torch.special.ndtri(torch.tensor(0.001, dtype=torch.float64) ** (1 / 200))
    torch.testing.assert_close(found.radius, limit.expand(3))


def test_a_sample_does_not_depend_on_its_neighbours_nor_on_the_batch() -> None:
    model, x, _ = _linear()
    many = certify_smoothed(model, x[:4], Smoothing(sigma=0.5, count=300), generator=torch.arange(4))
    one = certify_smoothed(model, x[2:3], Smoothing(sigma=0.5, count=300, batch=7), generator=torch.tensor([2]))
    assert float(one.probability) == float(many.probability[2])


def test_models_and_options_that_cannot_be_meant_are_refused() -> None:
    with pytest.raises(InvalidModel, match="NaN"):
        certify_smoothed(nn.Linear(3, 2), torch.full((1, 3), torch.nan), Smoothing(sigma=1.0))
    with pytest.raises(InvalidInput, match="classes"):
        certify_smoothed(nn.Linear(3, 1), torch.zeros(1, 3), Smoothing(sigma=1.0))
    for options in ({"sigma": 0.0}, {"sigma": 1.0, "alpha": 0.5}, {"sigma": 1.0, "count": 0}):
        with pytest.raises(InvalidInput):
            Smoothing(**options)


def test_accuracies_count_abstentions_as_wrong() -> None:
    model, x, distance = _linear()
    y = model(x).argmax(1)
    radii = (Fraction(0), Fraction(1, 5), Fraction(1))
    asked = Protocol(radii=radii, methods=())
    found = smoothed_accuracy(model, x, y, Smoothing(sigma=0.5, count=500), asked, index=torch.arange(40) + 3)
    assert [sample.index for sample in found.samples] == list(range(3, 43))
    assert found.clean.count + found.abstained.count == 40
    for radius, rate in zip(radii, found.certified, strict=True):
        assert rate.count <= int((distance > float(radius)).sum())
    assert found.certified[0].count == found.clean.count
    assert SmoothedAccuracy.from_dict(found.to_dict()) == found


def test_noise_training_sees_normal_noise_of_its_sigma() -> None:
    seen: list[Tensor] = []

    class Spy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(50, 3)

        def forward(self, x: Tensor) -> Tensor:
            seen.append(x.detach())
            return self.layer(x)

    batch = Batch(Spy(), torch.full((400, 50), 0.5), torch.zeros(400, dtype=torch.long), 3, torch.Generator())
    NoiseTraining(sigma=0.3)(batch).loss.backward()
    noise = (seen[0] - 0.5) / 0.3
    assert abs(float(noise.mean())) < 0.03
    assert abs(float(noise.std()) - 1) < 0.02
    assert abs(float((noise.abs() < 1).double().mean()) - 0.6827) < 0.01


def test_noise_training_makes_the_smoothed_digits_better() -> None:
    digits = load("digits")
    x, y = digits.test_x[:30], digits.test_y[:30]
    rates = []
    for recipe in ({"name": "standard"}, {"name": "noise", "sigma": 0.5}):
        model = build(architecture("mlp", digits.input_shape, 10, "relu", hidden=(64,)), seed=0)
        config = TrainConfig.from_dict({"epochs": 12, "engine": {"device": "cpu"}, "recipe": recipe})
        trained = train(model, digits, config).model
        smoothing, asked = Smoothing(sigma=0.5, count=400), Protocol(radii=(Fraction(1, 4),), methods=())
        found = smoothed_accuracy(trained, x, y, smoothing, asked, index=torch.arange(30))
        rates.append(found.certified[0].count)
    assert rates[1] > rates[0]
