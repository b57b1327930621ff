"""Bounds are as tight as mathematics says: attained for affine maps, between LP and truth for ReLU networks."""

import numpy as np
import pytest
import torch
from references import exact_minimum, triangle_lp
from strategies import FAMILIES, Function, convolutional, dense, domains, inputs, sequence
from torch import nn

import certify
from certify.graph import trace
from certify.propagate.methods import CROWN
from certify.rounding import Real

METHODS = ("ibp", "crown-ibp", "crown")


def _jacobian(model, x):
    return torch.stack([torch.func.jacrev(lambda s: model(s[None])[0])(sample) for sample in x]).detach()


AFFINE = {
    "dense": (lambda: nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 5), nn.Linear(5, 3)), (6,)),
    "images": (
        lambda: nn.Sequential(nn.Conv2d(2, 3, 3, stride=2, padding=1), nn.BatchNorm2d(3), nn.AvgPool2d(2, 1),
                              nn.ZeroPad2d(1), nn.ConvTranspose2d(3, 2, 2, 2), nn.Flatten(), nn.Linear(128, 3)),
        (2, 5, 5),
    ),
    "residual": (lambda: Function(lambda x: (x[:, 1:] - 3 * x[:, :-1]) / 2 + x.mean(1, True).expand(-1, 3)), (4,)),
    "inactive": (lambda: nn.Sequential(nn.Linear(4, 5), nn.Hardtanh(-1e6, 1e6), nn.Linear(5, 2)), (4,)),
}  # fmt: skip


@pytest.mark.parametrize("radius", [0.01, 0.4])
@pytest.mark.parametrize("name", AFFINE)
def test_affine_models_attain_their_bounds_on_every_set(name, radius):
    build, shape = AFFINE[name]
    torch.manual_seed(1)
    model = build().double().eval()
    x = inputs(shape, batch=3, dtype=torch.float64, seed=2)
    gradients = _jacobian(model, x)
    for kind, domain in domains(x, radius).items():
        # IBP merges nothing but the last affine layers: here that is the whole network, but for activations.
        for method in METHODS if name != "inactive" else ("crown-ibp", "crown"):
            found = certify.bounds(model, domain, method, arithmetic="real")
            for output in range(gradients.shape[1]):
                highest = model(domain.steepest(gradients[:, output])).detach()[:, output]
                lowest = model(domain.steepest(-gradients[:, output])).detach()[:, output]
                scale = 1e-6 * (1 + gradients[:, output].abs().flatten(1).sum(1))
                assert bool(((found.upper[:, output] - highest).abs() <= scale).all()), (kind, method)
                assert bool(((lowest - found.lower[:, output]).abs() <= scale).all()), (kind, method)


