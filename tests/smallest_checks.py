"""The smallest checks that notice a broken engine: each passes on the sound one; tests/mutants.py names them."""

from __future__ import annotations

from fractions import Fraction

import mpmath
import pytest
import torch
from exact_recursion import exact_gate
from random_nets import attained
from references import AnyOrder, graph_of, points
from strategies import Function, affine, dense, domains, inputs
from torch import Tensor, nn

import certify
import models
from certify.activations import smooth
from certify.activations.piecewise import PiecewiseLinear
from certify.bounding import prepare
from certify.convex.lp import LP
from certify.convex.margin import LipschitzMargin
from certify.convex.semidefinite import SemidefiniteProgram
from certify.enclosures import Interval
from certify.graph import trace
from certify.lipschitz.estimate import ask
from certify.lipschitz.recursion import Recursion, chain_of, recheck
from certify.lipschitz.steps import Gate
from certify.propagate import backward
from certify.propagate.methods import resolve_method
from certify.rounding import FloatAnyOrder, Real
from certify.sets import LpBall
from certify.specs import Spec
from certify.testing import check_activation, check_op, check_set
from models.kaf_tails import TailedFacts
from models.training.certified import worst_loss
from models.training.recipe import Batch, Threat


def sound(model: nn.Module, domain: certify.PerturbationSet, method: str | certify.AlphaCROWN = "crown") -> None:
    """Bounds of outputs and nodes hold at corners, faces and random points, in several orders of summation."""
    generator = torch.Generator().manual_seed(0)
    found, execute = certify.layer_bounds(model, domain, method), AnyOrder(graph_of(model, domain))
    for x in points(domain, generator, 15):
        values = execute(x, generator)
        with torch.no_grad():
            pairs = [*((values[name], found[name]) for name in found), (model(x), list(found.values())[-1])]
        for value, interval in pairs:
            assert bool(((value >= interval.lower) & (value <= interval.upper)).all())


def _cancelling(*layers: nn.Module) -> nn.Module:
    """A layer whose large terms cancel before the given layers: its rounding is all there is."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 1), *layers).eval()
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(64))
        model[1].weight[0, 32:] = -model[1].weight[0, :32]
        model[1].weight *= 1e4
    return model


def rounding_before_lines() -> None:
    """What an activation's lines must absorb, at a point."""
    model = _cancelling(nn.LeakyReLU(0.5))[1:].eval()
    model[0].bias.data.fill_(100.0)
    sound(model, certify.LpBall(torch.rand(40, 32).repeat(1, 2) + 0.5, 0.0))


def rounding_of_neurons() -> None:
    """Both ends of a neuron whose own layer has rounded."""
    sound(_cancelling(nn.Tanh(), nn.Linear(1, 1)), certify.LpBall(torch.rand(40, 32).repeat(1, 2) + 0.5, 0.0))


def _ball(shape: tuple[int, ...] = (6,), radius: float = 0.3, kind: str = "linf") -> certify.PerturbationSet:
    return domains(inputs(shape), radius)[kind]


def relu_network() -> None:
    """A dense ReLU network at a visible radius."""
    sound(dense("relu"), _ball())


def rounding() -> None:
    """Affine networks at a point: nothing but rounding is left."""
    for seed in range(3):
        sound(affine(8, 12, seed=seed), domains(inputs((8,), 20, seed=seed), 0.0)["linf"])


def rounding_behind_relu() -> None:
    """The same behind activations, where intermediate bounds must have been widened."""
    for seed in range(3):
        sound(dense("relu", (8, *[8] * 10, 3), seed=seed), domains(inputs((8,), 20, seed=seed), 0.0)["linf"])


def residual() -> None:
    """Forks whose branches do not cancel."""
    sound(Function(lambda x: torch.relu(x) + torch.relu(x + 0.2) * 2 - x).eval(), _ball((4,)))


def strided_convolution() -> None:
    """A stride that drops the last row and column."""
    check_op(nn.Conv2d(2, 3, 3, stride=2), (2, 6, 8))


