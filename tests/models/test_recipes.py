"""Recipes: what they train on lies where it should and has a higher loss; published special cases agree."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import certify
from certify.errors import InvalidInput
from models import mlp
from models.data import Dataset
from models.data import load as load_data
from models.training import (
    RECIPES,
    Batch,
    CrownIBPTraining,
    Fast,
    Free,
    IBPTraining,
    MtlIBP,
    NoisyFGSM,
    Penalties,
    PGDTraining,
    Sabr,
    Standard,
    Trades,
)
from models.training.adversary import attacked, climb, pull_back, stride
from models.training.certified import batch_statistics, margins_of, worst_loss
from models.training.penalty import penalty
from models.training.recipe import NORMS, Threat


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return load_data("digits")


def batch_of(data: Dataset, model: nn.Module | None = None, *, n: int = 64, done: float = 1.0) -> Batch:
    torch.manual_seed(0)
    model = mlp([64, 16, 10], "kaf-elu") if model is None else model
    draw = torch.Generator().manual_seed(0)
    return Batch(model.train(), data.train_x[:n], data.train_y[:n], 10, draw, step=round(1000 * done), steps=1000)


ATTACKS = [
    Fast(radius=0.1),
    Fast(radius=0.5, norm="l2"),
    Fast(radius=2.0, norm="l1"),
    Free(radius=0.1),
    PGDTraining(radius=0.1),
    PGDTraining(radius=0.5, norm="l2", statistics="batch"),
    PGDTraining(radius=2.0, norm="l1", steps=3),
    Trades(radius=0.1),
]


@pytest.mark.parametrize("recipe", ATTACKS, ids=str)
def test_attacked_images_lie_in_ball_and_range_and_raise_the_loss(recipe, digits: Dataset) -> None:
    batch = batch_of(digits)
    points = recipe.attack(batch)
    if isinstance(recipe, Free):  # moved by the gradient of the step before
        batch.loss(batch.model(points)).backward()
        points = recipe.attack(batch).detach()
        batch.model.zero_grad()
    distance = (points - batch.x).double().flatten(1).norm(p=NORMS[recipe.norm], dim=1)
    assert float(distance.max()) <= recipe.radius * (1 + 1e-6)
    assert 0 <= float(points.min()) <= float(points.max()) <= 1
    with torch.no_grad():
        assert batch.loss(batch.model(points)) > batch.loss(batch.model(batch.x))
    assert all(p.grad is None for p in batch.model.parameters())
    assert batch.model.training


def test_noisy_fgsm_goes_beyond_the_ball_as_published(digits: Dataset) -> None:
    batch = batch_of(digits)
    points = NoisyFGSM(radius=0.1).attack(batch)
    distance = (points - batch.x).abs().flatten(1).amax(1)
    assert 0.1 < float(distance.max()) <= 0.3 + 1e-6
    with pytest.raises(InvalidInput, match="linf"):
        NoisyFGSM(radius=0.1, norm="l2").attack(batch)


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_a_stride_is_the_best_step_of_its_length(norm: str) -> None:
    torch.manual_seed(1)
    gradient, threat = torch.randn(5, 3, 4), Threat(0.3, norm)
    step = stride(gradient, threat, 0.3)
    size = step.flatten(1).norm(p=NORMS[norm], dim=1)
    torch.testing.assert_close(size, torch.full((5,), 0.3))
    dual = {"linf": 1.0, "l2": 2.0, "l1": torch.inf}[norm]
    best = 0.3 * gradient.flatten(1).norm(p=dual, dim=1)
    torch.testing.assert_close((step * gradient).flatten(1).sum(1), best)


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_pulling_back_leaves_points_of_the_ball_alone(norm: str) -> None:
    torch.manual_seed(2)
    x, threat = torch.rand(6, 8), Threat(0.5, norm)
    inside = threat.ball(x).sample(1)[0]
    torch.testing.assert_close(pull_back(inside, x, threat), inside, atol=1e-6, rtol=0)


@pytest.mark.parametrize("statistics", ["batch", "running"])
def test_attacks_leave_running_statistics_and_modes_alone(statistics: str, digits: Dataset) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 10))
    model[3].eval()
    batch = Batch(model, digits.train_x[:32], digits.train_y[:32], 10, torch.Generator())
    before = [value.clone() for value in model.state_dict().values()]
    modes = [module.training for module in model.modules()]
    with attacked(model, statistics):
        start = batch.x + 0.01
        climb(model, batch.x, start, Threat(0.1), batch.loss, lengths=[0.1, 0.1])
        assert model[2].training == (statistics == "batch")
    assert all(torch.equal(a, b) for a, b in zip(before, model.state_dict().values(), strict=True))
    assert [module.training for module in model.modules()] == modes
    assert model[2].track_running_stats


def test_open_steps_are_those_of_the_attack_and_given_ones_stay() -> None:
    shares = [share for _, share in certify.attacks.PGD(steps=7).lengths()]
    for kind in (PGDTraining, Trades):
        assert kind(radius=0.3, steps=7).lengths == pytest.approx([0.3 * share for share in shares])
        assert kind(radius=0.3, steps=3, step=0.1).lengths == [0.1] * 3
        with pytest.raises(InvalidInput, match="step = -1"):
            kind(radius=0.3, step=-1.0)


@pytest.mark.parametrize(
    ("name", "option", "value"),
    [
        ("fast", "step", -1.0),
        ("n-fgsm", "step", -1.0),
        ("n-fgsm", "noise", -2.0),
        ("free", "replays", 0),
        ("pgd", "steps", 0),
        ("trades", "beta", -1.0),
        ("ibp", "kappa", 7.0),
        ("crown-ibp", "kappa", -1.0),
        ("crown-ibp", "beta", 2.0),
        ("sabr", "share", -1.0),
        ("sabr", "steps", -3),
        ("mtl-ibp", "alpha", -2.0),
        ("mtl-ibp", "steps", 0),
    ],
)
def test_values_that_cannot_be_meant_are_refused(name: str, option: str, value: float) -> None:
    with pytest.raises(InvalidInput, match=f"{option} = {value}"):
        RECIPES[name](**{"radius": 0.1, option: value})


def test_trades_without_beta_is_standard_training(digits: Dataset) -> None:
    batch = batch_of(digits)
    outcomes = Trades(radius=0.1, beta=0.0, steps=1)(batch), Standard()(batch)
    assert outcomes[0].loss == outcomes[1].loss


def test_trades_is_its_formula(digits: Dataset) -> None:
    batch = batch_of(digits)
    recipe = Trades(radius=0.1, beta=3.0, steps=2)
    loss = recipe(batch).loss
    batch.generator.manual_seed(0)
    points = recipe.attack(batch)
    p, q = batch.model(batch.x).softmax(1), batch.model(points).softmax(1)
    divergence = (p * (p / q).log()).sum(1).mean()
    torch.testing.assert_close(loss, F.cross_entropy(batch.model(batch.x), batch.y) + 3 * divergence)


@pytest.mark.parametrize("kind", [IBPTraining, CrownIBPTraining, Sabr, MtlIBP])
def test_certified_recipes_begin_as_standard_training_and_grow(kind, digits: Dataset) -> None:
    recipe = kind(radius=0.1, warmup=0.1, ramp=0.5)
    assert [recipe.grown(done) for done in (0.0, 0.1, 0.35, 0.6, 1.0)] == pytest.approx([0, 0, 0.5, 1, 1])
    early = batch_of(digits, done=0.05)
    torch.testing.assert_close(recipe(early).loss, Standard()(early).loss, rtol=1e-3, atol=0)
    assert recipe(batch_of(digits, done=0.7)).loss > recipe(early).loss


@pytest.mark.parametrize("method", ["ibp", "crown-ibp"])
def test_the_worst_loss_is_above_that_of_every_point(method: str, digits: Dataset) -> None:
    batch = batch_of(digits)
    ball = Threat(0.05).ball(batch.x)
    worst = worst_loss(batch, ball, method)
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for points in ball.sample(50, draw):
            assert batch.loss(batch.model(points)) <= worst
    point = climb(batch.model, batch.x, batch.x, Threat(0.05), batch.loss, lengths=[0.02] * 10)
    assert batch.loss(batch.model(point)) <= worst


def test_crown_ibp_mixes_both_bounds(digits: Dataset) -> None:
    batch = batch_of(digits, mlp([64, 16, 16, 10]), done=1.0)
    only = CrownIBPTraining(radius=0.05, kappa=0.0, beta=1.0)(batch).loss
    none = CrownIBPTraining(radius=0.05, kappa=0.0, beta=0.0)(batch).loss
    ball = Threat(0.05).ball(batch.x)
    torch.testing.assert_close(only, worst_loss(batch, ball, "crown-ibp"))
    torch.testing.assert_close(none, worst_loss(batch, ball, "ibp"))
    assert only != none


def normalised() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 10))


def test_bounds_use_the_statistics_of_the_batch(digits: Dataset) -> None:
    model = normalised()
    batch = batch_of(digits, model)
    with batch_statistics(model):
        logits = model(batch.x)
        found = margins_of(batch, Threat(1e-7).ball(batch.x), "ibp")
    assert model[2].training
    expected = certify.class_margins(batch.y, 10).rows(logits)
    variance = 64 / 63  # running variances are unbiased, those of the forward pass are not
    torch.testing.assert_close(found.float(), expected.float(), rtol=0, atol=4 * (variance - 1))


def test_running_statistics_move_as_they_would_without_bounds(digits: Dataset) -> None:
    model, twin = normalised(), normalised()
    with torch.no_grad():
        twin.train()(digits.train_x[:64])
    outcome = IBPTraining(radius=0.05)(batch_of(digits, model))
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        torch.testing.assert_close(getattr(model[2], name), getattr(twin[2], name))
    assert model[2].momentum == 0.1
    outcome.loss.backward()
    assert model[2].weight.grad is not None


def test_every_recipe_gives_gradients_to_all_parameters(digits: Dataset) -> None:
    options = {"standard": {}, "noise": {"sigma": 0.1}}
    for name, kind in RECIPES.items():
        recipe = kind(**options.get(name, {"radius": 0.05}))
        batch = batch_of(digits, mlp([64, 12, 10], "relu"), n=16, done=0.9)
        outcome = recipe(batch)
        outcome.loss.backward()
        assert outcome.logits.shape == (16, 10)
        assert all(p.grad is not None and bool(torch.isfinite(p.grad).all()) for p in batch.model.parameters())
        assert batch.model.training


def test_noise_is_shared_out(digits: Dataset) -> None:
    """Two processes with half of the images each draw the noise that one draws for all."""
    x, y, model = digits.train_x[:7], digits.train_y[:7], nn.Identity()
    parts = []
    for rank in range(2):
        mine = slice(rank, None, 2)
        draw = torch.Generator().manual_seed(4)
        parts.append(Batch(model, x[mine], y[mine], 10, draw, whole=7, mine=mine).uniform())
    whole = Batch(model, x, y, 10, torch.Generator().manual_seed(4)).uniform()
    assert torch.equal(whole[0::2], parts[0])
    assert torch.equal(whole[1::2], parts[1])
    assert -1 <= float(whole.min()) < -0.9 < 0.9 < float(whole.max()) <= 1


def test_penalties_are_their_definitions(digits: Dataset) -> None:
    batch = batch_of(digits)
    assert penalty(batch, Penalties(), Threat(0.1)) is None
    weights = sum(torch.linalg.matrix_norm(m.weight, 2) for m in batch.model.modules() if isinstance(m, nn.Linear))
    found = penalty(batch, Penalties(lipschitz=2.0), None)
    assert 2 * weights <= found <= 2.02 * weights
    assert penalty(batch, Penalties(slope=1.0), None) > 0
    assert penalty(batch, Penalties(curvature=1.0), None) > 0


def test_gradalign_is_one_minus_the_cosine_and_differentiable(digits: Dataset) -> None:
    batch = batch_of(digits, n=4)
    found = penalty(batch, Penalties(gradalign=1.0), Threat(0.1))
    batch.generator.manual_seed(0)
    nearby = pull_back(batch.x + 0.1 * batch.uniform(), batch.x, Threat(0.1))

    def gradient(points: Tensor) -> Tensor:
        points = points.clone().requires_grad_()
        return torch.autograd.grad(F.cross_entropy(batch.model(points), batch.y), points)[0].flatten(1)

    here, there = gradient(batch.x), gradient(nearby)
    cosine = (here * there).sum(1) / here.norm(dim=1) / there.norm(dim=1)
    torch.testing.assert_close(found, (1 - cosine).mean().double(), rtol=1e-4, atol=1e-5)
    found.backward()
    assert all(p.grad is not None for p in batch.model.parameters() if p.ndim > 1)
