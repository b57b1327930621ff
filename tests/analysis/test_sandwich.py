"""clean >= PGD >= ensemble >= certified per image, in accuracy and in radius; what contradicts that is an alarm."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import pytest
import torch
from shared_data import SHARED, load_case, with_our_kafs
from torch import Tensor, nn

import certify
from analysis.protocol import Protocol
from analysis.sandwich import RadiusPair, Sandwich, sandwich
from certify.attacks import APGD, FMN, PGD, Ensemble
from certify.errors import InvalidInput, SoundnessAlarm
from models import mlp

RADII = (Fraction(1, 50), Fraction(1, 10), Fraction(1, 5))


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few steps: the order of the layers does not depend on their number."""
    few = Ensemble(attacks=(APGD(steps=15), FMN(steps=15)))
    monkeypatch.setattr("analysis.sandwich.Ensemble", lambda attacks=few.attacks: Ensemble(attacks=attacks))


def _problem(n: int = 40) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(3)
    model = mlp([6, 12, 4]).eval()
    x = torch.rand(n, 6)
    with torch.no_grad():
        y = model(x).argmax(1)
    y[::5] = (y[::5] + 1) % 4
    return model, x, y


def _asked(**options: Any) -> Protocol:
    return Protocol(radii=RADII, attack=PGD(steps=5), **options)


@pytest.mark.parametrize("p", [1, 2, torch.inf])
def test_each_layer_lies_within_the_one_before(p: float) -> None:
    model, x, y = _problem()
    found = sandwich("net", model, x, y, _asked(methods=("ibp", "crown"), p=p), index=torch.arange(40) + 7)
    for place in range(len(RADII)):
        counts = [rate.count for rate in found.layers(place)]
        assert counts == sorted(counts, reverse=True)
        for one, all_ in zip(found.first.samples, found.last.samples, strict=True):
            assert one.outcomes[place].attacked <= all_.outcomes[place].attacked
    assert found.first.clean == found.last.clean
    assert [pair.index for pair in found.pairs] == [s.index for s in found.last.samples if s.correct]
    for pair in found.pairs:
        assert pair.adversarial is not None, "in the whole data range everything falls"
        assert 0 <= pair.certified <= pair.adversarial
    assert Sandwich.from_dict(found.to_dict()) == found


def test_radii_are_those_of_prove_and_of_the_affine_distance() -> None:
    """On an affine network proof and attack meet at the exact distance."""
    torch.manual_seed(0)
    model = nn.Linear(5, 2).eval()
    x = torch.rand(20, 5) * 0.2 + 0.4
    y = model(x).argmax(1)
    found = sandwich("affine", model, x, y, _asked(methods=("crown",), clip=None), index=torch.arange(20))
    with torch.no_grad():
        rows = model(x)
        slope = (model.weight[0] - model.weight[1]).abs().sum()
        exact = ((rows[:, 0] - rows[:, 1]).abs() / slope).tolist()
    for pair, distance in zip(found.pairs, exact, strict=True):
        assert pair.certified <= distance * (1 + 1e-5)
        assert pair.certified >= 0.98 * distance - 1e-4
        assert pair.adversarial is not None
        assert distance * (1 - 1e-5) <= pair.adversarial <= 1.05 * distance + 1e-3


class _Liar:
    """A method that certifies everything."""

    name = "liar"

    def bound(self, graph: object, domain: object, spec: certify.Spec, arithmetic: object) -> Tensor:
        return torch.ones_like(spec.d, dtype=torch.float64)


def test_a_planted_unsound_bound_raises_an_alarm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(certify.registry.METHODS, "liar", _Liar)
    model, x, y = _problem()
    with pytest.raises(SoundnessAlarm) as caught:
        sandwich("net", model, x, y, _asked(methods=("liar",)), index=torch.arange(40))
    assert caught.value.exit_code == 6


