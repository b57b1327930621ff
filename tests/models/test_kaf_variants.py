"""Variants of the KAF: kernels, ridge terms, linear tails and published weights, each against its definition."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import certify
from certify.errors import InvalidInput, UnsupportedOperation
from certify.graph import trace
from certify.testing import check_activation
from models import KAF, KAFFacts, curvature_penalty, from_authors, fuse, mlp, slope_penalty
from models.kaf_tails import TailedFacts
from models.kernels import KERNELS, kernel_sum
from models.ridge import TERMS, ridge_fit

DEFINITIONS = {
    "gaussian": lambda s, d, g: math.exp(-g * (s - d) ** 2),
    "laplacian": lambda s, d, g: math.exp(-g * abs(s - d)),
    "softplus": lambda s, d, g: math.log1p(math.exp(s - d)),
    "relu": lambda s, d, g: max(0.0, s - d),
    "polynomial": lambda s, d, g: (1 + s * d) ** 2,
}


@pytest.mark.parametrize("name", KERNELS)
def test_kernels_are_their_definitions(name: str) -> None:
    torch.manual_seed(0)
    kaf = KAF(3, size=5, kernel=name).double()
    alpha, dictionary, gamma = (value.detach() for value in kaf.gaussian())
    x = 2 * torch.randn(4, 3, 2, dtype=torch.float64)
    expected = torch.zeros_like(x)
    for n, c, i in torch.cartesian_prod(torch.arange(4), torch.arange(3), torch.arange(2)).tolist():
        for weight, d in zip(alpha[c].tolist(), dictionary.tolist(), strict=True):
            expected[n, c, i] += weight * DEFINITIONS[name](float(x[n, c, i]), d, float(gamma))
    torch.testing.assert_close(kaf(x).detach(), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["gaussian", "laplacian", "softplus", "polynomial"])
def test_kernel_sums_are_differentiable_twice(name: str) -> None:
    torch.manual_seed(1)
    alpha, x = torch.randn(2, 3, dtype=torch.float64), torch.randn(2, 2, 2, dtype=torch.float64)
    d, gamma = torch.tensor([-1.0, 0.2, 0.9], dtype=torch.float64), torch.tensor(0.6, dtype=torch.float64)
    inputs = tuple(value.requires_grad_() for value in (x, alpha, d, gamma))

    def f(*values: Tensor) -> Tensor:
        return kernel_sum(KERNELS[name], *values)

    assert torch.autograd.gradcheck(f, inputs)
    assert torch.autograd.gradgradcheck(f, inputs)


def test_other_kernels_keep_only_their_input_for_the_backward_pass() -> None:
    kaf, x, kept = KAF(4, size=20, kernel="softplus"), torch.randn(8, 4, 10, 10, requires_grad=True), {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.update({t.data_ptr(): t.numel()}) or t, lambda t: t):
        kaf(x)
    assert sum(kept.values()) <= x.numel() + 2 * kaf.alpha.numel() + 3 * 20


def test_other_kernels_are_refused_by_name() -> None:
    model = nn.Sequential(nn.Linear(3, 4), KAF(4, kernel="softplus")).eval()
    with pytest.raises(UnsupportedOperation, match="softplus") as error:
        certify.bounds(model, certify.LpBall(torch.rand(1, 3), 0.1))
    assert len(str(error.value).splitlines()) == 3
    assert "no certified facts" in repr(model)
    with pytest.raises(InvalidInput, match="kernel"):
        KAF(3, kernel="magic")


def test_a_fit_reports_its_conditioning_error_and_mass() -> None:
    kaf = KAF(2, init="elu")
    fit = kaf.fit
    assert fit is not None
    d, gamma = kaf.dictionary.double(), kaf.gamma.double()
    system = torch.exp(-gamma * (d[:, None] - d) ** 2) + 1e-6 * torch.eye(20)
    singular = torch.linalg.svdvals(system)
    assert fit.condition == pytest.approx(float(singular[0] / singular[-1]), rel=1e-6)
    assert 1e5 < fit.condition < 1e6  # the paper's dictionary
    torch.testing.assert_close(system @ fit.alpha, F.elu(d), rtol=0, atol=1e-9)
    s = torch.linspace(-3, 3, 997)[:, None].expand(-1, 2)
    assert float((kaf(s).detach() - F.elu(s)).abs().max()) <= fit.error + 1e-4
    assert fit.mass == pytest.approx(float(kaf.alpha[0].detach().double().abs().sum()), rel=1e-4)
    assert KAF(2).fit is None


@pytest.mark.parametrize("target", ["elu", "silu", "tanh"])
def test_the_automatic_ridge_keeps_alpha_small_by_its_rule(target: str) -> None:
    auto, published = KAF(1, init=target, ridge="auto").fit, KAF(1, init=target).fit
    assert auto is not None
    assert published is not None
    assert auto.mass < published.mass / 5
    kaf = KAF(1, init=target)
    errors = {}
    for ridge in TERMS:
        errors[ridge] = KAF(1, init=target, ridge=ridge).fit.error
    limit = max(0.06, 2 * min(errors.values()))
    assert auto.ridge == max(ridge for ridge, error in errors.items() if error <= limit)
    assert auto.error <= limit
    del kaf


def test_singular_systems_and_bad_terms_are_refused() -> None:
    with pytest.raises(InvalidInput, match="condition"):
        KAF(2, kernel="relu", init="elu")
    for ridge in (-1.0, math.nan, "much"):
        with pytest.raises(InvalidInput, match="ridge"):
            KAF(2, init="elu", ridge=ridge)
    d = torch.tensor([0.0, 0.0, 1.0])
    with pytest.raises(InvalidInput, match="condition"):
        ridge_fit(torch.sin, d, torch.tensor(1.0), 0.0, KERNELS["gaussian"])


def tailed(init: str = "random", channels: int = 3) -> KAF:
    torch.manual_seed(2)
    return KAF(channels, init=init, tails="linear")


def test_tails_continue_value_and_slope() -> None:
    kaf = tailed().double()
    plain = copy.deepcopy(kaf)
    plain.tails = "fall"
    inside = torch.linspace(-3, 3, 101, dtype=torch.float64)[:, None].expand(-1, 3)
    torch.testing.assert_close(kaf(inside), plain(inside), rtol=0, atol=1e-14)
    for end in (-3.0, 3.0):
        e = torch.full((1, 3), end, dtype=torch.float64, requires_grad=True)
        y = plain(e)
        (slope,) = torch.autograd.grad(y.sum(), e)
        for away in (1e-9, 0.5, 40.0, 1e6):
            s = e.detach() + math.copysign(away, end)
            torch.testing.assert_close(kaf(s), y.detach() + slope * (s - e.detach()), rtol=1e-12, atol=1e-12)


def test_tails_are_computed_in_float32_under_autocast() -> None:
    kaf, x = KAF(4, init="elu", tails="linear", convention="authors"), torch.linspace(-8, 8, 100).expand(4, -1).t()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = kaf(x)
    assert torch.equal(low, kaf(x))


def test_tails_have_the_right_first_and_second_derivatives_everywhere() -> None:
    kaf = KAF(2, size=6, tails="linear").double()
    x = torch.tensor([[-5.0, -2.9], [0.3, 2.2], [3.4, 9.0]], dtype=torch.float64, requires_grad=True)

    def f(x: Tensor, alpha: Tensor) -> Tensor:
        return torch.func.functional_call(kaf, {"alpha": alpha}, (x,))

    inputs = x, kaf.alpha.detach().clone().requires_grad_()
    assert torch.autograd.gradcheck(f, inputs)
    assert torch.autograd.gradgradcheck(f, inputs)
    end = torch.full((1, 2), 3.0, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(kaf(end).sum(), end)
    torch.testing.assert_close(slope[0], kaf.end_slopes()[1].detach())


@pytest.mark.parametrize(("facts", "channels"), TailedFacts.examples())
def test_tailed_facts_are_sound(facts: TailedFacts, channels: int) -> None:
    check_activation(facts, channels)


def test_tailed_ranges_are_attained() -> None:
    kaf = tailed("elu").eval().double()
    facts = TailedFacts(KAFFacts(kaf, None, 1))
    low = 5 * torch.randn(300, 3, dtype=torch.float64)
    z = certify.Interval(low, low + 5 * torch.rand(300, 3, dtype=torch.float64))
    s = z.lower + torch.linspace(0, 1, 8001, dtype=torch.float64).view(-1, 1, 1) * z.width
    y, found, slopes = facts.forward(s.flatten(0, 1)).view(s.shape), facts.range(z), facts.slope_range(z)
    torch.testing.assert_close(y, kaf(s.flatten(0, 1)).detach().view(s.shape), rtol=1e-9, atol=1e-9)
    assert bool(((y >= found.lower) & (y <= found.upper)).all())
    torch.testing.assert_close(found.lower, y.amin(0), rtol=0, atol=1e-4)
    torch.testing.assert_close(found.upper, y.amax(0), rtol=0, atol=1e-4)
    steep = y.diff(dim=0) / (z.width / 8000)
    assert bool((steep.amin(0) >= slopes.lower - 1e-6).all())
    assert bool((steep.amax(0) <= slopes.upper + 1e-6).all())
    torch.testing.assert_close(slopes.upper, steep.amax(0), rtol=0, atol=1e-2)
    line = certify.Interval(torch.full((1, 3), -torch.inf).double(), torch.full((1, 3), torch.inf).double())
    assert bool((facts.range(line).upper == torch.inf).all())
    assert bool(torch.isfinite(facts.slope_range(line).magnitude).all())


def test_tails_tame_the_slopes_of_a_fitted_kaf() -> None:
    """A fitted KAF falls off a cliff outside its dictionary (slope -3.4); its tangents do not."""
    line = certify.Interval(torch.full((1, 1), -torch.inf), torch.full((1, 1), torch.inf))
    slopes = []
    for tails in ("fall", "linear"):
        graph = trace(KAF(1, init="elu", tails=tails).eval(), torch.zeros(1, 1))
        slopes.append(float(graph.nodes[graph.output].rule.facts.slope_range(line).magnitude))
    assert slopes[0] > 3
    assert slopes[1] < 1.5


def test_networks_with_tails_are_certified_trained_and_penalised() -> None:
    torch.manual_seed(3)
    model = mlp([4, 8, 8, 3], lambda channels: KAF(channels, init="elu", ridge="auto", tails="linear"))
    x = 4 * torch.rand(6, 4)
    ball, spec = certify.LpBall(x, 0.5), certify.class_margins(torch.zeros(6, dtype=torch.long), 3)
    with torch.no_grad():
        model.linear1.weight.mul_(4)  # pre-activations beyond the dictionary
    for method in ("ibp", "crown", "alpha-crown"):
        found = certify.bounds(model.eval(), ball, method)
        for points in ball.sample(50, torch.Generator().manual_seed(0)):
            y = model(points).detach()
            assert bool(((y >= found.lower) & (y <= found.upper)).all())
    for method in ("ibp", "crown-ibp"):
        model.zero_grad()
        margins = certify.training_margins(model, ball, spec, method)
        assert bool((margins <= spec.rows(model(x)) + 1e-4).all())
        margins.sum().backward()
        assert float(model.act1.alpha.grad.abs().max()) > 0
    assert float((slope_penalty(model) + curvature_penalty(model)).detach()) > 0
    assert certify.lipschitz_constant(model, input_shape=(4,)).value > 0


def test_gradients_of_training_bounds_with_tails_are_those_of_differences() -> None:
    torch.manual_seed(4)
    model = mlp([3, 5, 3], lambda channels: KAF(channels, init="tanh", tails="linear")).double()
    x = 6 * torch.rand(4, 3, dtype=torch.float64) - 3
    spec = certify.class_margins(torch.zeros(4, dtype=torch.long), 3, torch.float64)

    def value() -> Tensor:
        return certify.training_margins(model, certify.LpBall(x, 0.3), spec, "ibp").sum()

    value().backward()
    found, alpha = model.act1.alpha.grad.clone(), model.act1.alpha
    for index in ((0, 3), (2, 10), (4, 19)):
        values = []
        for step in (1e-5, -1e-5):
            with torch.no_grad():
                alpha[index] += step
                values.append(float(value()))
                alpha[index] -= step
        assert float(found[index]) == pytest.approx((values[0] - values[1]) / 2e-5, rel=1e-3, abs=1e-3)


def test_tails_with_a_base_or_another_kernel_are_refused() -> None:
    for options in ({"base": nn.ReLU()}, {"kernel": "relu"}):
        with pytest.raises(InvalidInput, match="linear tails"):
            KAF(2, tails="linear", **options)
    with pytest.raises(InvalidInput, match="tails"):
        KAF(2, tails="curly")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_tails_of_a_fused_kaf_are_the_same() -> None:
    kaf = tailed()
    twin = fuse(copy.deepcopy(kaf))
    x = torch.linspace(-9, 9, 301)[:, None].expand(-1, 3)
    torch.testing.assert_close(twin(x), kaf(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(1, 3, 20), (1, 3, 1, 1, 20)])
def test_published_layers_are_loaded(shape: tuple[int, ...]) -> None:
    torch.manual_seed(5)
    alpha, points = torch.randn(shape), torch.linspace(-4, 4, 20)
    kaf = from_authors({"alpha": alpha, "dict": points.view(*[1] * (len(shape) - 1), 20)})
    x = torch.randn(7, 3)
    step = 8 / 19
    kernel = torch.exp(-(x[..., None] - points).square() / (8 * step**2))
    torch.testing.assert_close(kaf(x).detach(), (kernel * alpha.view(3, 20)).sum(-1), rtol=1e-4, atol=1e-4)
    wide = from_authors({"alpha": alpha, "dict": points, "gamma": torch.tensor(0.5)})
    assert float(wide.gamma) == 0.5


@pytest.mark.parametrize(
    "state",
    [
        {"alpha": torch.zeros(1, 3, 20)},
        {"alpha": torch.zeros(3, 20), "dict": torch.linspace(-4, 4, 20)},
        {"alpha": torch.zeros(1, 3, 19), "dict": torch.linspace(-4, 4, 20)},
        {"alpha": torch.zeros(1, 3, 2, 1, 20), "dict": torch.linspace(-4, 4, 20)},
        {"alpha": torch.zeros(1, 3, 20), "dict": torch.zeros(20)},
    ],
)
def test_layers_that_are_none_are_refused(state: dict) -> None:
    with pytest.raises(InvalidInput) as error:
        from_authors(state)
    assert len(str(error.value).splitlines()) <= 3
