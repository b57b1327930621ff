"""Explanations against mixed integer programs: one node split into small pieces, all others between their lines."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from itertools import pairwise, product

import numpy as np
import pytest
import torch
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.stats import spearmanr
from strategies import FAMILIES, domains, inputs
from torch import Tensor, nn

import certify
from certify.enclosures import Interval
from certify.graph import INPUT, Graph, Node, trace
from certify.memory import options
from certify.ops.base import Affine
from certify.propagate.state import Knowledge
from certify.rounding import Real
from models import KAF

PIECES = 8  # per smooth function
DEPTHS = (2, 3, 4, "residual")


@dataclass
class Program:
    """Linear constraints on named vectors, some of them binary."""

    low: list[np.ndarray] = field(default_factory=list)
    high: list[np.ndarray] = field(default_factory=list)
    binary: list[np.ndarray] = field(default_factory=list)
    places: dict[str, slice] = field(default_factory=dict)
    constraints: list[tuple[dict[str, np.ndarray], np.ndarray | float, np.ndarray | float]] = field(
        default_factory=list
    )

    def variable(self, name: str, low: np.ndarray, high: np.ndarray, *, binary: bool = False) -> None:
        used = sum(map(len, self.low))
        self.places[name] = slice(used, used + len(low))
        self.low.append(low)
        self.high.append(high)
        self.binary.append(np.full(len(low), int(binary)))

    def require(self, low: np.ndarray | float, high: np.ndarray | float, **parts: np.ndarray) -> None:
        """low <= sum of parts[name] @ name <= high."""
        self.constraints.append((parts, low, high))

    def minimum(self, name: str, cost: np.ndarray) -> float:
        low, high = np.concatenate(self.low), np.concatenate(self.high)
        c, limits = np.zeros(len(low)), []
        c[self.places[name]] = cost
        for parts, least, most in self.constraints:
            A = np.zeros((len(next(iter(parts.values()))), len(low)))
            for key, matrix in parts.items():
                A[:, self.places[key]] += matrix
            limits.append(LinearConstraint(A, least, most))
        found = milp(c, integrality=np.concatenate(self.binary), bounds=Bounds(low, high), constraints=limits,
                     options={"mip_rel_gap": 1e-7})  # fmt: skip
        assert found.success, found.message
        return float(found.fun)


def program(knowledge: Knowledge, exact: str = "", until: str = "") -> Program:
    """The network before ``until``, for the first sample: activations between their lines, ``exact`` on its graph."""
    made, graph, box = Program(), knowledge.graph, knowledge.domain.hull
    made.variable(INPUT, box.lower[0].numpy(), box.upper[0].numpy())
    for name, node in graph.nodes.items():
        if name == until:
            break
        free = np.full(node.shape, np.inf)
        made.variable(name, -free, free)
        if isinstance(node.rule, Affine):
            _add_affine(made, graph, node)
        elif name == exact:
            _add_graph(made, node, knowledge.inputs(node)[0])
        else:
            r = knowledge.relaxation(node)
            low, b, up, c = (part[0].numpy() for part in (r.lower_slope, r.lower_offset, r.upper_slope, r.upper_offset))
            made.require(b, np.inf, **{name: np.eye(len(b)), node.inputs[0]: -np.diag(low)})
            made.require(-np.inf, c, **{name: np.eye(len(b)), node.inputs[0]: -np.diag(up)})
    return made


def _add_affine(made: Program, graph: Graph, node: Node) -> None:
    zeros = [torch.zeros(1, *graph.shape(source), dtype=torch.float64) for source in node.inputs]
    constant = node.rule.forward(*zeros)[0].numpy()
    parts = {node.name: np.eye(len(constant))}
    for i, source in enumerate(node.inputs):
        eye = torch.eye(zeros[i].shape[1], dtype=torch.float64)
        probes = [eye if i == j else zero.expand(len(eye), -1) for j, zero in enumerate(zeros)]
        parts[source] = -node.rule.linear(*probes).T.numpy()
    made.require(constant, constant, **parts)


def _add_graph(made: Program, node: Node, z: Interval) -> None:
    """y = f(z): per neuron one of many chords."""
    inside = [z.lower.clamp(min=kink).minimum(z.upper) for kink in getattr(node.rule.facts, "kinks", ())]
    ends = torch.cat([z.lower, *(inside or (z.lower + z.width * i / PIECES for i in range(1, PIECES))), z.upper])
    s, v = ends.numpy(), node.rule.forward(ends).numpy()
    eye = np.eye(s.shape[1])
    first, second, one = {node.inputs[0]: -eye}, {node.name: -eye}, {}
    for a, b in pairwise(range(len(s))):
        run = s[b] - s[a]
        slope = np.divide(v[b] - v[a], run, out=np.zeros_like(run), where=run > 0)
        made.variable(f"on{a}", 0 * run, 0 * run + 1, binary=True)
        made.variable(f"run{a}", 0 * run, run)  # how far z is into this piece
        made.require(-np.inf, 0, **{f"run{a}": eye, f"on{a}": -np.diag(run)})
        first |= {f"on{a}": np.diag(s[a]), f"run{a}": eye}
        second |= {f"on{a}": np.diag(v[a]), f"run{a}": np.diag(slope)}
        one[f"on{a}"] = eye
    for total, parts in ((0, first), (0, second), (1, one)):
        made.require(total, total, **parts)


@dataclass(frozen=True)
class Case:
    """One network on one box: true bounds of the outputs, and those with one node exact."""

    model: nn.Module
    domain: certify.PerturbationSet
    intermediate: dict[str, Interval]
    bound: np.ndarray
    exact: dict[str, np.ndarray]

    def explain(self) -> dict[str, certify.NodeBlame]:
        method = certify.CROWN(intermediate=self.intermediate)
        found = certify.explain(self.model, self.domain, method, arithmetic="real")
        return {name: found[name] for name in self.exact}

    def gains(self) -> dict[str, float]:
        return {name: float((exact - self.bound).mean()) for name, exact in self.exact.items()}


def case(model: nn.Module, domain: certify.PerturbationSet) -> Case:
    graph = trace(model, domain.center)
    with torch.no_grad():
        knowledge = Knowledge(graph, domain, Real())
        for name, node in graph.nodes.items():
            if not node.rule.affine:
                # No interval is tighter than the lines before it: every bound is that of one linear program.
                source, before = node.inputs[0], program(knowledge, until=name)
                units = np.eye(*graph.shape(source))
                ends = [[sign * before.minimum(source, sign * unit) for unit in units] for sign in (1, -1)]
                knowledge.intervals[source] = Interval(*torch.tensor(ends, dtype=torch.float64)[:, None])
            knowledge.intervals[name] = knowledge.forward_interval(node)
        rows = np.eye(*graph.shape(graph.output))

        def solve(exact: str = "") -> np.ndarray:
            made = program(knowledge, exact)
            return np.array([made.minimum(graph.output, row) for row in rows])

        exact = {name: solve(name) for name, node in graph.nodes.items() if not node.rule.affine}
    return Case(model, domain, {name: knowledge.intervals[name] for name in graph.nodes}, solve(), exact)


class Residual(nn.Module):
    """A skip over two layers."""

    def __init__(self, act: type[nn.Module]) -> None:
        super().__init__()
        self.first, self.second, self.third, self.last = (nn.Linear(*size) for size in ((4, 5), (5, 5), (5, 5), (5, 2)))
        self.act1, self.act2, self.act3 = act(), act(), act()

    def forward(self, x: Tensor) -> Tensor:
        y = self.act1(self.first(x))
        return self.last(self.act3(self.third(self.act2(self.second(y)))) + y)


def network(act: type[nn.Module], depth: int | str, seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if depth == "residual":
            model: nn.Module = Residual(act)
        else:
            layers = [layer for n, m in pairwise([4, *[5] * depth, 2]) for layer in (nn.Linear(n, m), act())]
            model = nn.Sequential(*layers[:-1])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.7)
    return model.double().eval()


@cache
def cases(act: type[nn.Module], seeds: int) -> list[Case]:
    made = []
    for depth, seed in product(DEPTHS, range(seeds)):
        x = torch.rand(1, 4, generator=torch.Generator().manual_seed(seed)).double()
        made.append(case(network(act, depth, seed), certify.LpBall(x, (0.1, 0.2, 0.4)[seed % 3])))
    return made


@pytest.mark.parametrize(("act", "seeds"), [(nn.ReLU, 12), (nn.Tanh, 3), (nn.SiLU, 3)])
def test_gains_rank_the_nodes_as_branching_does(act, seeds):
    """Spearman >= 0.9 over all (network, node) pairs, gains divided by their network's sum; then network by network.

    Nodes whose relaxation is exact gain 0 by both accounts and would only flatter the figure: they are left out.
    """
    truth, found, named = [], [], []
    for each in cases(act, seeds):
        gains, blames = each.gains(), each.explain()
        names = [name for name in gains if blames[name].undecided > 0]
        total = sum(gains.values())
        if len(names) > 1 and total > 1e-6:
            truth += [gains[name] / total for name in names]
            found += [blames[name].gain / sum(blame.gain for blame in blames.values()) for name in names]
            named.append(max(gains, key=gains.__getitem__) == max(blames, key=lambda name: blames[name].gain))
    assert len(truth) >= 30
    assert spearmanr(truth, found).statistic >= 0.9
    assert np.mean(named) >= 0.9


@pytest.mark.parametrize(("act", "slack"), [(nn.ReLU, 1e-9), (nn.Tanh, 5e-3), (nn.SiLU, 5e-3)])
def test_no_gain_is_too_small(act, slack):
    """A gain is an upper bound of the true one (up to what the chords of the reference miss of a smooth function)."""
    for each in cases(act, 3):
        gains, blames = each.gains(), each.explain()
        for name, gain in gains.items():
            assert blames[name].gain >= gain - slack


def test_the_reference_agrees_with_crown_where_nothing_is_exact():
    for each in cases(nn.ReLU, 3):
        method = certify.CROWN(intermediate=each.intermediate)
        found = certify.bounds(each.model, each.domain, method, arithmetic="real").lower[0]
        assert bool((found >= torch.tensor(each.bound) - 1e-9).all())  # its last step may also be that of IBP


def planted() -> nn.Module:
    """Two activations; the first is in its linear part."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 3)).eval()
    with torch.no_grad():
        model[2].bias.fill_(50.0)  # its neurons are always active: no looseness there
    return model