def optimised_rows() -> None:
    """Rows and intervals with optimised slopes, in long steps; dense, with windows, and for a smooth activation."""
    method = certify.AlphaCROWN(steps=4, inner_steps=4, lr=5.0)
    sound(dense("relu"), _ball(), method)
    sound(dense("kaf"), _ball(), method)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv1d(2, 4, 3), nn.ReLU(), nn.Conv1d(4, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 3))
    sound(net.eval(), _ball((2, 16)), method)


def window_rows() -> None:
    """Rows that start inside convolutions, at every place of the map, against rows on whole maps."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2), nn.ReLU(),
        nn.Conv2d(6, 3, 3, padding=1), nn.Conv2d(3, 2, 3, padding=1), nn.ReLU(),
    ).eval()  # fmt: skip
    windows_equal_maps(net, (2, 16, 15))


def windows_equal_maps(model: nn.Module, shape: tuple[int, ...]) -> None:
    """Bounds of every neuron are those without windows, up to rounding."""
    domain = certify.LpBall(torch.rand(2, *shape), 0.1)
    with_windows = certify.layer_bounds(model, domain, "crown", arithmetic="real")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backward, "plan_windows", lambda graph, start: {})
        without = certify.layer_bounds(model, domain, "crown", arithmetic="real")
    for name, found in without.items():
        torch.testing.assert_close(with_windows[name].lower, found.lower, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(with_windows[name].upper, found.upper, rtol=1e-4, atol=1e-5)


def linear_rule() -> None:
    """One dense layer through the shipped check."""
    check_op(nn.Linear(5, 4), (5,))


def convolution_rule() -> None:
    """One convolution through the shipped check."""
    check_op(nn.Conv2d(2, 3, 3, padding=1), (2, 4, 4))


def max_pool_rule() -> None:
    """Overlapping windows through the shipped check."""
    check_op(nn.MaxPool2d(3, 2, 1), (2, 5, 5))


def padding_rule() -> None:
    """A constant that is not 0."""
    check_op(nn.ConstantPad2d(1, 0.7), (1, 3, 3))


def relu_facts() -> None:
    """The facts of ReLU through the shipped check."""
    check_activation(PiecewiseLinear((0.0,), (0.0, 1.0)))


def silu_facts() -> None:
    """The facts of SiLU, which needs branch and bound, through the shipped check."""
    check_activation(smooth.SiLU())


def kaf_facts() -> None:
    """The facts of a random KAF through the shipped check."""
    torch.manual_seed(0)
    check_activation(models.KAFFacts(models.KAF(4).eval(), None, 2), 4, cases=30)


def coarse_table() -> None:
    """The facts of a KAF whose table has two nodes per unit, with errors that every check sees."""
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("models.kaf_table.FINE", 2)
        check_activation(models.KAFFacts(models.KAF(4).eval(), None, 2), 4, cases=60)


def fan_between_lines() -> None:
    """Lines between two neighbours of a fan in float32 lie above their exact convex combination at both ends."""
    generator = torch.Generator().manual_seed(0)
    low, run = torch.randn(2, 1, 400, generator=generator).unbind(0)
    z = Interval(low, low + run.abs())
    fan, alpha = smooth.Sigmoid().fan(z), torch.rand(1, 400, generator=generator)
    place = alpha * (len(fan.upper_slope) - 1)
    first = place.long()
    r, weight = fan.at((alpha, alpha)), (place - first).double()
    for end in (z.lower.double(), z.upper.double()):
        ends = (fan.upper_slope.double() * end + fan.upper_offset.double()).gather(0, torch.stack([first, first + 1]))
        exact = ends[0] + weight * (ends[1] - ends[0])
        assert bool((r.upper_slope.double() * end + r.upper_offset.double() >= exact).all())


def exact_chords() -> None:
    """Chords in float32 lie above ReLU at both ends, in exact arithmetic."""
    generator = torch.Generator().manual_seed(0)
    low, high = -torch.rand(1, 300, generator=generator), torch.rand(1, 300, generator=generator)
    r = PiecewiseLinear((0.0,), (0.0, 1.0)).relax(Interval(low, high))
    for a, b, slope, offset in zip(*(t[0].tolist() for t in (low, high, r.upper_slope, r.upper_offset)), strict=True):
        assert all(Fraction(slope) * Fraction(s) + Fraction(offset) >= max(Fraction(s), 0) for s in (a, b))


def kinked_base() -> None:
    """A KAF with an ELU base, concave on both sides of the kink."""
    kaf = models.KAF(1, size=5, gamma=0.3, base=nn.ELU(5.0)).eval()
    with torch.no_grad():
        kaf.alpha.copy_(torch.tensor([[0.0, 0.0, 6.0, 0.0, 0.0]]))
    facts = trace(kaf, torch.zeros(1, 1)).nodes["model"].rule.facts
    z = Interval(-torch.ones(1, 1, dtype=torch.float64), torch.ones(1, 1, dtype=torch.float64))
    slopes = torch.linspace(-1, 5, 61, dtype=torch.float64).view(-1, 1, 1)
    s, r = torch.linspace(-1, 1, 4001, dtype=torch.float64).view(-1, 1), facts.lines(z, (slopes, slopes))
    assert bool((r.upper_slope[:, 0] * s.T + r.upper_offset[:, 0] + 1e-12 >= kaf.double()(s).T).all())


def clamp_facts() -> None:
    """A clamp whose limit no float holds: points below it, where both lines are s itself."""
    low = 0.7 * torch.rand(1, 500, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    r = trace(Function(lambda x: x.clamp(max=0.7)).eval(), low).nodes["clamp"].rule.facts.relax(Interval(low, low))
    assert bool((r.upper_slope == 1).all() & (r.lower_slope == 1).all())
    assert bool((r.upper_offset >= 0).all() & (r.lower_offset <= 0).all())


def clipped_balls() -> None:
    """Balls of every norm that leave the data range."""
    for p in (1, 2, torch.inf):
        check_set(LpBall(inputs((2, 3), 3), 0.4, p=p, clip=(0.0, 1.0)))


def whole_balls() -> None:
    """Balls of every norm."""
    for p in (1, 2, torch.inf):
        check_set(LpBall(inputs((2, 3), 3), 0.4, p=p))


def batch_norm() -> None:
    """Inputs and means of 300 against a spread of 1."""
    layer = nn.BatchNorm1d(4).eval()
    layer.running_mean.fill_(300.0)
    x = 300 + inputs((4,), 50)
    sound(layer, certify.Box(x, x))


def wide_eps() -> None:
    """A batch normalisation whose eps matters."""
    sound(nn.BatchNorm1d(4, eps=0.5).eval(), _ball((4,)))


def hidden_clamp() -> None:
    """A result that is clamped in place, where nothing near the centre shows it, is refused."""

    def forward(x: Tensor) -> Tensor:
        y = x + 100
        y.clamp_(max=500.0)
        return y

    with pytest.raises(certify.UnsupportedOperation):
        certify.bounds(Function(forward).eval(), certify.LpBall(torch.zeros(1, 2), 1e4))


def sorted_features() -> None:
    """A maximum over features of very different sizes is no slice."""
    model = Function(lambda x: (x + torch.tensor([0.0, 900.0])).max(1, keepdim=True)[0]).eval()
    with pytest.raises(certify.UnsupportedOperation):
        certify.bounds(model, certify.LpBall(torch.zeros(1, 2), 1e4))


def small_noise() -> None:
    """A model that draws random numbers is refused, however small they are."""
    with pytest.raises(certify.UnsupportedOperation):
        certify.bounds(Function(lambda x: x + 1e-7 * torch.randn(2)).eval(), _ball((2,)))


def bands() -> None:
    """A claim with a constant: y > 10 does not hold where y is about 0."""
    claim = certify.output_band(torch.full((2, 3), 10.0), torch.full((2, 3), 1e6))
    model = nn.Linear(4, 3).eval()
    found = resolve_method("crown").bound(trace(model, inputs((4,))), _ball((4,)), claim, FloatAnyOrder(torch.float32))
    assert bool((found <= claim.rows(model(inputs((4,))).detach())).all())


def overflow() -> None:
    """A sum beyond the largest float is no lower end."""
    sound(Function(lambda x: (x * 1e-3 + 3e38) * 1e-38).eval(), _ball((3,)), "ibp")


def difference_rule() -> None:
    """x - y of two nodes through the shipped check."""
    check_op(Function(lambda x: torch.relu(x) - x), (4,))


def scale_rule() -> None:
    """Multiplication by constants through the shipped check."""
    check_op(Function(lambda x: x * torch.tensor([2.0, -3.0])), (2,))


def transposed_rule() -> None:
    """A transposed convolution with outputs that no input reaches."""
    check_op(nn.ConvTranspose1d(2, 3, 3, output_padding=2, dilation=3), (2, 5))


def ties() -> None:
    """Two equal outputs: neither proved nor broken."""
    model = nn.Linear(2, 2, bias=False).eval()
    with torch.no_grad():
        model.weight.zero_()
    claim = certify.class_margins(torch.tensor([0]), 2)
    found = certify.prove(model, LpBall(torch.rand(1, 2), 0.1), claim, arithmetic="real")
    assert found.verdicts == [certify.Verdict.UNKNOWN]


def negative_slopes() -> None:
    """|x| through two neurons of slopes -1 and 1 that add up."""
    model = nn.Sequential(nn.Linear(1, 2, bias=False), nn.LeakyReLU(-1.0), nn.Linear(2, 1, bias=False)).double().eval()
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0], [-1.0]]))
        model[2].weight.copy_(torch.tensor([[1.0, 1.0]]))
    found = certify.lipschitz_constant(model, input_shape=(1,), method=Recursion(steps=5))
    assert attained(model, (1,), None) <= found.value


def torus_of_a_padded_convolution() -> None:
    """[1, -1, 0] on three points: 1.801938; the torus of three points has 1.732."""
    conv = nn.Conv1d(1, 300, 3, padding=1, bias=False).double().eval()
    with torch.no_grad():
        conv.weight.zero_()
        conv.weight[0, 0] = torch.tensor([1.0, -1.0, 0.0])
        exact = float(torch.linalg.matrix_norm(conv(torch.eye(3).double()[:, None]).flatten(1), 2))
        model = nn.Sequential(conv, nn.ReLU(), nn.Flatten(), nn.Linear(900, 1)).double().eval()
        source = chain_of(ask(model, input_shape=(1, 3)), "crown").steps[0]
        state = source.bound(torch.empty(1, 1, 0, 0).double(), torch.empty(1, 0).double())
        assert float(torch.linalg.eigvalsh(state).max()) >= exact**2


def overlapping_windows() -> None:
    """One input in four windows of a max-pool, at the beginning of the network."""
    model = nn.Sequential(nn.MaxPool2d(2, 1), nn.Flatten(), nn.Linear(9, 9, bias=False)).double().eval()
    with torch.no_grad():
        model[2].weight.copy_(torch.eye(9))
        x = torch.zeros(1, 1, 4, 4).double()
        x[0, 0, 1, 1] = 1
        met = float(torch.linalg.vector_norm(model(x) - model(0 * x)))
    assert met <= certify.lipschitz_constant(model, input_shape=(1, 4, 4), method=Recursion(steps=5)).value


def multipliers_without_a_proof() -> None:
    """Half of the multipliers certify nothing, or more."""
    torch.manual_seed(8)
    model = models.mlp((3, 6, 2), "relu").double().eval()
    found = certify.lipschitz_constant(model, input_shape=(3,))
    halved = {name: tuple(tuple(v / 64 for v in row) for row in rows) for name, rows in found.multipliers.items()}
    assert recheck(ask(model, input_shape=(3,)), halved)[0] > found.value


def step_in_sixty_digits() -> None:
    """A gate's bound is above the exact state, whatever float64 rounds."""
    generator = torch.Generator().manual_seed(0)
    with mpmath.workdps(60):
        for _ in range(10):
            root = torch.randn(5, 5, dtype=torch.float64, generator=generator)
            P = torch.tril(root @ root.T)
            P = P + torch.tril(P, -1).T
            c, r = torch.full((1, 5), 0.3).double(), torch.full((1, 5), 0.7).double()
            T = 0.9999 / torch.linalg.eigvalsh(P)[-1].expand(1, 5)
            bound = mpmath.matrix(Gate("", c, r).bound(P[None, None], T)[0, 0].tolist())
            exact = exact_gate(mpmath.matrix(P.tolist()), c[0].tolist(), r[0].tolist(), T[0].tolist())
            assert min(mpmath.eigsy(bound - exact, eigvals_only=True)) >= -(mpmath.mpf(10) ** -45)


