"""alpha-CROWN: never below CROWN, at the LP's optimum where there is one, with the gradients it claims, and sound."""

import math
import time

import numpy as np
import pytest
import torch
from references import triangle_lp
from strategies import FAMILIES, Function, domains, inputs
from torch import nn

import certify
from certify.graph import trace
from certify.propagate import optimize
from certify.propagate.alpha import AlphaCROWN
from certify.propagate.backward import Neurons, claim_rows, plan_windows
from certify.propagate.methods import CROWN
from certify.rounding import FloatAnyOrder, Real

NETS = ("dense relu", "dense leaky", "dense hardtanh", "dense sigmoid", "dense silu", "dense kaf", "images relu",
        "images kaf-elu", "sequence", "graph 2", "graph 3")  # fmt: skip


def _question(name, radius=0.2, dtype=torch.float64):
    build, shape = FAMILIES[name]
    model, x = build().to(dtype), inputs(shape, dtype=dtype)
    y = model(x).detach().flatten(1)
    return model, domains(x, radius)["linf"], certify.class_margins(y.argmax(1), y.shape[1], dtype)


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("intermediate", ["fixed", "refine"])
def test_never_below_crown_and_below_every_sample(name, intermediate):
    model, domain, spec = _question(name)
    method = AlphaCROWN(steps=6, inner_steps=3, intermediate=intermediate, goal=math.inf)
    crown = certify.prove(model, domain, spec, "crown", arithmetic="real").margin.lower
    found = certify.prove(model, domain, spec, method, arithmetic="real").margin.lower
    assert bool((found >= crown - 1e-9 * (1 + crown.abs())).all())
    assert name == "sequence" or bool((found > crown + 1e-4 * (1 + crown.abs())).any())  # that one has no slack left
    generator = torch.Generator().manual_seed(0)
    for x in domain.sample(200, generator):
        assert bool((spec.rows(model(x)) >= found - 1e-9).all())


