"""Linear programs and dual networks: sound in floats, between CROWN and attacks, right for any multipliers."""

import itertools
from fractions import Fraction

import numpy as np
import pytest
import torch
from random_nets import random_net
from references import float_outputs, graph_of, points
from scipy.optimize import linprog
from torch import nn
from zero_slack import check_bounds

import certify
from certify.convex.expansion import doubled, expand
from certify.convex.lp import Relaxed, program_rows
from certify.ops.arithmetic import Scale
from certify.propagate.drift import output_drift
from certify.propagate.methods import CROWN
from certify.rounding import FloatAnyOrder, Real
from models import KAF

FLOAT = FloatAnyOrder(torch.float32)
SOUND = ("lp", "wong-kolter", certify.LP(intervals="ibp"), certify.WongKolter(intervals="crown"))


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


class _Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(8, 3)

    def forward(self, x):
        y = torch.relu(self.first(x))
        return self.last(torch.cat([torch.tanh(y + 0.5 * x), y - x], 1))


def _dense(act, seed=0, widths=(5, 9, 8, 3), scale=1.5):
    torch.manual_seed(seed)
    layers = []
    for i, (n, m) in enumerate(itertools.pairwise(widths)):
        layers += ([act(n)] if i else []) + [nn.Linear(n, m)]
        nn.init.normal_(layers[-1].weight, std=scale / n**0.5)
    return nn.Sequential(*layers).eval()


def _nets():
    torch.manual_seed(5)
    pooled = [
        nn.Conv2d(1, 3, 3, padding=1),
        nn.BatchNorm2d(3),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(3, 4, 2, stride=2),
    ]
    nn.init.uniform_(pooled[1].running_mean, -1, 1)
    conv = nn.Sequential(*pooled, nn.LeakyReLU(0.1), nn.AvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)).eval()
    padded = [nn.MaxPool2d(3, 2, 1), nn.ConstantPad2d(1, 0.1), nn.Conv2d(2, 2, 3), nn.Hardtanh(), nn.Flatten()]
    return {
        "relu": (_dense(lambda n: nn.ReLU()), (5,)),
        "leaky": (_dense(lambda n: nn.LeakyReLU(0.3)), (5,)),
        "concave": (_dense(lambda n: nn.LeakyReLU(1.7)), (5,)),
        "tanh": (_dense(lambda n: nn.Tanh()), (5,)),
        "kaf": (_dense(KAF), (5,)),
        "kaf first": (nn.Sequential(KAF(4), nn.Linear(4, 3)).eval(), (4,)),
        "sigmoid last": (nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 3), nn.Sigmoid()).eval(), (4,)),
        "affine": (nn.Sequential(nn.Linear(4, 3)).eval(), (4,)),
        "residual": (_Residual().eval(), (4,)),
        "conv": (conv, (1, 5, 5)),
        "padded pool": (nn.Sequential(*padded, nn.Linear(18, 3)).eval(), (2, 5, 5)),
    }


NETS = _nets()


def _domain(shape, p=torch.inf, batch=2, seed=1, radius=0.15):
    x = torch.rand(batch, *shape, generator=torch.Generator().manual_seed(seed))
    return certify.LpBall(x, radius if p == torch.inf else 3 * radius, p=p, clip=(0.0, 1.0) if p != 1 else None)


def _claims(model, domain):
    outputs = model(domain.center).shape[1]
    eye = torch.eye(outputs)
    C = torch.cat([eye, eye[:1] - eye[-1:] if outputs > 1 else -eye]).expand(domain.batch, -1, -1)
    return certify.Spec(C, torch.full(C.shape[:2], 0.25))


def _check(model, domain, methods=SOUND):
    graph, spec = graph_of(model, domain), _claims(model, domain)
    lower = [certify.propagate.methods.resolve_method(m).bound(graph, domain, spec, FLOAT) for m in methods]
    alone = program_rows(Relaxed(graph), CROWN().learn(graph, domain, FLOAT), spec)
    assert bool(torch.isfinite(alone).all())
    for _, y in _executions(model, domain):
        for bound in (*lower, alone):
            assert bool((bound <= spec.rows(y)).all())


def _executions(model, domain):
    """Float outputs at many points; at some of them in many orders."""
    for i, x in enumerate(points(domain, torch.Generator().manual_seed(0), 8)):
        assert bool(domain.contains(x).all())
        for y in float_outputs(model, x) if i % 9 == 1 else (model(x),):
            yield x, y


@pytest.mark.parametrize("p", [torch.inf, 2.0, 1.0])
@pytest.mark.parametrize("name", NETS)
def test_rows_hold_for_float_executions_with_no_slack(name, p):
    model, shape = NETS[name]
    _check(model, _domain(shape, p, batch=2 if p == torch.inf else 1), SOUND if p == torch.inf else ("lp",))