def test_a_planted_unsound_radius_raises_an_alarm(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x, y = _problem()
    everything = torch.full((1,), 0.9, dtype=torch.float64)
    monkeypatch.setattr("analysis.sandwich.certified_radius", lambda m, x, *_, **__: everything.expand(len(x)))
    with pytest.raises(SoundnessAlarm, match=r"certified up to 0\.9"):
        sandwich("net", model, x, y, _asked(), index=torch.arange(40))


def test_the_nearest_example_is_that_of_all_attacks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where FMN finds none: what broke at a radius lies within it."""
    monkeypatch.setattr(FMN, "search", lambda _, __, domain, *___: domain.center)
    model, x, y = _problem()
    found = sandwich("net", model, x, y, _asked(methods=("ibp",)), index=torch.arange(40))
    fell = 0
    for sample, pair in zip((s for s in found.last.samples if s.correct), found.pairs, strict=True):
        broken = [float(outcome.radius) for outcome in sample.outcomes if outcome.attacked]
        fell += bool(broken)
        assert pair.adversarial is None if not broken else pair.adversarial <= broken[0] * (1 + 1e-6)
        held = [float(outcome.radius) for outcome in sample.outcomes if outcome.verdict == "holds"]
        assert pair.certified >= max(held, default=0.0) * (1 - 1e-12)
    assert fell > 5


def test_what_the_first_attack_broke_alone_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Ensemble, "search", lambda _, __, domain, *___: domain.center)
    model, x, y = _problem()
    found = sandwich("net", model, x, y, _asked(methods=("ibp",)), index=torch.arange(40))
    fell = [s.outcomes[-1].attacked for s in found.first.samples if s.correct]
    assert [s.outcomes[-1].attacked for s in found.last.samples if s.correct] == fell
    assert sum(fell) > 5
    monkeypatch.setitem(certify.registry.METHODS, "liar", _Liar)
    with pytest.raises(SoundnessAlarm, match="certified up to"):
        sandwich("net", model, x, y, _asked(methods=("liar",)), index=torch.arange(40))


def test_a_network_that_is_always_wrong_has_no_pairs() -> None:
    model, x, _ = _problem()
    with torch.no_grad():
        wrong = (model(x).argmax(1) + 1) % 4
    found = sandwich("net", model, x, wrong, _asked(methods=("ibp",)), index=torch.arange(40))
    assert found.pairs == ()
    assert [rate.count for rate in found.layers(0)] == [0, 0, 0, 0]


def test_a_comparison_needs_a_proof() -> None:
    model, x, y = _problem()
    with pytest.raises(InvalidInput, match="bound methods"):
        sandwich("net", model, x, y, _asked(methods=()), index=torch.arange(40))
    assert RadiusPair.from_dict(RadiusPair(1, 0.5, None).to_dict()) == RadiusPair(1, 0.5, None)


NETS = {
    "mnist_6x100_nat": (Fraction(13, 500), 8),
    "mnist_cnn_a_adv": (Fraction(3, 10), 4),
    "mnist_fc_256x2": (Fraction(3, 100), 8),
    "cifar_cnn_a_adv": (Fraction(2, 255), 4),
    "cifar_conv_small_sigmoid": (Fraction(2, 255), 4),
    "cifar_resnet2b": (Fraction(2, 255), 2),
    "mnist_kaf_2x32": (Fraction(1, 100), 8),
}


@pytest.mark.slow
@pytest.mark.shared
@pytest.mark.skipif(SHARED is None, reason="the reference networks (../shared/data) are absent")
@pytest.mark.parametrize("name", NETS)
def test_no_alarm_on_the_reference_networks(name: str) -> None:
    radius, images = NETS[name]
    net, x, y, _ = load_case(name)
    model = with_our_kafs(net)
    asked = Protocol(radii=(radius / 2, radius), methods=("ibp", "crown"), attack=PGD(steps=10))
    found = sandwich(name, model, x[:images], y[:images], asked, index=torch.arange(images))
    for place in range(2):
        counts = [rate.count for rate in found.layers(place)]
        assert counts == sorted(counts, reverse=True)
