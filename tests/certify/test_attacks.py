"""Attacks: witnesses lie in the set, are re-evaluated, and reach the analytic worst case of affine models."""

from __future__ import annotations

import copy
import inspect

import pytest
import torch
from torch import nn

from certify.attacks import (
    APGD,
    APGDT,
    FGSM,
    FMN,
    PGD,
    RFGSM,
    Adaptive,
    Attack,
    DeepFool,
    Ensemble,
    Square,
    Transfer,
)
from certify.errors import InvalidInput, InvalidModel
from certify.registry import ATTACKS
from certify.sets import Box, LpBall, PerturbationSet
from certify.specs import class_margins


def _mlp(seed: int = 0, inputs: int = 6, classes: int = 4) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(inputs, 16), nn.ReLU(), nn.Dropout(0.5), nn.BatchNorm1d(16), nn.Linear(16, classes))


def _question(seed: int = 0, batch: int = 12, radius: float = 0.25, p: float = torch.inf):
    model = _mlp(seed).eval()
    x = torch.rand(batch, 6, generator=torch.Generator().manual_seed(seed))
    labels = model(x).argmax(1)
    labels[0] = (labels[0] + 1) % 4  # one misclassified input
    return model, LpBall(x, radius, p=p, clip=(0.0, 1.0)), class_margins(labels, 4)


def _affine_worst_case(domain: PerturbationSet, weight: torch.Tensor, bias: torch.Tensor, C: torch.Tensor):
    """min over the set of every row, analytically: -support(-C W) + C b."""
    rows = torch.einsum("bro,oi->bri", C.double(), weight.double())
    offset = C.double() @ bias.double()
    return torch.stack([offset[:, r] - domain.support(-rows[:, r]) for r in range(rows.shape[1])], 1)


ATTACKERS = [
    FGSM(),
    FGSM(loss="margin"),
    RFGSM(),
    PGD(),
    PGD(loss="ce", restarts=3),
    PGD(loss="dlr", momentum=0.75),
    PGD(target="each", steps=15),
    APGD(steps=20, restarts=2),
    APGDT(steps=20),
    FMN(steps=30),
    DeepFool(steps=20),
    Square(queries=200),
    Ensemble(attacks=(APGD(steps=10), APGDT(steps=10), FMN(steps=20), Square(queries=50))),
    Adaptive(attack=PGD(steps=10)),
    Transfer(surrogate=_mlp(1)),
]


def _name(attack: Attack) -> str:
    """Options tell attacks of one kind apart; addresses of functions and modules would differ from run to run."""
    return f"{type(attack).__name__}{ATTACKERS.index(attack)}"


@pytest.mark.parametrize("p", [1, 2, torch.inf])
@pytest.mark.parametrize("attack", ATTACKERS, ids=_name)
def test_every_witness_lies_in_the_set_and_its_margin_is_the_models_own(attack: Attack, p: float) -> None:
    model, domain, spec = _question(p=p)
    result = attack(model, domain, spec, generator=torch.Generator().manual_seed(1))
    assert bool(domain.contains(result.witness).all())
    rows = spec.rows(model(result.witness)).detach()
    exact = spec.rows(copy.deepcopy(model).double()(result.witness.double())).detach()
    mended = (rows.amin(1) < 0) & (exact.amin(1) >= 0)  # broken by rounding alone
    torch.testing.assert_close(result.margin[~mended], rows[~mended], rtol=0, atol=0)
    torch.testing.assert_close(result.margin[mended], exact[mended], rtol=0, atol=1e-12)
    assert torch.equal(result.success, result.margin.amin(1) < 0)
    assert torch.equal(result.success, (rows.amin(1) < 0) & (exact.amin(1) < 0))
    assert bool(result.success[0]), "a misclassified input breaks the claim by itself"
    assert bool((result.margin.amin(1) <= spec.rows(model(domain.center)).amin(1)).all())
    assert result.queries >= 2 * domain.batch