@pytest.mark.parametrize("seed", range(10))
def test_rows_hold_for_random_networks(seed):
    model, shape = random_net(seed)
    _check(model, _domain(shape, radius=0.1), ("lp", "wong-kolter"))


@pytest.mark.parametrize("name", ["relu", "kaf", "residual", "conv"])
def test_rows_of_points_and_tiny_balls_hold(name):
    model, shape = NETS[name]
    for radius in (0.0, 1e-7):
        _check(model, _domain(shape, radius=radius), ("lp", "wong-kolter"))


@pytest.mark.parametrize("name", ["relu", "concave", "residual", "conv"])
def test_layers_of_the_dual_network_hold(name):
    model, shape = NETS[name]
    with torch.enable_grad():
        tally = check_bounds(model, _domain(shape), ("wong-kolter",))
    assert tally.checks > 0
    assert tally.violations == 0, tally.examples


@pytest.mark.parametrize("name", NETS)
def test_float_outputs_drift_no_farther_than_the_bound(name):
    model, shape = NETS[name]
    domain = _domain(shape)
    _check_drift(model, domain)


@pytest.mark.parametrize("seed", range(15))
def test_random_networks_drift_no_farther_than_the_bound(seed):
    model, shape = random_net(seed)
    _check_drift(model, _domain(shape, radius=0.3))


def _check_drift(model, domain):
    graph = graph_of(model, domain)
    drift = output_drift(CROWN().learn(graph, domain, FLOAT))
    assert bool((output_drift(CROWN().learn(graph, domain, Real())) == 0).all())
    for x, y in _executions(model, domain):
        values = {"input": x.double()}
        for node in graph.nodes.values():
            rule = doubled(node.rule, graph.dtype) if node.rule.affine else node.rule
            values[node.name] = rule.forward(*(values[name] for name in node.inputs))
        real = values[graph.output].flatten(1)
        assert bool(((y.double() - real).abs() <= drift + 1e-13 * real.abs()).all())


@pytest.mark.parametrize("act", [lambda n: nn.ReLU(), lambda n: nn.Tanh(), KAF], ids=["relu", "tanh", "kaf"])
def test_crown_and_the_dual_network_stay_below_the_program_and_attacks_above(act):
    model, x = _dense(act, seed=2), torch.rand(50, 5, generator=torch.Generator().manual_seed(3))
    labels = model(x).argmax(1)
    spec, gaps = certify.class_margins(labels, 3), []
    domain = certify.LpBall(x, 0.1)
    graph = graph_of(model, domain)
    knowledge = CROWN().learn(graph, domain, Real())
    program = program_rows(Relaxed(graph), knowledge, spec)
    with torch.enable_grad():
        attack = certify.attacks.PGD(steps=20, restarts=2)(model, domain, spec)
    above = spec.rows(model(attack.witness))
    for below in (
        CROWN().rows(knowledge, spec),
        certify.WongKolter(intervals="crown").bound(graph, domain, spec, Real()),
    ):
        assert bool((below <= program + 1e-6).all())
        gaps.append(float((program - below).max()))
    assert bool((program <= above + 1e-6).all())
    assert max(gaps) > 1e-4  # it is not CROWN again


@pytest.mark.parametrize("p", [1.0, 2.0])
def test_programs_of_balls_dominate_crown(p):
    for name in ("relu", "kaf", "conv"):
        model, shape = NETS[name]
        domain = _domain(shape, p, batch=1)
        graph, spec = graph_of(model, domain), _claims(model, domain)
        knowledge = CROWN().learn(graph, domain, Real())
        assert bool((CROWN().rows(knowledge, spec) <= program_rows(Relaxed(graph), knowledge, spec) + 1e-5).all())


def test_the_program_of_a_relu_network_is_the_triangle_program():
    model = _dense(lambda n: nn.ReLU(), seed=4, widths=(4, 7, 6, 3))
    domain = certify.LpBall(torch.rand(3, 4), 0.3)
    graph = graph_of(model, domain)
    knowledge = CROWN().learn(graph, domain, Real())
    spec = _claims(model, domain)
    found = program_rows(Relaxed(graph), knowledge, spec)
    before = [node.inputs[0] for node in graph.nodes.values() if not node.rule.affine]
    for i in range(3):
        ends = [
            [e[i].double().numpy() for e in (knowledge.intervals[n].lower, knowledge.intervals[n].upper)]
            for n in before
        ]
        for j in range(spec.C.shape[1]):
            naive = _triangle(model, domain.hull[i], ends, spec.C[i, j].double().numpy()) + float(spec.d[i, j])
            assert abs(naive - float(found[i, j])) < 1e-6


