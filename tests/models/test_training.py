"""Training: it learns, resumes exactly, keeps its best weights, and its adversary stays in the ball."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from certify.errors import InvalidFile, InvalidInput, InvalidModel
from models import KAF, mlp
from models.adversary import accuracy, robust_accuracy, training_inputs
from models.checkpoint import load
from models.data import Dataset, subset
from models.data import load as load_data
from models.networks import Network
from models.recipe import EpochRecord, Recipe
from models.training import one_cycle, train


@pytest.fixture(scope="module")
def whole() -> Dataset:
    return load_data("digits")


@pytest.fixture(scope="module")
def digits(whole: Dataset) -> Dataset:
    """A small part, for tests that need no accuracy."""
    x, y, _ = subset(whole.train_x, whole.train_y, 300, 0)
    return replace(whole, train_x=x, train_y=y, val_x=whole.val_x[:60], val_y=whole.val_y[:60])


def network(activation: str = "kaf-elu", hidden: int = 16) -> Network:
    torch.manual_seed(0)
    return mlp([64, hidden, 10], activation, mean=[0.3], std=[0.4])


def equal(a: nn.Module, b: nn.Module) -> bool:
    pairs = zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    return all(torch.equal(x, y) for x, y in pairs)


def interrupt_after(epoch: int):
    def stop(record: EpochRecord) -> None:
        if record.epoch == epoch:
            raise KeyboardInterrupt

    return stop


RECIPES = {
    "standard adam": Recipe(epochs=4, batch=50),
    "standard sgd": Recipe(epochs=4, batch=64, optimizer="sgd", lr=0.05, weight_decay=1e-4),
    "fast adam": Recipe(epochs=4, batch=50, method="fast", radius=0.1),
    "fast l2": Recipe(epochs=4, batch=50, method="fast", radius=0.5, norm="l2"),
    "pgd adam": Recipe(epochs=4, batch=100, method="pgd", radius=0.1, steps=2),
}


@pytest.mark.parametrize("name", RECIPES)
def test_two_and_two_epochs_are_four(name: str, digits: Dataset, tmp_path: Path) -> None:
    recipe = RECIPES[name]
    whole = train(network(), digits, recipe, directory=tmp_path / "whole")
    first = train(network(), digits, recipe, directory=tmp_path / "parts", on_epoch=interrupt_after(2))
    assert (first.status, len(first.records)) == ("interrupted", 2)
    torch.manual_seed(99)  # a new process starts from elsewhere
    second = train(network("kaf-elu"), digits, recipe, directory=tmp_path / "parts", resume=True)
    assert (second.status, len(second.records)) == ("finished", 4)
    assert equal(whole.model, second.model)
    assert [r.loss for r in whole.records] == [r.loss for r in second.records]
    assert equal(load(tmp_path / "whole").model, load(tmp_path / "parts").model)


def test_it_learns_and_keeps_the_best_weights(whole: Dataset, tmp_path: Path) -> None:
    seen: list[EpochRecord] = []
    result = train(network(hidden=32), whole, Recipe(epochs=15), directory=tmp_path, on_epoch=seen.append)
    assert tuple(seen) == result.records
    assert accuracy(result.model, whole.test_x, whole.test_y) > 0.9
    best = max(record.score for record in seen)
    assert result.records[result.best_epoch - 1].score == best
    assert accuracy(result.model, whole.val_x, whole.val_y) == best
    assert not result.model.training
    saved = load(tmp_path)
    assert equal(saved.model, result.model)
    assert saved.meta["metrics"]["val_accuracy"] == best
    assert saved.meta["recipe"]["epochs"] == 15


def test_adversarial_training_gains_robustness(whole: Dataset) -> None:
    plain, fast = (
        train(network("relu", hidden=64), whole, recipe).model
        for recipe in (Recipe(epochs=20), Recipe(epochs=20, method="fast", radius=0.1))
    )
    judge = Recipe(method="fast", radius=0.1)
    x, y = whole.test_x, whole.test_y
    before, after = (robust_accuracy(model, x, y, judge, classes=10) for model in (plain, fast))
    assert after > before + 0.1
    assert after <= accuracy(fast, x, y)


def test_training_leaves_the_global_generator_alone(digits: Dataset) -> None:
    model = network()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    train(model, digits, Recipe(epochs=1, method="fast", radius=0.1))
    assert torch.equal(torch.rand(3), expected)


def test_patience_stops_early(digits: Dataset) -> None:
    result = train(network(), digits, Recipe(epochs=50, lr=0.0, patience=2, batch=300))
    # Without learning every score ties, ties prefer the later epoch, and patience never runs out.
    assert result.status == "finished"
    worse = Recipe(epochs=50, lr=0.5, optimizer="sgd", patience=2)
    result = train(network("relu"), digits, worse)
    assert result.status == "stopped early"
    assert len(result.records) == result.best_epoch + 2


def test_interrupted_before_the_first_epoch(digits: Dataset, tmp_path: Path) -> None:
    class Stop(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if self.training and x.requires_grad:
                raise KeyboardInterrupt
            return x

    model = mlp([64, 16, 10], "relu")
    model.append(Stop())
    result = train(model, digits, Recipe(epochs=2), directory=tmp_path)
    assert (result.status, result.best_epoch, result.records) == ("interrupted", 0, ())
    assert not list(tmp_path.iterdir())


def test_resume_refuses_another_run(digits: Dataset, tmp_path: Path) -> None:
    recipe = Recipe(epochs=2)
    with pytest.raises(InvalidFile):
        train(network(), digits, recipe, directory=tmp_path, resume=True)
    train(network(), digits, recipe, directory=tmp_path)
    other = replace(digits, train_y=digits.train_y.roll(1))
    for model, data, changed, word in (
        (network(), digits, replace(recipe, lr=0.1), "lr changed"),
        (network(), other, recipe, "labels changed"),
        (mlp([64, 17, 10], "kaf-elu", mean=[0.3], std=[0.4]), digits, recipe, "shape"),
    ):
        with pytest.raises(InvalidFile, match=word):
            train(model, data, changed, directory=tmp_path, resume=True)
    state = tmp_path / "resume.safetensors"
    state.write_bytes(state.read_bytes()[:-10])
    with pytest.raises(InvalidFile):
        train(network(), digits, recipe, directory=tmp_path, resume=True)


@pytest.mark.parametrize("recipe", list(RECIPES.values())[2:], ids=list(RECIPES)[2:])
def test_training_inputs_lie_in_ball_and_range_and_raise_the_loss(recipe: Recipe, digits: Dataset) -> None:
    model, (x, y) = network(), (digits.train_x[:100], digits.train_y[:100])
    draw = torch.Generator().manual_seed(0)
    z = training_inputs(model, x, y, recipe, classes=10, generator=draw)
    distance = (z - x).double().flatten(1).norm(p=recipe.p, dim=1)
    assert float(distance.max()) <= recipe.radius * (1 + 1e-6)
    assert 0 <= float(z.min()) <= float(z.max()) <= 1
    with torch.no_grad():
        attacked, clean = (nn.functional.cross_entropy(model(inputs), y) for inputs in (z, x))
    assert attacked > clean
    assert all(p.grad is None for p in model.parameters())
    assert not z.requires_grad


def test_kaf_parameters_see_no_weight_decay(digits: Dataset) -> None:
    """With a zero gradient only weight decay moves a parameter: it must not touch alpha."""
    model = network()
    with torch.no_grad():
        model.linear2.weight.zero_()
        model.linear2.bias.zero_()
    model.linear2.requires_grad_(False)
    alpha, weight = model.act1.alpha.detach().clone(), model.linear1.weight.detach().clone()
    train(model, digits, Recipe(epochs=1, optimizer="sgd", weight_decay=0.1, lr=0.1))
    assert torch.equal(model.act1.alpha, alpha)
    assert not torch.equal(model.linear1.weight, weight)
    assert isinstance(model.act1, KAF)


def test_one_cycle_rises_to_its_peak_and_falls_to_nearly_nothing() -> None:
    shares = [one_cycle(step, 100) for step in range(100)]
    peak = shares.index(1.0)
    assert shares[: peak + 1] == sorted(shares[: peak + 1])
    assert shares[peak:] == sorted(shares[peak:], reverse=True)
    assert 0 < shares[-1] < 0.02
    assert [one_cycle(0, 1)] == [1.0]


def test_a_diverging_run_says_so(digits: Dataset) -> None:
    with pytest.raises(InvalidModel, match="loss became"):
        train(network("relu"), digits, Recipe(epochs=3, optimizer="sgd", lr=1e30))


@pytest.mark.parametrize(
    "options",
    [
        {"epochs": 0},
        {"batch": 0},
        {"patience": 0},
        {"lr": float("nan")},
        {"radius": -0.1, "method": "fast"},
        {"method": "fast"},
        {"method": "slow"},
        {"optimizer": "lbfgs"},
        {"norm": "l3"},
        {"device": "tpu"},
        {"method": "fast", "norm": "l1", "radius": 1.0},
    ],
)
def test_refuses_recipes_that_cannot_be_meant(options: dict) -> None:
    with pytest.raises(InvalidInput) as error:
        Recipe(**options)
    assert len(str(error.value).splitlines()) <= 3


def test_refuses_networks_and_data_that_do_not_fit(digits: Dataset, tmp_path: Path) -> None:
    empty = replace(digits, train_x=digits.train_x[:0], train_y=digits.train_y[:0])
    with pytest.raises(InvalidInput, match="no training images"):
        train(network(), empty, Recipe())
    with pytest.raises(InvalidInput, match="classes"):
        train(mlp([64, 9]), digits, Recipe())
    with pytest.raises(InvalidInput, match="architecture"):
        train(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), digits, Recipe(), directory=tmp_path)
    with pytest.raises(InvalidInput, match="directory"):
        train(network(), digits, Recipe(), resume=True)