@pytest.mark.parametrize("clip", [None, (0.0, 1.0)])
@pytest.mark.parametrize("p", [1, 2, torch.inf])
def test_attacks_on_an_affine_model_attain_the_analytic_worst_case(p: float, clip) -> None:
    torch.manual_seed(3)
    model = nn.Linear(8, 3).double()
    domain = LpBall(torch.rand(10, 8).double(), 0.3, p=p, clip=clip)
    spec = class_margins(torch.randint(0, 3, (10,)), 3, dtype=torch.float64)
    truth = _affine_worst_case(domain, model.weight, model.bias, spec.C).amin(1)
    pgd = PGD(target="each", steps=100, step=0.1, restarts=2, early_stop=False)
    found = pgd(model, domain, spec, generator=torch.Generator().manual_seed(0)).margin.amin(1)
    assert bool((found >= truth).all())
    slack = 3e-2 if p == 1 and clip else 1e-3  # a clipped l1 ball has many small faces, and steps of one length
    torch.testing.assert_close(found, truth, rtol=0, atol=slack)
    fast = class_margins(torch.zeros(10, dtype=torch.long), 2, dtype=torch.float64)
    binary = nn.Linear(8, 2).double()
    truth = _affine_worst_case(domain, binary.weight, binary.bias, fast.C)[:, 0]
    torch.testing.assert_close(FGSM()(binary, domain, fast).margin[:, 0], truth, rtol=1e-5, atol=1e-5)


def test_a_box_with_fixed_features_is_climbed_to_its_worst_corner() -> None:
    lower = torch.tensor([[0.0, -1.0, 2.0]])
    domain = Box(lower, torch.tensor([[1.0, -1.0, 2.5]]))
    model = nn.Linear(3, 2)
    spec = class_margins(torch.tensor([1]), 2)
    result = PGD(early_stop=False)(model, domain, spec)
    truth = _affine_worst_case(domain, model.weight, model.bias, spec.C)
    torch.testing.assert_close(result.margin, truth.detach(), rtol=1e-5, atol=1e-5)
    assert result.witness[0, 1] == -1


def test_a_target_row_is_driven_to_its_own_minimum() -> None:
    torch.manual_seed(5)
    model = nn.Linear(6, 4).double()
    domain = LpBall(torch.randn(5, 6).double(), 0.2)
    spec = class_margins(torch.tensor([0, 1, 2, 3, 0]), 4, dtype=torch.float64)
    truth = _affine_worst_case(domain, model.weight, model.bias, spec.C)
    for row in range(3):
        one = spec.row(torch.full((5,), row))
        result = PGD(target=0, early_stop=False)(model, domain, one)
        torch.testing.assert_close(result.margin[:, 0], truth[:, row], rtol=1e-6, atol=1e-6)
    with pytest.raises(InvalidInput, match="target=3"):
        PGD(target=3)(model, domain, spec)


def test_cross_entropy_gradients_survive_large_logits() -> None:
    model = nn.Linear(2, 2)
    with torch.no_grad():
        model.weight.copy_(1e4 * torch.eye(2))
        model.bias.zero_()
    domain = LpBall(torch.tensor([[1.0, 0.5]]), 0.3)
    assert bool(PGD(loss="ce")(model, domain, class_margins(torch.tensor([0]), 2)).success)


def test_compaction_does_not_change_verdicts() -> None:
    model, domain, spec = _question(batch=40, radius=0.2)
    seeds = [torch.Generator().manual_seed(7) for _ in range(2)]
    lazy = PGD(restarts=4)(model, domain, spec, generator=seeds[0])
    full = PGD(restarts=4, early_stop=False)(model, domain, spec, generator=seeds[1])
    assert torch.equal(lazy.success, full.success)
    assert bool(lazy.success.any())
    assert not bool(lazy.success.all())
    assert lazy.queries < full.queries


def test_restarts_beyond_one_pass_are_still_made(monkeypatch: pytest.MonkeyPatch) -> None:
    model, domain, spec = _question(batch=8)
    monkeypatch.setattr("certify.attacks.points.POINTS", 16)
    result = PGD(restarts=5, early_stop=False, steps=3)(model, domain, spec)
    broken = int((result.margin.amin(1) < 0).sum())
    assert result.queries == 8 * (5 * 4 + 2) + broken, "and those broken once more, in float64"


def test_the_same_seed_gives_the_same_points_and_leaves_the_global_state_alone() -> None:
    model, domain, spec = _question()
    state = torch.get_rng_state()
    runs = [PGD()(model, domain, spec, generator=torch.Generator().manual_seed(11)) for _ in range(2)]
    assert torch.equal(runs[0].witness, runs[1].witness)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("attack", ATTACKERS, ids=_name)
def test_modes_come_back_and_parameter_gradients_are_left_alone(attack: Attack) -> None:
    model, domain, spec = _question()
    model.train()
    model[3].eval()
    statistics = model[3].running_mean.clone()
    marker = torch.ones_like(model[0].weight)
    model[0].weight.grad = marker.clone()
    with torch.no_grad():
        attack(model, domain, spec)
    assert [module.training for module in (model, model[2], model[3])] == [True, True, False]
    assert torch.equal(model[3].running_mean, statistics)
    assert torch.equal(model[0].weight.grad, marker)
    assert all(p.grad is None for name, p in model.named_parameters() if name != "0.weight")
    assert all(p.requires_grad for p in model.parameters())