def _triangle(model, hull, ends, C):
    """The textbook program with dense matrices: x, then (z, y) per layer."""
    linear = [(m.weight.double().numpy(), m.bias.double().numpy()) for m in model if isinstance(m, nn.Linear)]
    sizes = [len(linear[0][0][0])] + [len(W) for W, _ in linear[:-1] for _ in range(2)]
    starts, total = np.cumsum([0, *sizes]), sum(sizes)
    A_eq, b_eq, A_ub, b_ub = [], [], [], []
    bounds = [*zip(hull.lower.tolist(), hull.upper.tolist(), strict=True)] + [(None, None)] * (total - sizes[0])
    eye = np.eye(total)
    for k, ((W, b), (low, up)) in enumerate(zip(linear, ends, strict=False)):
        source, z, y = starts[2 * k], starts[2 * k + 1], starts[2 * k + 2]
        for i in range(len(W)):
            row = eye[z + i].copy()
            row[source : source + W.shape[1]] -= W[i]
            A_eq.append(row)
            b_eq.append(b[i])
            bounds[z + i] = (low[i], up[i])
            if up[i] <= 0:
                bounds[y + i] = (0, 0)
            elif low[i] >= 0:
                A_eq.append(eye[y + i] - eye[z + i])
                b_eq.append(0)
            else:
                slope = up[i] / (up[i] - low[i])
                A_ub += [-eye[y + i], eye[z + i] - eye[y + i], eye[y + i] - slope * eye[z + i]]
                b_ub += [0, 0, -slope * low[i]]
    W, b = linear[-1]
    cost = np.zeros(total)
    cost[starts[-2] :] = C @ W
    found = linprog(cost, A_ub=np.array(A_ub), b_ub=b_ub, A_eq=np.array(A_eq), b_eq=b_eq, bounds=bounds)
    return found.fun + C @ b


@pytest.mark.parametrize("name", ["relu", "kaf", "conv"])
def test_any_multipliers_give_a_lower_bound(name):
    model, shape = NETS[name]
    domain = _domain(shape, batch=1)
    graph, spec = graph_of(model, domain), _claims(model, domain)
    relaxed = Relaxed(graph)
    (program,) = relaxed.programs(CROWN().learn(graph, domain, Real()))
    random = np.random.default_rng(0)
    cost = random.normal(size=len(program.lower))
    best = program.minimum(cost)
    solved = program._solve(cost, [])
    lam, mu = -solved.ineqlin.marginals, -solved.eqlin.marginals
    assert abs(best - solved.fun) < 1e-6 * (1 + abs(best))
    for noise in (1e-6, 1e-2, 1.0, 1e6):
        noisy = (multiplier + noise * random.normal(size=len(multiplier)) for multiplier in (lam, mu))
        assert program.lagrangian(cost, *noisy) <= solved.fun + 1e-7 * (1 + abs(solved.fun))
    assert program.lagrangian(cost, lam * np.nan, mu) == -np.inf
    assert program.lagrangian(cost, lam, mu + np.inf) == -np.inf
    assert bool(torch.isfinite(spec.C).all())


def _exactly(*parts):
    return tuple(np.vectorize(Fraction, otypes=[object])(part) for part in parts)


def test_lagrangians_are_below_their_exact_values_by_no_more_than_rounding():
    model, domain = _dense(lambda n: nn.ReLU(), widths=(3, 4, 3)), _domain((3,), batch=1)
    graph = graph_of(model, domain)
    (program,) = Relaxed(graph).programs(CROWN().learn(graph, domain, FLOAT))
    random = np.random.default_rng(1)
    for scale in (1e-8, 1.0, 1e8):
        cost = random.normal(size=len(program.lower))
        lam, mu = (scale * random.normal(size=len(b)) for b in (program.b_ub, program.b_eq))
        lam = np.maximum(lam, 0)
        c, p, m = _exactly(cost, lam, mu)
        A_ub, A_eq, b_ub, b_eq = _exactly(program.A_ub.toarray(), program.A_eq.toarray(), program.b_ub, program.b_eq)
        low, up, slack = _exactly(program.lower, program.upper, program.slack)
        reduced = c + p @ A_ub + m @ A_eq
        exact = np.minimum(reduced * low, reduced * up).sum() - p @ b_ub - m @ b_eq - np.abs(m) @ slack
        found = program.lagrangian(cost, lam, mu)
        assert Fraction(found) <= exact
        assert float(exact) - found < 1e-11 * (1 + scale) * len(lam)