def test_first_layer_intervals_are_exact():
    model, x = dense("tanh").double(), inputs((6,), dtype=torch.float64)
    for domain in domains(x, 0.2).values():
        W, b = model[0].weight.detach(), model[0].bias.detach()
        first = certify.layer_bounds(model, domain, "crown", arithmetic="real")["0"]
        for neuron in range(len(W)):
            direction = W[neuron].expand_as(x)
            truth = (domain.steepest(direction) * direction).sum(1) + b[neuron]
            torch.testing.assert_close(first.upper[:, neuron], truth, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("seed", range(6))
def test_one_hidden_layer_lies_between_the_triangle_lp_and_the_truth(seed):
    """With one hidden layer IBP's box is exact, so CROWN <= LP <= exact, and the LP is the best of all lines."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 7), nn.ReLU(), nn.Linear(7, 4)).double().eval()
    x, radius = torch.rand(1, 3, dtype=torch.float64), 0.5
    layers = [(layer.weight.detach().numpy(), layer.bias.detach().numpy()) for layer in (model[0], model[2])]
    box = (x[0].numpy() - radius, x[0].numpy() + radius)
    found = certify.bounds(model, certify.LpBall(x, radius), "crown", arithmetic="real")
    for output in range(4):
        cost = np.eye(4)[output]
        relaxed = triangle_lp(layers, box, cost)
        exact = exact_minimum(*layers[0], cost @ layers[1][0], box) + cost @ layers[1][1]
        assert float(found.lower[0, output]) <= relaxed + 1e-9
        assert relaxed <= exact + 1e-9
        highest = -exact_minimum(*layers[0], -cost @ layers[1][0], box) + cost @ layers[1][1]
        assert highest <= -triangle_lp(layers, box, -cost) + 1e-9 <= float(found.upper[0, output]) + 2e-9


@pytest.mark.parametrize("seed", range(3))
def test_two_hidden_layers_lie_below_the_triangle_lp(seed):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2)).double().eval()
    x, radius = torch.rand(1, 3, dtype=torch.float64), 0.3
    layers = [(layer.weight.detach().numpy(), layer.bias.detach().numpy()) for layer in model[::2]]
    box = (x[0].numpy() - radius, x[0].numpy() + radius)
    found = certify.bounds(model, certify.LpBall(x, radius), "crown", arithmetic="real")
    samples = model(x + radius * (2 * torch.rand(5000, 3, dtype=torch.float64) - 1)).detach()
    for output in range(2):
        relaxed = triangle_lp(layers, box, np.eye(2)[output])
        assert float(found.lower[0, output]) <= relaxed + 1e-9 <= float(samples[:, output].min()) + 2e-9


def test_crown_equals_the_best_line_for_a_single_neuron():
    """relu(x) + c x on [l, u]: both lines are known, so the bound of a slope c is a formula."""
    for low, high in ((-1.0, 2.0), (-2.0, 1.0), (-1.0, 1.0)):
        for c in (-2.0, -0.5, 0.5, 2.0):
            model = Function(lambda x, c=c: torch.relu(x) + c * x).eval()
            domain = certify.Box(*(torch.full((1, 1), end, dtype=torch.float64) for end in (low, high)))
            found = certify.bounds(model, domain, "crown-ibp", arithmetic="real")
            slope, chord = float(high > -low), high / (high - low)
            line_low = min((slope + c) * end for end in (low, high))
            line_high = max((chord + c) * end - chord * low for end in (low, high))
            assert float(found.lower) >= line_low - 1e-9
            assert float(found.upper) <= line_high + 1e-9


def test_stable_networks_are_exact():
    """Where no neuron is unstable the network is affine on the set: CROWN attains its bounds."""
    model, x = dense("relu", seed=3).double(), inputs((6,), dtype=torch.float64, seed=1)
    for domain in domains(x, 1e-6).values():
        hidden = certify.layer_bounds(model, domain, "crown", arithmetic="real")
        assert not any(bool(((hidden[name].lower < 0) & (hidden[name].upper > 0)).any()) for name in ("0", "2"))
        found = certify.bounds(model, domain, "crown", arithmetic="real")
        gradients = _jacobian(model, x)
        for output in range(gradients.shape[1]):
            highest = model(domain.steepest(gradients[:, output])).detach()[:, output]
            torch.testing.assert_close(found.upper[:, output], highest, rtol=0, atol=1e-11)


def test_a_point_is_its_own_value():
    for name in ("dense kaf-elu", "dense gelu", "images relu", "sequence", "graph 1", "graph 2"):
        build, shape = FAMILIES[name]
        model, x = build().double(), inputs(shape, dtype=torch.float64)
        y = model(x).detach()
        for method in METHODS:
            found = certify.bounds(model, certify.LpBall(x, 0.0), method, arithmetic="real")
            slack = 1e-9 * (1 + y.abs())
            assert bool(((y - found.lower).abs() <= slack).all() & ((found.upper - y).abs() <= slack).all()), name


@pytest.mark.parametrize(
    "name", ["dense relu", "dense kaf", "dense silu", "images relu", "sequence", "graph 4", "graph 5"]
)
def test_crown_is_never_looser_than_ibp_at_any_node(name):
    build, shape = FAMILIES[name]
    model, x = build().double(), inputs(shape, dtype=torch.float64)
    for domain in domains(x, 0.05).values():
        layers = {method: certify.layer_bounds(model, domain, method, arithmetic="real") for method in METHODS}
        for node in layers["ibp"]:
            loose = layers["ibp"][node]
            slack = 1e-6 * (1 + loose.magnitude)  # smooth ranges stop at 2e-5 of the optimum
            for method in ("crown-ibp", "crown"):
                tight = layers[method][node]
                assert bool((tight.lower >= loose.lower - slack).all()), (method, node)
                assert bool((tight.upper <= loose.upper + slack).all()), (method, node)


@pytest.mark.parametrize("build", [dense, convolutional, sequence])
def test_the_float_contract_is_never_tighter_than_real_arithmetic(build):
    shape = {dense: (6,), convolutional: (2, 5, 5), sequence: (2, 13)}[build]
    model, x = build(), inputs(shape)
    for domain in domains(x, 0.05).values():
        for method in METHODS:
            real = certify.bounds(model, domain, method, arithmetic="real")
            contract = certify.bounds(model, domain, method)
            slack = 1e-6 * (1 + real.magnitude)
            assert bool((contract.lower <= real.lower + slack).all() & (contract.upper >= real.upper - slack).all())
            wide = 0.05 * (1 + real.magnitude)  # means of 100 in a batch normalisation cost digits
            assert bool((contract.lower >= real.lower - wide).all() & (contract.upper <= real.upper + wide).all())


def test_intermediate_bounds_are_used_where_given():
    model, x = dense("relu"), inputs((6,))
    domain = certify.LpBall(x, 0.1)
    own = certify.layer_bounds(model, domain, "crown", arithmetic="real")
    again = certify.bounds(model, domain, CROWN(intermediate={"0": own["0"], "2": own["2"]}), arithmetic="real")
    torch.testing.assert_close(again.lower, own["4"].lower)
    loose = certify.Interval(own["2"].lower - 1, own["2"].upper + 1)
    wider = certify.bounds(model, domain, CROWN(intermediate={"2": loose}), arithmetic="real")
    assert bool((wider.lower < own["4"].lower).all())
    with pytest.raises(certify.InvalidInput, match="nodes among"):
        certify.bounds(model, domain, CROWN(intermediate={"nowhere": loose}))


def test_a_claims_rows_are_bounded_together():
    """y0 - y1 of two equal outputs is 0, whatever the outputs do: rows are merged before they are bounded."""
    layer = nn.Linear(4, 2).double().eval()
    with torch.no_grad():
        layer.weight[1] = layer.weight[0]
        layer.bias[1] = layer.bias[0] - 1
    model = nn.Sequential(nn.Linear(4, 4).double(), nn.ReLU(), layer).eval()
    x = torch.rand(2, 4, dtype=torch.float64)
    claim = certify.class_margins(torch.tensor([0, 0]), 2, torch.float64)
    graph = trace(model, x)
    for method in METHODS:
        found = certify.prove(model, certify.LpBall(x, 5.0), claim, method)
        assert bool(found.holds.all())
        assert bool((found.margin.lower > 1 - 1e-9).all())
    assert float(CROWN().bound(graph, certify.LpBall(x, 5.0), claim, Real()).max()) == pytest.approx(1.0)
