"""Convex certificates: below what is attained, ordered as theory says, and never the solver's word."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch
from random_nets import random_net
from torch import nn

from certify import CROWN, Box, LpBall, Spec, Verdict, class_margins, prove
from certify.attacks import PGD
from certify.bounding import prepare
from certify.convex import semidefinite
from certify.convex.expansion import in_float64
from certify.convex.lp import LP
from certify.convex.margin import LipschitzMargin
from certify.convex.semidefinite import SemidefiniteProgram
from certify.convex.wong_kolter import WongKolter
from certify.errors import CertifyError, InvalidInput, UnsupportedOperation
from certify.propagate.drift import output_drift
from certify.registry import METHODS as METHODS_KNOWN
from certify.results import LipschitzEstimate
from certify.rounding import FloatAnyOrder, Real
from models import mlp

METHODS = ("wong-kolter", "lp", "sdp", "lipschitz")


def _lower(model: nn.Module, domain, spec: Spec, method, arithmetic: str = "real") -> torch.Tensor:
    graph = prepare(model, domain)
    semantics = Real() if arithmetic == "real" else FloatAnyOrder(graph.dtype)
    with torch.no_grad():
        return (CROWN() if method == "crown" else method).bound(graph, domain, spec, semantics)


def _every_output(model: nn.Module, x: torch.Tensor) -> Spec:
    outputs = model(x).flatten(1).shape[1]
    eye = torch.eye(outputs, dtype=x.dtype)
    C = torch.cat([eye, -eye]).expand(len(x), -1, -1)
    return Spec(C, torch.zeros(C.shape[:2], dtype=x.dtype))


@pytest.mark.parametrize("seed", range(24))
def test_no_float_execution_is_below_a_bound(seed: int) -> None:
    model, shape = random_net(seed)
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(2, *shape, generator=generator)
    p = (torch.inf, 2, 1)[seed % 3]
    domain = LpBall(x, 0.05 * (1 + seed % 4), p=p) if seed % 4 else Box(x - 0.1, x + 0.05)
    spec = _every_output(model, x)
    points = [domain.sample(200, generator), domain.center[None]]
    with torch.no_grad():
        rows = torch.cat([torch.stack([spec.rows(model(point)) for point in part]) for part in points]).amin(0)
    for method in (WongKolter(), LP(), LipschitzMargin("product"), LipschitzMargin("crown-jacobian")):
        try:
            lower = _lower(model, domain, spec, method, "float")
        except UnsupportedOperation:
            assert any(isinstance(module, nn.MaxPool2d) for module in model.modules())
            continue
        assert bool((lower <= rows).all())
        assert bool(torch.isfinite(lower).all())


@pytest.mark.parametrize("act", ["relu", "tanh", "kaf", "leaky_relu"])
def test_programs_stand_between_lines_and_attacks(act: str) -> None:
    torch.manual_seed(1)
    model = mlp((4, 7, 6, 3), act).eval()
    x = torch.randn(13, 4)
    domain = LpBall(x, 0.3)
    spec = class_margins(model(x).argmax(1), 3)
    crown = _lower(model, domain, spec, "crown")
    program = _lower(model, domain, spec, LP(intervals="crown"))
    dual = _lower(model, domain, spec, WongKolter(intervals="crown"))
    attack = PGD(steps=20, restarts=2)(model, domain, spec, generator=torch.Generator().manual_seed(0))
    assert bool((crown <= program + 1e-6).all())
    assert bool((dual <= program + 1e-6).all())
    assert bool((program <= attack.margin + 1e-5).all())
    assert float((program - crown).max()) > 1e-3


@pytest.mark.parametrize("seed", range(8))
def test_floats_drift_no_farther_than_stated(seed: int) -> None:
    model, shape = random_net(seed)
    generator = torch.Generator().manual_seed(seed)
    domain = LpBall(torch.rand(2, *shape, generator=generator), 0.2)
    graph = prepare(model, domain)
    with torch.no_grad():
        knowledge = CROWN().learn(graph, domain, FloatAnyOrder(torch.float32))
        drift = output_drift(knowledge)
        real = in_float64(graph)
        for point in domain.sample(50, generator):
            exact = real.forward(point.double())[real.output].flatten(1)
            assert bool(((model(point).double().flatten(1) - exact).abs() <= drift).all())
        assert bool((output_drift(CROWN().learn(graph, domain, Real())) == 0).all())


@pytest.mark.parametrize("act", ["relu", "leaky_relu", "tanh", "kaf"])
def test_a_semidefinite_bound_is_below_what_is_met_and_above_lines(act: str) -> None:
    torch.manual_seed(6)
    model = mlp((3, 5, 4, 3), act).eval()
    x = torch.randn(2, 3)
    domain = LpBall(x, 0.4)
    spec = class_margins(model(x).argmax(1), 3)
    found = _lower(model, domain, spec, SemidefiniteProgram(), "float")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        met = torch.stack([spec.rows(model(point)) for point in domain.sample(3000, generator)]).amin(0)
    assert bool((found <= met).all())
    crown = _lower(model, domain, spec, "crown")
    assert bool((found >= crown - 0.02 * (1 + crown.abs())).all())
    if act == "relu":
        assert float((found - crown).max()) > 1e-3


def test_semidefinite_multipliers_of_any_size_give_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(7)
    model = mlp((2, 4, 2), "relu").eval()
    x = torch.randn(1, 2)
    domain = LpBall(x, 0.5)
    spec = class_margins(model(x).argmax(1), 2)
    best = _lower(model, domain, spec, SemidefiniteProgram())
    propose, generator = semidefinite.propose, torch.Generator().manual_seed(0)
    with torch.no_grad():
        met = torch.stack([spec.rows(model(point)) for point in domain.sample(2000, generator)]).amin(0)
    for scale in (1e-3, 0.3, 30.0):

        def noisy(*args, s=scale):
            ranges, multipliers, level = propose(*args)
            noise = [s * torch.randn(part.shape, generator=generator).double() for part in (ranges, multipliers)]
            return ranges + noise[0], multipliers + noise[1], level + s

        monkeypatch.setattr(semidefinite, "propose", noisy)
        worse = _lower(model, domain, spec, SemidefiniteProgram())
        assert bool((worse <= best + 1e-6).all())
        assert bool((worse <= met).all())
    monkeypatch.setattr(semidefinite, "propose", lambda *_: None)
    assert bool((_lower(model, domain, spec, SemidefiniteProgram()) == -torch.inf).all())


def test_lipschitz_margins_prove_small_balls() -> None:
    torch.manual_seed(4)
    model = mlp((4, 8, 3), "relu").eval()
    x = torch.randn(6, 4)
    labels = model(x).argmax(1)
    spec = class_margins(labels, 3)
    for p in (torch.inf, 2, 1):
        found = prove(model, LpBall(x, 1e-3, p=p), spec, "lipschitz")
        assert Verdict.HOLDS in found.verdicts
    with pytest.raises(UnsupportedOperation, match="lower"):
        prove(model, LpBall(x, 1e-3), spec, LipschitzMargin("jacobian"))


@dataclass(frozen=True)
class _Liar:
    """Claims a constant that is too small."""

    rows: tuple[tuple[float, ...], ...] = field(default=())

    def estimate(self, question):
        batch, count = question.spec.C.shape[:2]
        return LipschitzEstimate(0.0, "upper", "liar", question.p, {}, ((0.0,) * count,) * batch)


def test_a_constant_of_zero_gives_the_value_at_the_centre() -> None:
    torch.manual_seed(5)
    model = mlp((4, 8, 3), "relu").double().eval()
    x = torch.randn(2, 4).double()
    spec = class_margins(torch.tensor([0, 1]), 3, dtype=torch.float64)
    lower = _lower(model, LpBall(x, 0.5), spec, LipschitzMargin(_Liar()))
    rows = spec.rows(model(x)).detach()
    assert bool((lower <= rows).all())
    torch.testing.assert_close(lower, rows, rtol=1e-9, atol=1e-9)


def test_what_is_too_large_or_unknown_is_refused() -> None:
    wide = mlp((4, 2500, 2), "relu").eval()
    domain = LpBall(torch.zeros(1, 4), 0.1)
    spec = class_margins(torch.tensor([0]), 2)
    with pytest.raises(UnsupportedOperation, match="2,500 hidden neurons"):
        _lower(wide, domain, spec, LP())
    with pytest.raises(UnsupportedOperation, match="2500 hidden neurons"):
        _lower(wide, domain, spec, SemidefiniteProgram())
    with pytest.raises(UnsupportedOperation, match="inputs"):
        _lower(mlp((600, 3, 2)).eval(), LpBall(torch.zeros(1, 600), 0.1), spec, SemidefiniteProgram())
    pool = nn.Sequential(nn.Conv2d(1, 2, 3), nn.MaxPool2d(2), nn.ReLU(), nn.Flatten(), nn.Linear(2, 2)).eval()
    with pytest.raises(UnsupportedOperation, match="MaxPool2d at '1'"):
        _lower(pool, LpBall(torch.zeros(1, 1, 4, 4), 0.1), spec, SemidefiniteProgram())
    with pytest.raises(InvalidInput, match="which has none"):
        _lower(mlp((4, 3, 2)).eval(), domain, spec, LP(intervals="lp"))
    assert issubclass(UnsupportedOperation, CertifyError)
    assert set(METHODS) <= set(METHODS_KNOWN)


def test_what_explodes_proves_nothing() -> None:
    model = mlp((2, 3, 3, 2), "relu").eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.fill_(1e12)
    domain = LpBall(torch.ones(1, 2), 1e20)
    claim = class_margins(torch.tensor([0]), 2)
    for method in (LP(), WongKolter(), SemidefiniteProgram(), LipschitzMargin()):
        assert not bool((_lower(model, domain, claim, method) > 0).any())


def test_a_fill_is_the_number_that_the_network_pads_with() -> None:
    class Padded(nn.Module):
        def forward(self, x):
            return nn.functional.pad(x, (1, 1), value=0.1) * 2

    x = torch.zeros(1, 3)
    graph = prepare(Padded().eval(), LpBall(x, 0.1))
    twin = in_float64(graph)
    assert float(twin.forward(x.double())[twin.output][0, 0]) == 2 * float(torch.tensor(0.1))
