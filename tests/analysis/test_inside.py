"""Inside layers: neurons' shares add up to their layer's, pixels of affine models are rows, gradients autograd's."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from strategies import FAMILIES, inputs
from torch import Tensor, nn

from analysis.evaluation import Protocol
from analysis.layers import layer_sensitivity
from analysis.met import meet
from analysis.neurons import neuron_costs
from analysis.pixels import pixel_map, pixel_maps
from certify import LpBall, bounds, class_margins, explain
from certify.attacks import PGD
from certify.graph import trace
from certify.propagate.attribute import blame_neurons
from certify.propagate.inputs import input_rows
from models import cnn, mlp

RADIUS = Fraction(1, 20)
PROTOCOL = Protocol(radii=(RADIUS,), attack=PGD(steps=5))


def small(kind: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(2)
    if kind == "pool":
        layers = nn.Conv2d(1, 3, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(27, 3)
        return nn.Sequential(*layers).eval(), torch.rand(4, 1, 8, 8)
    if kind == "cnn":
        return cnn((1, 8, 8), 3, "relu", width=2).eval(), torch.rand(4, 1, 8, 8)
    if kind in FAMILIES:
        build, shape = FAMILIES[kind]
        return build(seed=0), inputs(shape, 4)
    return mlp([6, 8, 8, 3], kind).eval(), torch.rand(5, 6)


@pytest.mark.parametrize("kind", ["relu", "kaf-tanh", "cnn", "pool", "images gelu", "graph 8", "affine", "sequence"])
def test_shares_of_neurons_add_up_to_that_of_their_layer(kind: str) -> None:
    model, x = small(kind)
    ball = LpBall(x, RADIUS)
    neurons = blame_neurons(model, ball)
    for name, blame in explain(model, ball).items():
        found = neurons[name]
        assert float(found.share.sum()) == pytest.approx(blame.share, abs=1e-6)
        assert float(found.outputs.width.double().mean()) == pytest.approx(blame.width_out, rel=1e-5)
        assert float(found.gap.double().mean()) == pytest.approx(blame.gap, rel=1e-5)
        assert found.weight.shape == blame.shape
        if blame.share > 0 and found.inputs is not None:
            assert float(found.undecided.double().mean()) == pytest.approx(blame.undecided, rel=1e-5)


def test_a_neuron_weighs_what_the_rows_multiply_it_with() -> None:
    """The last hidden activation meets the claim's rows through one affine layer, exactly."""
    model, x = small("relu")
    spec = class_margins(torch.tensor([0, 1, 2, 0, 1]), 3)
    found = blame_neurons(model, LpBall(x, RADIUS), spec=spec)
    weight = model.linear3.weight.detach().double()
    by_hand = (spec.C.double() @ weight).abs().sum((0, 1)) / 5
    assert torch.allclose(found["act2"].weight, by_hand, rtol=1e-5)
    assert float(found["linear3"].weight.sum()) == pytest.approx(4)  # two rows of +1 and -1


def test_a_dead_neuron_costs_nothing() -> None:
    model, x = small("relu")
    with torch.no_grad():
        model.linear2.bias[3] = -100.0
    found = blame_neurons(model, LpBall(x, RADIUS))["act2"]
    assert float(found.share[3]) == 0
    assert float(found.undecided[3]) == 0
    assert float(found.outputs.width[3]) < 1e-40  # the float contract leaves room for underflow


def test_the_costliest_neurons_come_first_and_maps_are_summed_over_places() -> None:
    model, x = small("cnn")
    found = {item.layer: item for item in neuron_costs(trace(model, x), blame_neurons(model, LpBall(x, RADIUS)))}
    act, affine = found["act1"], found["conv1"]
    assert (act.unit, act.total, len(act.rows)) == ("channel", 2, 2)
    assert sum(row.share for row in act.rows) == pytest.approx(1)
    assert act.rows[0].share >= act.rows[1].share
    assert all(row.low_in is not None and row.low_in <= row.high_in and row.gap is None for row in act.rows)
    assert affine.share == 0
    assert all(row.low_in is None and row.share == 0 and row.weight > 0 for row in affine.rows)