def test_shares_and_gains_find_the_planted_culprit():
    found = certify.explain(planted(), certify.LpBall(torch.rand(4, 6), 0.2))
    assert sum(blame.share for blame in found.values()) == pytest.approx(1.0)
    assert found["1"].share == pytest.approx(1.0)
    assert found["1"].gain > 0
    assert found["3"].undecided == 0
    assert [found[name].gain for name in ("0", "2", "3", "4")] == [0.0] * 4
    assert found["0"].share == 0


@pytest.mark.parametrize("culprit", [1, 3, 5])
def test_a_layer_scaled_up_has_the_largest_gain(culprit):
    """Of three tanh, the one with inputs far out of its linear part."""
    torch.manual_seed(culprit)
    model = nn.Sequential(*(layer for _ in range(3) for layer in (nn.Linear(6, 6), nn.Tanh())), nn.Linear(6, 3)).eval()
    with torch.no_grad():
        model[culprit - 1].weight.mul_(8)
        for i in (0, 2, 4):
            model[i].bias.mul_(0.1)
    found = certify.explain(model, certify.LpBall(0.2 * torch.rand(4, 6), 0.2))
    assert max(found, key=lambda name: found[name].gain) == str(culprit)


@pytest.mark.parametrize("p", [1, 2, torch.inf])
def test_the_gain_of_the_only_relaxation_reaches_the_true_minimum(p):
    """With one activation, exact, nothing is left between the bound and the network: here on a dense grid of inputs."""
    torch.manual_seed(2)
    model = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 2)).double().eval()
    domain = certify.LpBall(torch.rand(3, 2).double(), 0.5, p=p)
    bound = certify.bounds(model, domain, arithmetic="real").lower
    steps = torch.cartesian_prod(*[torch.linspace(-0.5, 0.5, 101, dtype=torch.float64)] * 2)
    with torch.no_grad():
        met = torch.stack([model(domain.project(domain.center + step)) for step in steps]).amin(0)
    gain = certify.explain(model, domain, arithmetic="real")["1"].gain
    assert gain >= 0.95 * float((met - bound).mean()) > 0