@pytest.mark.parametrize("seed", range(4))
def test_one_hidden_relu_layer_reaches_the_triangle_lp(seed):
    """The lower slopes are the LP's free dual variables: their best choice is the LP's optimum."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 7), nn.ReLU(), nn.Linear(7, 4)).double().eval()
    x, radius = torch.rand(1, 3, dtype=torch.float64), 0.5
    layers = [(layer.weight.detach().numpy(), layer.bias.detach().numpy()) for layer in (model[0], model[2])]
    box = (x[0].numpy() - radius, x[0].numpy() + radius)
    found = certify.bounds(model, certify.LpBall(x, radius), AlphaCROWN(steps=200, lr=0.2), arithmetic="real")
    loose = certify.bounds(model, certify.LpBall(x, radius), "crown", arithmetic="real")
    for output in range(4):
        lower, upper = triangle_lp(layers, box, np.eye(4)[output]), -triangle_lp(layers, box, -np.eye(4)[output])
        gap = 1e-9 + 0.02 * max(lower - float(loose.lower[0, output]), float(loose.upper[0, output]) - upper)
        assert lower - gap <= float(found.lower[0, output]) <= lower + 1e-9
        assert upper - 1e-9 <= float(found.upper[0, output]) <= upper + gap


@pytest.mark.parametrize(
    ("name", "start"),
    [*((name, "claim") for name in (*NETS, "graph 5")), *((name, "neurons") for name in NETS if "graph" not in name)],
)
def test_gradients_are_those_of_the_bound(name, start, monkeypatch):
    """Central differences of the pulled-back bound by single places, at random places."""
    model, domain, spec = _question(name)
    graph = trace(model, domain.center)
    with torch.no_grad():
        knowledge = CROWN().learn(graph, domain, Real())
        if start == "claim":
            sample = torch.arange(spec.batch).repeat_interleave(spec.C.shape[1])
            made = lambda: claim_rows(knowledge, spec.C.flatten(0, 1), sample)  # noqa: E731
        else:
            last = [node for node in graph.nodes.values() if node.rule.affine and _feeds_activation(graph, node)][-1]
            wanted = torch.ones(spec.batch, *last.shape, dtype=torch.bool)
            wanted.flatten(1)[:, 7:] = False
            neurons = Neurons.of(knowledge, last, wanted)
            made = lambda: neurons.ends(torch.arange(len(neurons.sample)), torch.arange(2 * len(neurons.sample)))  # noqa: E731
        climb = optimize.Climb(knowledge)
        climb.pull(made())
        generator = torch.Generator().manual_seed(0)
        places = [p for slopes in climb.slopes.values() for p in slopes.places if p is not None]
        for p in places:
            p.at.copy_(0.05 + 0.9 * torch.rand(p.at.shape, dtype=p.at.dtype, generator=generator))
        gradients = []
        monkeypatch.setattr(optimize.Places, "climb", lambda self, gradient, *_: gradients.append((self, gradient)))
        bound, tape = climb.pull(made())
        climb.step(tape, 1, 0.1)
        checked = 0
        for p, gradient in gradients:
            for i in gradient.abs().flatten().topk(min(3, gradient.numel())).indices.tolist():
                if float(gradient.flatten()[i].abs()) < 1e-6:
                    continue
                before, ends = float(p.at.flatten()[i]), []
                for step in (1e-6, -1e-6):
                    p.at.flatten()[i] = before + step
                    ends.append(float(climb.pull(made())[0].sum()))
                p.at.flatten()[i] = before
                assert (ends[0] - ends[1]) / 2e-6 == pytest.approx(float(gradient.flatten()[i]), rel=1e-3, abs=1e-6)
                checked += 1
        assert checked > 0
        assert bool(torch.isfinite(bound).all())


def _feeds_activation(graph, node):
    return any(not consumer.rule.affine for consumer in graph.consumers(node.name))


def test_windows_are_met_by_the_gradient_test():
    model, domain, _ = _question("images relu")
    graph = trace(model, domain.center)
    assert any(plan_windows(graph, name) for name in graph.nodes)


@pytest.mark.parametrize("name", ["dense relu", "dense kaf", "images relu", "graph 2"])
def test_every_bound_holds_for_float_executions(name):
    model, domain, spec = _question(name, dtype=torch.float32)
    method = AlphaCROWN(steps=4, inner_steps=2, goal=math.inf)
    with torch.no_grad():
        lower = method.bound(trace(model, domain.center), domain, spec, FloatAnyOrder(torch.float32))
        for x in domain.sample(300, torch.Generator().manual_seed(1)):
            assert bool((spec.rows(model(x)) >= lower).all())


def test_proven_rows_stop_and_verdicts_stay():
    model, domain, spec = _question("dense relu", radius=0.03)
    stopped = certify.prove(model, domain, spec, AlphaCROWN(steps=10))
    full = certify.prove(model, domain, spec, AlphaCROWN(steps=10, goal=math.inf))
    assert stopped.verdicts == full.verdicts
    assert bool((full.margin.lower >= stopped.margin.lower - 1e-6).all())


def test_a_deadline_keeps_what_has_been_reached():
    model, domain, spec = _question("dense kaf")
    began = time.monotonic()
    found = certify.prove(model, domain, spec, AlphaCROWN(steps=100_000, goal=math.inf, time_limit=0.2))
    assert time.monotonic() - began < 60
    crown = certify.prove(model, domain, spec, "crown")
    assert bool((found.margin.lower >= crown.margin.lower - 1e-6).all())


@pytest.mark.parametrize("name", ["images relu", "dense kaf", "graph 3", "sequence"])
@pytest.mark.parametrize("method", ["crown", AlphaCROWN(steps=4, inner_steps=2, goal=math.inf)])
def test_a_memory_budget_changes_no_bound(name, method):
    model, domain, spec = _question(name)
    free = certify.prove(model, domain, spec, method)
    for budget in ("100KB", "1 GiB"):
        with certify.options(memory=budget):
            found = certify.prove(model, domain, spec, method)
        assert found.verdicts == free.verdicts
        torch.testing.assert_close(found.margin.lower, free.margin.lower, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("memory", ["", "-1", "2 apples", "0", "1e9x"])
def test_nonsense_budgets_are_refused(memory):
    with pytest.raises(certify.InvalidInput, match="memory"), certify.options(memory=memory):
        pass


@pytest.mark.parametrize("wrong", [{"steps": -1}, {"lr": 0.0}, {"intermediate": "none"}, {"time_limit": math.nan}])
def test_nonsense_options_are_refused(wrong):
    with pytest.raises(certify.InvalidInput):
        AlphaCROWN(**wrong)


def test_identical_results_without_relaxations():
    model = Function(lambda x: 3 * x[:, :2] - 1).eval()
    domain = certify.LpBall(torch.rand(2, 3), 0.1)
    for method in ("crown", "alpha-crown"):
        found = certify.bounds(model, domain, method, arithmetic="real")
        torch.testing.assert_close(found.lower, 3 * (domain.center[:, :2] - 0.1) - 1)