def test_pixels_of_an_affine_model_are_its_row_times_half_the_width() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Flatten(), nn.Linear(6, 3)).eval(), torch.rand(4, 1, 2, 3)
    y = torch.tensor([0, 1, 2, 0])
    spec, ball = class_margins(y, 3), LpBall(x, 0.125, clip=(0.0, 1.0))
    weight = model[1].weight.detach()
    rows = spec.C @ weight
    half = ball.hull.width.flatten(1) / 2
    middle = (ball.hull.lower + ball.hull.upper) / 2
    lower = spec.rows(model(x)) + (rows.double() * (middle - x.double()).flatten(1)[:, None]).sum(2)
    worst = (lower - (rows.double().abs() * half[:, None]).sum(2)).argmin(1)
    by_hand = rows[torch.arange(4), worst].double().abs() * half
    found = pixel_maps(model, ball, spec=spec)
    assert torch.equal(found.flatten(1), by_hand)
    assert torch.equal(pixel_map(model, ball, spec=spec), found.mean(0))


@pytest.mark.parametrize("kind", ["relu", "kaf-tanh", "cnn"])
def test_linear_functions_of_the_input_stay_below_the_network(kind: str) -> None:
    model, x = (part.double() for part in small(kind))
    for p in (torch.inf, 2.0):
        ball = LpBall(x, RADIUS, p)
        found = input_rows(model, ball, arithmetic="real")
        assert torch.allclose(found.bound, bounds(model, ball, arithmetic="real").lower, rtol=1e-9, atol=1e-9)
        for point in (x, *ball.sample(20, torch.Generator().manual_seed(0))):
            with torch.no_grad():
                shift = (found.coefficients * (point - x)[:, None]).flatten(2).sum(2)
                assert bool((model(point) >= found.bound - 1e-9).all())
                centre = found.bound + (found.coefficients.abs() * float(RADIUS)).flatten(2).sum(2)
                if p == torch.inf:  # the function's value at the centre, and from there its slope
                    assert bool((model(point) >= centre + shift - 1e-9).all())


def test_gradients_are_those_of_autograd_by_hand() -> None:
    model, x = small("kaf-tanh")
    model, x = model.double(), x.double()
    y = torch.tensor([0, 1, 2, 0, 1])
    spec = class_margins(y, 3)
    found = meet(model, x, x + 0.01, spec).gradients
    hidden = model.act1(model.linear1(x)).detach().requires_grad_()
    logits = model.linear3(model.act2(model.linear2(hidden)))
    others = logits.masked_fill(torch.nn.functional.one_hot(y, 3).bool(), -torch.inf).amax(1)
    (logits.gather(1, y[:, None])[:, 0] - others).sum().backward()
    assert hidden.grad is not None
    assert found["act1"] == pytest.approx(float(hidden.grad.norm(dim=1).mean()), rel=1e-9)
    assert found["linear3"] == pytest.approx(2**0.5)


def test_everything_about_layers_is_measured_on_the_same_samples() -> None:
    model, x = small("kaf-tanh")
    with torch.no_grad():
        y = model(x).argmax(1)
    found = layer_sensitivity(model, x, y, PROTOCOL, radius=RADIUS)
    assert [item.layer for item in found.histograms] == ["act1", "act2"]
    assert [item.layer for item in found.shapes] == ["act1", "act2"]
    assert set(found.ranking) == {"act1", "act2"}
    assert found.sentences[0].startswith(found.ranking[0])
    assert found.pixels is not None
    spec = class_margins(y, 3)
    kept = pixel_map(model, PROTOCOL.ball(x, RADIUS), spec=spec).flatten()
    assert found.pixels.values == pytest.approx(kept.tolist(), rel=1e-5)