class _Careless(Attack):
    """Returns points far outside, NaN, or fails."""

    def __init__(self, value: float) -> None:
        self.value = value

    def search(self, objective, domain, spec, generator):
        if self.value == 0:
            raise RuntimeError("broken attack")
        return domain.center + self.value


@pytest.mark.parametrize("value", [100.0, float("nan"), float("inf")])
@pytest.mark.parametrize("p", [1, 2, torch.inf])
def test_points_outside_never_count(value: float, p: float) -> None:
    model, domain, spec = _question(p=p, radius=0.05)
    result = _Careless(value)(model, domain, spec)
    assert bool(domain.contains(result.witness).all())
    torch.testing.assert_close(result.margin, spec.rows(model(result.witness)).detach(), rtol=0, atol=0)


def test_modes_come_back_after_an_error() -> None:
    model, domain, spec = _question()
    model.train()
    with pytest.raises(RuntimeError, match="broken attack"):
        _Careless(0)(model, domain, spec)
    assert model.training


def test_nan_outputs_are_an_error_and_no_success() -> None:
    model, domain, spec = _question()
    with torch.no_grad():
        model[4].bias[1] = float("nan")
    for attack in (FGSM(), PGD()):
        with pytest.raises(InvalidModel, match="NaN"):
            attack(model, domain, spec)


def test_questions_that_do_not_fit_are_refused() -> None:
    model, domain, spec = _question()
    with pytest.raises(InvalidInput, match="a spec for 3 samples"):
        PGD()(model, domain, spec.take(torch.arange(3)))
    with pytest.raises(InvalidInput, match="float64"):
        PGD()(model, LpBall(domain.center.double(), 0.1), spec)
    with pytest.raises(InvalidInput, match="4 outputs and a spec for 5"):
        PGD()(model, domain, class_margins(torch.zeros(12, dtype=torch.long), 5))
    for options in ({"steps": 0}, {"restarts": 0}, {"step": -1.0}, {"step": float("nan")}, {"loss": "l1"}):
        with pytest.raises(InvalidInput):
            PGD(**options)
    with pytest.raises(InvalidInput):
        PGD(restarts=2, random_start=False)


def test_the_step_is_in_the_units_of_x_and_one_step_moves_no_farther() -> None:
    model, domain, spec = _question(radius=0.2)
    points = PGD(steps=1, step=0.05, random_start=False, early_stop=False)(model, domain, spec).witness
    moved = (points - domain.center).abs().amax(1)
    assert bool((moved <= 0.05 * (1 + 1e-5)).all())
    assert bool((moved > 0.02).any())
    ball = LpBall(domain.center, 0.2, p=2)
    points = PGD(steps=1, step=0.05, random_start=False, early_stop=False)(model, ball, spec).witness
    lengths = (points - domain.center).norm(dim=1)
    moved = lengths[lengths > 0]
    assert len(moved) > 0
    torch.testing.assert_close(moved, torch.full_like(moved, 0.05), rtol=1e-4, atol=0)


def test_callers_may_be_in_inference_mode_and_models_may_be_frozen_or_constant() -> None:
    model, domain, spec = _question()
    want = PGD(random_start=False)(model, domain, spec)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    with torch.inference_mode():
        assert torch.equal(PGD(random_start=False)(model, domain, spec).witness, want.witness)
    model[4].weight.zero_()
    constant = PGD()(model, domain, spec)
    assert torch.equal(constant.success, spec.rows(model(domain.center)).amin(1) < 0)

    class Constant(nn.Module):
        def forward(self, x):
            return torch.ones(len(x), 4)

    assert not bool((PGD()(Constant(), domain, spec).margin != 0).any())


def test_a_radius_of_zero_returns_the_centre() -> None:
    model, domain, spec = _question(radius=0.0)
    for options in ({}, {"step": 0.1}):
        assert torch.equal(PGD(**options)(model, domain, spec).witness, domain.center)


def test_no_attack_takes_labels() -> None:
    for attack in ATTACKS.values():
        for function in (attack, attack.__call__, attack.search):
            names = inspect.signature(function).parameters
            assert not {"y", "label", "labels", "target_labels"} & set(names)
    assert {"fgsm", "pgd"} <= set(ATTACKS)
