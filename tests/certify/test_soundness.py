"""Every bound holds, without any slack, for every float execution at every point that we can think of."""

from fractions import Fraction

import pytest
import torch
from references import points
from strategies import FAMILIES, Function, affine, cancelling, convolutional, dense, domains, inputs, random_graph
from torch import nn
from zero_slack import ALPHA, check_bounds

import certify
import models
from certify.graph import trace
from certify.rounding import FloatAnyOrder

RADII = (0.0, 1e-9, 1e-3, 0.1, 1.0)
QUICK = [name for name in FAMILIES if not name.startswith(("images", "deep kaf"))]


def _check(name, dtype, radius, kinds, *, seed=0, count=1):
    build, shape = FAMILIES[name]
    methods = ("crown", ("ibp", ALPHA, "crown-ibp")[list(FAMILIES).index(name) // 2 % 3])
    model, x = build(seed=seed).to(dtype), inputs(shape, dtype=dtype, seed=seed)
    for kind, domain in domains(x, radius).items():
        if kind in kinds:
            tally = check_bounds(model, domain, methods, seed=seed, count=count, orders=1)
            assert tally.checks > 1000
            assert tally.violations == 0, (kind, radius, tally.examples[:5])


@pytest.mark.parametrize("name", QUICK)
def test_bounds_hold_for_every_float32_execution(name):
    index = list(FAMILIES).index(name)
    _check(name, torch.float32, RADII[index % 5], ("linf", "box") if index % 2 else ("l2", "l1"))
    _check(name, torch.float32, RADII[(index + 1) % 5], ("linf",), seed=1)


@pytest.mark.parametrize("name", QUICK)
def test_bounds_hold_for_every_float64_execution(name):
    index = list(FAMILIES).index(name)
    _check(name, torch.float64, RADII[(index + 2) % 5], ("linf", "box") if index % 2 else ("l2", "l1"))


@pytest.mark.slow
@pytest.mark.parametrize("radius", RADII)
@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in QUICK])
def test_image_networks_and_deep_kafs(name, radius):
    _check(name, (torch.float32, torch.float64)[RADII.index(radius) % 2], radius, ("linf", "l2"))


@pytest.mark.slow
def test_random_graphs():
    for seed in range(30):
        dtype, radius = (torch.float32, torch.float64)[seed % 2], RADII[seed % 5]
        model, x = random_graph(seed=100 + seed).to(dtype), inputs((6,), dtype=dtype, seed=seed)
        domain = list(domains(x, radius).values())[seed % 4]
        tally = check_bounds(model, domain, seed=seed, count=1, orders=1)
        assert tally.violations == 0, (seed, tally.examples[:5])


def test_naive_rounding_would_fail_these_checks():
    """The checks can see rounding: real-arithmetic bounds of a network at radius 0 are broken by its own outputs."""
    broken = 0
    for seed in range(5):
        model, x = dense("relu", seed=seed), inputs((6,), batch=20, seed=seed)
        found = certify.bounds(model, certify.LpBall(x, 0.0), "ibp", arithmetic="real")
        y = torch.cat([model(sample) for sample in x.split(1)]).detach()
        broken += int(((y < found.lower) | (y > found.upper)).any(1).sum())
    assert broken > 20


def test_exact_rational_execution_lies_within_the_bounds():
    """The real-number network lies inside too: evaluated with fractions, at radius 0."""
    for model in (affine(4, 3), cancelling()):
        layers = [layer for layer in model if isinstance(layer, nn.Linear)]
        x = inputs((layers[0].in_features,), batch=1)
        values = [Fraction(value) for value in x[0].tolist()]
        for layer in layers:
            rows = zip(layer.weight.tolist(), layer.bias.tolist(), strict=True)
            values = [sum(Fraction(w) * v for w, v in zip(row, values, strict=True)) + Fraction(b) for row, b in rows]
            if layer is not layers[-1] and any(isinstance(module, nn.ReLU) for module in model):
                values = [max(value, Fraction(0)) for value in values]
        for method in ("ibp", "crown-ibp", "crown"):
            found = certify.bounds(model, certify.LpBall(x, 0.0), method)
            for value, low, high in zip(values, found.lower[0].tolist(), found.upper[0].tolist(), strict=True):
                assert Fraction(low) <= value <= Fraction(high)


def _lines_of_every_node(model, domain):
    """The real function of every node stays between the lines that the engine made for it."""
    from certify.propagate.methods import CROWN

    graph = trace(model, domain.center)
    knowledge = CROWN().learn(graph, domain, FloatAnyOrder(domain.center.dtype))
    for node in graph.nodes.values():
        relaxation = knowledge.relaxation(node)
        if relaxation is None or relaxation.lower_slope.ndim > domain.center.ndim:
            continue
        (z,) = knowledge.inputs(node)
        for t in torch.linspace(0, 1, 41, dtype=torch.float64):
            s = (z.lower.double() + t * (z.upper.double() - z.lower.double())).clamp(z.lower, z.upper)
            y = node.rule.forward(s)
            slack = 1e-12 * (1 + y.abs()) + node.rule.rounding_error(z.double())
            low = relaxation.lower_slope.double() * s + relaxation.lower_offset.double()
            high = relaxation.upper_slope.double() * s + relaxation.upper_offset.double()
            assert bool((low <= y + slack).all())
            assert bool((y <= high + slack).all())