def margin_of_floats() -> None:
    """A Lipschitz margin holds for a float network whose rounding is all there is."""
    model = _cancelling(nn.LeakyReLU(0.5), nn.Linear(1, 1)).eval()
    x = torch.rand(8, 32).repeat(1, 2) + 0.5
    domain = LpBall(x, 0.0)
    claim = Spec(torch.tensor([[[1.0], [-1.0]]]).expand(8, -1, -1), torch.zeros(8, 2))
    with torch.no_grad():
        found = LipschitzMargin("product").bound(prepare(model, domain), domain, claim, FloatAnyOrder(torch.float32))
        execute, generator = AnyOrder(graph_of(model, domain)), torch.Generator().manual_seed(0)
        for _ in range(10):
            values = execute(x, generator)
            assert bool((found <= claim.rows(list(values.values())[-1])).all())


def program_with_noise() -> None:
    """Multipliers of the wrong sign prove nothing that is false."""
    torch.manual_seed(3)
    model = models.mlp((2, 4, 2), "tanh").eval()
    domain, claim = LpBall(torch.randn(3, 2), 0.5), certify.class_margins(torch.tensor([0, 1, 0]), 2)
    with torch.no_grad():
        met = torch.stack([claim.rows(model(x)) for x in domain.sample(500, torch.Generator().manual_seed(0))]).amin(0)
        for method in (LP(), SemidefiniteProgram()):
            found = method.bound(prepare(model, domain), domain, claim, Real())
            assert bool((found <= met).all())
            assert bool((found > -1e3).all())


