"""Activations against their published formulas, and what certifies them or refuses."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import certify
from certify.errors import InvalidInput, UnsupportedOperation
from certify.testing import check_activation
from models import KAF, mlp
from models.activations import ACTIVATIONS, factory
from models.kwta import KWTA
from models.pssilu import PSSiLU, PSSiLUFacts


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_every_name_makes_an_activation_that_trains(name: str) -> None:
    torch.manual_seed(0)
    for shape in ((5, 6), (4, 6, 3, 3)):
        module, x = factory(name)(6), torch.randn(shape, requires_grad=True)
        y = module(x)
        assert y.shape == x.shape
        y.sum().backward()
        assert bool(torch.isfinite(x.grad).all())
        assert all(p.grad is not None for p in module.parameters())


@pytest.mark.parametrize("name", [name for name in ACTIVATIONS if name != "kwta"])
def test_every_name_but_kwta_is_certified(name: str) -> None:
    torch.manual_seed(0)
    model, x = mlp([4, 6, 3], name).eval(), torch.rand(3, 4)
    ball = certify.LpBall(x, 0.05)
    found = certify.bounds(model, ball, "crown")
    for points in ball.sample(20):
        y = model(points).detach()
        assert bool(((y >= found.lower) & (y <= found.upper)).all())


def test_aliases_are_the_functions_they_name() -> None:
    torch.manual_seed(0)
    x = torch.linspace(-3, 3, 50)[:, None]
    assert torch.equal(factory("swish")(1)(x), F.silu(x))
    assert torch.equal(factory("kaf-swish")(1)(x), factory("kaf-silu")(1)(x))
    with pytest.raises(InvalidInput, match="unknown activation"):
        factory("swash")


def test_kafs_take_options_by_name() -> None:
    kaf = factory("kaf-elu:ridge=auto,tails=linear,size=12")(3)
    same = KAF(1, init="elu", size=12, ridge="auto")
    assert (kaf.tails, len(kaf.dictionary), kaf.fit.ridge) == ("linear", 12, same.fit.ridge)
    assert mlp([4, 3, 2], "kaf:bound=2.5").architecture["activation"] == "kaf:bound=2.5"
    for bad in ("kaf:depth=3", "kaf:base=relu", "kaf:size", "relu:slope=1", "kaf:size=1", "swash:size=3"):
        with pytest.raises(InvalidInput) as error:
            factory(bad)
        assert len(str(error.value).splitlines()) <= 3


def test_flags_of_kafs_are_true_or_false() -> None:
    assert not factory("kaf-free:trainable=false")(2).trainable
    assert isinstance(factory("kaf:trainable=true")(2).dictionary, nn.Parameter)
    fixed = factory("kaf:trainable=false")(2)
    assert fixed.trainable is False
    assert [name for name, _ in fixed.named_parameters()] == ["alpha"]


def test_a_base_in_words_is_refused_with_the_names_that_have_one() -> None:
    with pytest.raises(InvalidInput, match=r"relu\+kaf or silu\+kaf"):
        factory("kaf:base=relu")


def winners(x: Tensor, ratio: float) -> Tensor:
    """The definition, one sample and one value at a time."""
    out = torch.zeros_like(x)
    for sample, kept in zip(x.flatten(1), out.view(len(x), -1), strict=True):
        k = -int(-ratio * len(sample) // 1)
        for index in sorted(range(len(sample)), key=lambda i: -float(sample[i]))[:k]:
            kept[index] = sample[index]
    return out


@pytest.mark.parametrize("ratio", [0.1, 0.34, 1.0])
@pytest.mark.parametrize("shape", [(5, 7), (3, 2, 4, 5)])
def test_kwta_keeps_the_largest_values_of_a_sample(shape: tuple[int, ...], ratio: float) -> None:
    torch.manual_seed(0)
    x = torch.randn(shape)
    assert torch.equal(KWTA(ratio)(x), winners(x, ratio))


def test_kwta_keeps_exactly_k_of_equal_values_and_passes_gradients_to_winners_alone() -> None:
    x = torch.ones(2, 10, requires_grad=True)
    y = KWTA(0.3)(x)
    assert (y != 0).sum(1).tolist() == [3, 3]
    y.sum().backward()
    assert torch.equal(x.grad, (y != 0).float())


def test_kwta_is_attacked_and_its_certification_refused_with_the_reason() -> None:
    torch.manual_seed(0)
    model, x = mlp([4, 8, 3], "kwta").eval(), torch.rand(3, 4)
    ball, spec = certify.LpBall(x, 0.5), certify.class_margins(torch.zeros(3, dtype=torch.long), 3)
    assert certify.attacks.PGD(steps=3)(model, ball, spec).margin.shape == (3, 2)
    with pytest.raises(UnsupportedOperation, match="jumps") as error:
        certify.prove(model, ball, spec)
    assert "act1" in str(error.value)
    assert len(str(error.value).splitlines()) == 3
    for ratio in (0.0, 1.1):
        with pytest.raises(InvalidInput):
            KWTA(ratio)


def test_pssilu_starts_as_silu_and_is_its_formula() -> None:
    x = torch.linspace(-6, 6, 101, dtype=torch.float64)
    torch.testing.assert_close(PSSiLU().double()(x), F.silu(x))
    torch.testing.assert_close(
        PSSiLU(2.0, 0.25).double()(x), x * (1 / (1 + torch.exp(-2 * x)) - 0.25) / 0.75, rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize(
    ("alpha", "beta"), [(3.0, 0.6), (-2.0, 0.4), (0.2, -0.09), (5.0, -2.0), (1.0, 0.99), (0.0, 0.1)]
)
def test_pssilu_facts_hold_for_trained_parameters(alpha: float, beta: float) -> None:
    check_activation(PSSiLUFacts(PSSiLU(alpha, beta)))


@pytest.mark.parametrize(("alpha", "beta"), [(1.5, 0.2), (1.0, -0.05), (-2.0, 0.4)])
def test_the_range_of_pssilu_is_attained(alpha: float, beta: float) -> None:
    torch.manual_seed(0)
    facts = PSSiLUFacts(PSSiLU(alpha, beta))
    low = 4 * torch.randn(200, 1, dtype=torch.float64)
    z = certify.Interval(low, low + 6 * torch.rand(200, 1, dtype=torch.float64))
    s = z.lower + torch.linspace(0, 1, 20_001, dtype=torch.float64).view(-1, 1, 1) * z.width
    y, found = facts.forward(s), facts.range(z)
    torch.testing.assert_close(found.lower, y.amin(0), rtol=0, atol=1e-6)
    torch.testing.assert_close(found.upper, y.amax(0), rtol=0, atol=1e-6)


def test_pssilu_beyond_its_pole_is_refused() -> None:
    model = nn.Sequential(nn.Linear(3, 3), PSSiLU(1.0, 1.5)).eval()
    with pytest.raises(UnsupportedOperation, match="beta"):
        certify.bounds(model, certify.LpBall(torch.rand(1, 3), 0.1), "ibp")


def test_bounds_train_the_parameters_of_a_pssilu() -> None:
    torch.manual_seed(0)
    model, x = mlp([4, 6, 3], "pssilu"), torch.rand(5, 4)
    spec = certify.class_margins(torch.zeros(5, dtype=torch.long), 3)
    for method in ("ibp", "crown-ibp"):
        model.zero_grad()
        certify.training_margins(model, certify.LpBall(x, 0.05), spec, method).sum().backward()
        found = model.act1.alpha.grad.clone(), model.act1.beta.grad.clone()
        for parameter, gradient in zip((model.act1.alpha, model.act1.beta), found, strict=True):
            values = []
            for step in (1e-3, -1e-3):
                with torch.no_grad():
                    parameter.add_(step)
                    values.append(certify.training_margins(model, certify.LpBall(x, 0.05), spec, method).sum())
                    parameter.sub_(step)
            assert float(gradient) == pytest.approx(float(values[0] - values[1]) / 2e-3, rel=0.05, abs=1e-2)


@pytest.mark.parametrize("module", [nn.Hardswish(), nn.Hardsigmoid()])
def test_hard_variants_are_bounded_tightly(module: nn.Module) -> None:
    model = nn.Sequential(nn.Identity(), module).eval()
    x = torch.linspace(-5, 5, 81)[:, None]
    found = certify.bounds(model, certify.LpBall(x, 0.7), "ibp", arithmetic="real")
    s = x + torch.linspace(-0.7, 0.7, 2001)
    torch.testing.assert_close(found.lower[:, 0], module(s).amin(1), rtol=0, atol=2e-3)
    torch.testing.assert_close(found.upper[:, 0], module(s).amax(1), rtol=0, atol=2e-3)