def test_expansions_hold_the_exact_products():
    model = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)).eval()
    nn.init.uniform_(model[1].running_mean, -1, 1)
    graph = graph_of(model, certify.LpBall(torch.rand(1, 6), 0.1))
    found = expand(graph)[graph.output]
    matrix, constant = _exactly(np.eye(6), np.zeros((1, 6)))
    for node in graph.nodes.values():
        rule = doubled(node.rule, graph.dtype)
        if isinstance(rule, Scale):
            W, center, shift = _exactly(*(part.numpy().ravel() for part in (rule.scale, rule.center, rule.shift)))
            matrix, constant = matrix * W, (constant - center) * W + shift
        else:
            W, bias = _exactly(rule.weight.numpy(), rule.bias.numpy())
            matrix, constant = matrix @ W.T, constant @ W.T + bias
    for computed, error, truth in ((*found.parts["input"], matrix), (found.constant, found.error, constant)):
        value, allowed = _exactly(computed.numpy(), error.numpy())
        assert bool((np.abs(value - truth) <= allowed).all())
        assert float(error.max()) < 1e-13


def test_a_solver_that_lies_or_fails_proves_nothing(monkeypatch):
    model, shape = NETS["relu"]
    domain, honest = _domain(shape), linprog
    graph, spec = graph_of(model, domain), _claims(model, domain)
    relaxed, knowledge = Relaxed(graph), CROWN().learn(graph, domain, FLOAT)
    truth = program_rows(relaxed, knowledge, spec)

    def liar(*args, **kwargs):
        found = honest(*args, **kwargs)
        found.fun += 100
        found.ineqlin.marginals = found.ineqlin.marginals * -3
        return found

    def failing(*args, **kwargs):
        found = honest(*args, **kwargs)
        found.status, found.x, found.fun = 4, None, None
        return found

    for solver in (liar, failing):
        monkeypatch.setattr("scipy.optimize.linprog", solver)
        rows = program_rows(relaxed, knowledge, spec)
        assert bool((rows <= truth + 1e-6).all())
        assert bool(torch.isfinite(rows).all())
        full = certify.LP().bound(graph, domain, spec, FLOAT)
        assert bool((full >= CROWN().bound(graph, domain, spec, FLOAT)).all())


def test_overflowing_intervals_are_unknown_and_others_keep_their_bounds():
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2)).eval()
    model[0].weight.data.mul_(1e3)
    domain = certify.LpBall(torch.zeros(2, 2), torch.tensor([0.1, 1e38], dtype=torch.float64))
    rows = certify.bounds(model, domain, "lp").lower
    assert bool(torch.isfinite(rows[0]).all())
    assert bool((rows[1] == -torch.inf).all())


def test_double_precision_networks_and_prove_by_name():
    model = _dense(lambda n: nn.ReLU(), seed=6).double()
    x = torch.rand(4, 5, dtype=torch.float64)
    labels = model(x).argmax(1)
    for method in ("lp", "wong-kolter"):
        found = certify.prove(model, certify.LpBall(x, 1e-4), certify.class_margins(labels, 3, torch.float64), method)
        assert found.method == method
        assert all(verdict is certify.Verdict.HOLDS for verdict in found.verdicts)


def test_parallel_lines_of_a_relu_have_the_slope_of_the_chord():
    facts = next(iter(certify.activations.piecewise.PiecewiseLinear.examples()))[0]
    z = certify.Interval(torch.tensor([[-1.0, -2.0, 1.0]]), torch.tensor([[3.0, -1.0, 2.0]]))
    lines = certify.convex.wong_kolter.parallel_lines(facts, z)
    assert lines.lower_slope.tolist() == [[0.75, 0.0, 1.0]]
    assert lines.upper_slope.tolist() == [[0.75, 0.0, 1.0]]
    assert torch.allclose(lines.lower_offset, torch.zeros(1, 3), atol=1e-12)
    assert torch.allclose(lines.upper_offset, torch.tensor([[0.75, 0.0, 0.0]]))


def test_too_many_neurons_and_methods_without_intervals_are_refused():
    wide = nn.Sequential(nn.Linear(2, 2001), nn.ReLU(), nn.Linear(2001, 2)).eval()
    domain = certify.LpBall(torch.zeros(1, 2), 0.1)
    with pytest.raises(certify.UnsupportedOperation, match="crown or alpha-crown"):
        certify.bounds(wide, domain, "lp")
    model, shape = NETS["relu"]
    for method in (certify.LP(intervals="lp"), certify.WongKolter(intervals="lp")):
        with pytest.raises(certify.InvalidInput, match="crown"):
            certify.bounds(model, _domain(shape), method)
    with pytest.raises(certify.InvalidInput, match="magic"):
        certify.bounds(model, _domain(shape), certify.LP(intervals="magic"))
    with pytest.raises(certify.InvalidInput, match="layer bounds"):
        certify.layer_bounds(model, _domain(shape), "lp")