def test_a_share_is_its_part_of_coefficients_times_gaps():
    """Against the same sum written down for two layers, with the chord and a slope of 0 or 1 as the lines of a ReLU."""
    torch.manual_seed(4)
    model = nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 2)).double().eval()
    domain = certify.LpBall(torch.rand(1, 3).double(), 0.5)
    intervals = certify.layer_bounds(model, domain, arithmetic="real")
    A, slips = model[4].weight.detach(), {}
    for name, before in (("3", model[2]), ("1", model[0])):
        low, high = (end[0] for end in (intervals[str(int(name) - 1)].lower, intervals[str(int(name) - 1)].upper))
        crossing = (low < 0) & (high > 0)
        chord = torch.where(crossing, high / (high - low), (low >= 0).double())
        slope = (high > -low).double()
        middle, top = (low + high) / 2, torch.where(crossing, -chord * low, 0)
        slips[name] = float((A.abs() @ ((chord - slope) * middle + top)).sum())
        A = (A.clamp(min=0) * slope + A.clamp(max=0) * chord) @ before.weight.detach()
    found = certify.explain(model, domain, arithmetic="real")
    for name, slip in slips.items():
        assert found[name].share == pytest.approx(slip / sum(slips.values()))


def test_what_happens_to_a_box_elementwise_costs_nothing():
    """Rows end behind the first activation where it meets the box itself."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.ReLU(), nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)).eval()
    found = certify.explain(model, certify.LpBall(torch.zeros(2, 4), 0.5))
    assert found["0"].undecided == 1
    assert (found["0"].share, found["0"].gain) == (0, 0)
    assert found["2"].share == pytest.approx(1)


@pytest.mark.parametrize("family", ["images relu", "images kaf-elu", "graph 3", "graph 7", "sequence"])
def test_every_kind_of_node_has_a_finite_gain_that_does_not_depend_on_the_batch(family):
    build, shape = FAMILIES[family]
    model, x = build(seed=0), inputs(shape, 3)
    for name in ("linf", "l2", "box"):
        domain = domains(x, 0.05)[name]
        whole = certify.explain(model, domain)
        parts = [certify.explain(model, domain.take(torch.tensor([i]))) for i in range(3)]
        for node, blame in whole.items():
            assert blame.gain >= 0
            assert blame.gain == pytest.approx(np.mean([part[node].gain for part in parts]), rel=1e-2, abs=1e-4)


def test_blocks_of_rows_change_nothing():
    model, x = planted(), torch.rand(4, 6)
    whole = certify.explain(model, certify.LpBall(x, 0.2))
    with options(memory=2000):
        parts = certify.explain(model, certify.LpBall(x, 0.2))
    for name, blame in whole.items():
        assert parts[name].gain == pytest.approx(blame.gain, rel=1e-4)
        assert parts[name].share == pytest.approx(blame.share, rel=1e-5)


def test_an_exploding_network_is_explained_without_complaint():
    model = planted()
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(1e12)
    found = certify.explain(model, certify.LpBall(torch.zeros(2, 6), 1e20))
    assert all(np.isfinite(blame.gain) for blame in found.values())


def test_gains_hold_no_rounding_errors():
    """Ridge-fitted KAFs round by gamma_{4D+10} sum|alpha|, in float32 more than their relaxations are apart."""
    torch.manual_seed(0)
    layers = [layer for n, m in pairwise((4, 6, 6, 6)) for layer in (nn.Linear(n, m), KAF(m, init="tanh"))]
    model = nn.Sequential(*layers, nn.Linear(6, 2)).eval()
    with torch.no_grad():
        for i, layer in enumerate(layer for layer in model if isinstance(layer, nn.Linear)):
            layer.weight.mul_(2.5 - 0.7 * i)
    x = 0.2 * torch.rand(3, 4)
    for radius, slack in ((0.02, 0.7), (0.1, 0.1)):  # what is left is the width of the float network's intervals
        domain = certify.LpBall(x, radius)
        real, rounded = (certify.explain(model, domain, arithmetic=name) for name in ("real", "float"))
        names = [name for name, blame in real.items() if blame.undecided > 0]
        assert names == sorted(names, key=lambda name: -real[name].gain)
        assert names == sorted(names, key=lambda name: -rounded[name].gain)
        for name in names:
            assert rounded[name].gain == pytest.approx(real[name].gain, rel=slack)
            assert rounded[name].share == pytest.approx(real[name].share, rel=slack)