@pytest.mark.parametrize("name", ["dense kaf-based", "dense kaf-elu", "dense elu", "saturated gelu", "graph 3"])
def test_lines_of_a_network_enclose_its_activations(name):
    build, shape = FAMILIES[name]
    for radius in (1e-3, 0.1, 1.0):
        _lines_of_every_node(build(), domains(inputs(shape), radius)["linf"])


def test_a_kink_in_a_kafs_base_is_no_smooth_point():
    """At the kink of an ELU base f'' jumps from a to 0: a concave kernel sum must not borrow the left one."""
    for alpha, height in ((1.0, 3.0), (5.0, 6.0), (20.0, 20.0)):
        kaf = models.KAF(1, size=5, gamma=0.3, base=nn.ELU(alpha)).eval()
        with torch.no_grad():
            kaf.alpha.copy_(torch.tensor([[0.0, 0.0, height, 0.0, 0.0]]))  # concave around 0
        facts = trace(kaf, torch.zeros(1, 1)).nodes["model"].rule.facts
        for low, high in ((0.0, 0.2), (-0.1, 0.4), (0.0, 2.0), (-1.0, 1.0)):
            z = certify.Interval(*(torch.full((1, 1), end, dtype=torch.float64) for end in (low, high)))
            s = torch.linspace(low, high, 4001, dtype=torch.float64).view(-1, 1)
            y = kaf.double()(s).detach()
            found, r = facts.range(z), facts.relax(z)
            assert float(y.max()) <= float(found.upper) + 1e-12
            assert float(y.min()) >= float(found.lower) - 1e-12
            assert bool((y <= r.upper_slope * s + r.upper_offset + 1e-12).all())
            assert bool((y >= r.lower_slope * s + r.lower_offset - 1e-12).all())


def test_clamps_with_limits_that_no_float_holds():
    generator = torch.Generator().manual_seed(0)
    model = Function(lambda x: (1000 * x).clamp(min=0.1) - (700 * x).clamp(-0.3, 500.7) + x.clamp(max=0.7)).eval()
    for dtype in (torch.float32, torch.float64):
        x = torch.rand(50, 2, generator=generator, dtype=dtype)
        for radius in (0.0, 1e-9, 1e-3):
            domain = certify.LpBall(x, radius)
            found = [certify.bounds(model, domain, method) for method in ("ibp", "crown")]
            for point in points(domain, generator, 3):
                y = model(point)
                assert all(bool(((y >= z.lower) & (y <= z.upper)).all()) for z in found)


def test_overflow_knows_nothing():
    """Sums beyond the largest float must not turn into lower ends of +inf."""
    huge = Function(lambda x: ((x * 1e-3 + 3e38) * 1e-38) * 1.0).eval()
    x = torch.rand(2, 3)
    for method in ("ibp", "crown-ibp", "crown"):
        found = certify.bounds(huge, certify.LpBall(x, 0.1), method)
        y = huge(x)
        assert bool(((y >= found.lower) & (y <= found.upper)).all())
    wild = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.Sigmoid(), nn.Linear(8, 3)).eval()
    with torch.no_grad():
        wild[0].weight.mul_(1e17)
        wild[2].weight.mul_(1e17)
    for method in ("ibp", "crown-ibp", "crown"):
        for interval in certify.layer_bounds(wild, certify.LpBall(torch.rand(2, 4), 1e6), method).values():
            assert not bool((interval.lower == torch.inf).any())
            assert not bool((interval.upper == -torch.inf).any())


def test_one_exploding_sample_does_not_spoil_its_neighbours():
    model = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 2)).eval()
    x = torch.tensor([[0.3, 0.4], [0.5, 0.6]])
    radius = torch.tensor([0.1, 1e38])
    for method in ("ibp", "crown-ibp", "crown"):
        both = certify.bounds(model, certify.LpBall(x, radius), method)
        alone = certify.bounds(model, certify.LpBall(x[:1], 0.1), method)
        torch.testing.assert_close(both.lower[:1], alone.lower, rtol=1e-5, atol=1e-5)


def test_sets_keep_their_numbers_when_the_caller_writes_into_its_tensors():
    for dtype in (torch.float32, torch.float64):
        x = inputs((4,), dtype=dtype)
        before = x.clone()
        sets = [certify.LpBall(x, 0.1), certify.LpBall(x, 0.1, p=2), certify.Box(x, x)]
        a = torch.ones_like(x)
        supports = [domain.support(a) for domain in sets]
        x.add_(1)
        for domain, support in zip(sets, supports, strict=True):
            assert torch.equal(domain.center, before)
            assert torch.equal(domain.support(a), support)


def test_batch_normalisation_with_large_means():
    model = convolutional("relu", seed=4)
    model.norm.running_mean.fill_(1e4)
    model.norm.running_var.fill_(1e-2)
    for domain in domains(inputs((2, 5, 5)), 1e-3).values():
        tally = check_bounds(model, domain, count=1, orders=1)
        assert tally.violations == 0, tally.examples[:5]