def tailed_facts() -> None:
    """The facts of a KAF with linear tails, on short random intervals around and beyond its ends."""
    for facts, channels in TailedFacts.examples()[:2]:
        check_activation(facts, channels, cases=60)


def hardswish_facts() -> None:
    check_activation(smooth.Hardswish(), cases=100)


def sums_by_powers() -> None:
    """The float32 sum is exact to a millionth of its weights, near and far; the contract has room for five."""
    kaf = models.KAF(20)
    with torch.no_grad():
        kaf.alpha.copy_(torch.eye(20))
    x = torch.cat([torch.linspace(-9, 9, 6001), torch.tensor([60.0, -1e4, 1e30])])[:, None].expand(-1, 20)
    _, d, gamma = (value.detach().double() for value in kaf.gaussian())
    exact = torch.exp(-gamma * (x.double() - d).square())
    assert bool(((kaf(x).detach().double() - exact).abs() <= 1e-6).all())


def worst_case_losses() -> None:
    """The loss of certified training is above that of every image of the ball."""
    torch.manual_seed(0)
    model, x, y = models.mlp([4, 16, 3]), torch.rand(8, 4), torch.arange(8) % 3
    batch = Batch(model, x, y, 3, torch.Generator())
    ball = Threat(0.2).ball(x)
    worst = worst_loss(batch, ball, "ibp").detach()
    with torch.no_grad():
        assert all(batch.loss(model(points)) <= worst for points in ball.sample(50))
