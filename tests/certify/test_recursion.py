"""The covariance recursion: certificates that hold, values at the known optimum, and the published mistakes."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace

import mpmath
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from exact_recursion import exact_gate
from random_nets import attained, dense, random_net
from shared_data import SHARED, needs_shared
from torch import nn

from certify import LpBall, class_margins
from certify.errors import InvalidInput, UnsupportedOperation
from certify.graph import trace
from certify.lipschitz import compile as compiling
from certify.lipschitz import lipschitz_constant
from certify.lipschitz.chain import Chain
from certify.lipschitz.estimate import Question, ask
from certify.lipschitz.fourier import Torus
from certify.lipschitz.hermitian import top
from certify.lipschitz.recursion import Recursion, chain_of, recheck
from certify.lipschitz.steps import Gate, Mix, Renew, Source
from certify.results import LipschitzEstimate
from certify.testing import check_lipschitz
from models import KAF, mlp

INF = math.inf
QUICK = Recursion(steps=6, time_limit=5)


def _chain(model: nn.Module, shape: tuple[int, ...], p: float = 2.0) -> Chain:
    graph = trace(model.double(), torch.zeros(1, *shape, dtype=torch.float64))
    with torch.no_grad():
        return chain_of(Question(graph, p, None, None), "crown")


# Values.


@needs_shared
@pytest.mark.shared
@pytest.mark.parametrize("name", ["lipsdp_random", "lipsdp_mnist", "eclipse_lyr2n80test1", "eclipse_mnist_3x100"])
def test_published_networks_are_solved_to_their_optimum(name: str) -> None:
    assert SHARED is not None
    case = json.loads((SHARED / "lipschitz" / "expected.json").read_text())["cases"][name]
    arrays = np.load(SHARED / "lipschitz" / case["file"])
    model = dense(*(torch.from_numpy(arrays[key]) for key in sorted(arrays.files)))
    found = lipschitz_constant(model, input_shape=(model[0].in_features,))
    known = case.get("exact", case.get("LipSDP_neuron_Clarabel", case.get("best_known_upper")))
    assert case.get("exact", case["all_active_path_norm"]) <= found.value <= known + 1e-4
    assert found.value >= case.get("LipSDP_neuron_Clarabel", 0) * (1 - 1e-7)
    fast = lipschitz_constant(model, input_shape=(model[0].in_features,), method="eclipse-fast")
    assert fast.value == pytest.approx(case["ECLipsE_Fast"], rel=1e-9)
    check_lipschitz(model, found, input_shape=(model[0].in_features,))


@pytest.mark.parametrize("act", ["relu", "kaf", "silu"])
def test_the_optimum_is_that_of_a_semidefinite_solver(act: str) -> None:
    torch.manual_seed(3)
    model = mlp((5, 6, 7, 3), act).eval()
    best = lipschitz_constant(model, input_shape=(5,))
    solver = lipschitz_constant(model, input_shape=(5,), method="lipsdp-neuron")
    coarse = lipschitz_constant(model, input_shape=(5,), method="lipsdp-layer")
    assert best.value == pytest.approx(solver.value, rel=2e-5)
    assert best.value <= coarse.value * (1 + 1e-6)
    check_lipschitz(model, solver, input_shape=(5,))


def test_deep_networks_stay_finite_and_tight() -> None:
    torch.manual_seed(0)
    weights = [torch.randn(8, 8) / math.sqrt(8) for _ in range(30)]
    model = dense(*weights)
    best = lipschitz_constant(model, input_shape=(8,), method=Recursion(steps=8))
    fast = lipschitz_constant(model, input_shape=(8,), method="eclipse-fast")
    assert 0 < best.value <= fast.value / 10


def test_nonnegative_weights_have_the_constant_of_their_product() -> None:
    torch.manual_seed(1)
    weights = [torch.rand(*shape).double() for shape in ((6, 4), (5, 6), (2, 5))]
    exact = float(torch.linalg.matrix_norm(weights[2] @ weights[1] @ weights[0], 2))
    found = lipschitz_constant(dense(*weights), input_shape=(4,)).value
    assert exact <= found <= exact * (1 + 1e-5)


def test_a_linf_row_is_no_less_than_every_activation_pattern_and_near_it() -> None:
    """The formal constant max over patterns of ||w2 D W1||_1; Wang et al. measure 1.00 to 1.10 times it."""
    torch.manual_seed(2)
    first, second = torch.randn(8, 6).double(), torch.randn(1, 8).double()
    patterns = torch.tensor(list(itertools.product((0.0, 1.0), repeat=8)), dtype=torch.float64)
    formal = float(((patterns * second) @ first).abs().sum(1).max())
    found = lipschitz_constant(dense(first, second), p=INF, input_shape=(6,)).value
    product = lipschitz_constant(dense(first, second), p=INF, input_shape=(6,), method="product").value
    assert formal <= found <= 1.15 * formal < product


def test_a_convolutional_network_is_its_dense_twin() -> None:
    """The order of flattened outputs (channel, height, width) matters; a published table has it wrong."""
    torch.manual_seed(4)
    conv, head = nn.Conv2d(2, 3, 3, stride=2, padding=1, bias=False).double(), nn.Linear(27, 3, bias=False).double()
    model = nn.Sequential(conv, nn.ReLU(), nn.Flatten(), head).eval()
    eye = torch.eye(50, dtype=torch.float64).view(50, 2, 5, 5)
    twin = dense(conv(eye).detach().flatten(1).T, head.weight.detach())
    whole = lipschitz_constant(model, input_shape=(2, 5, 5)).value
    assert whole == pytest.approx(lipschitz_constant(twin, input_shape=(50,)).value, rel=1e-5)


def test_rows_are_bounded_one_by_one() -> None:
    torch.manual_seed(5)
    model = mlp((4, 8, 8, 3), "tanh").eval()
    spec = class_margins(torch.tensor([0, 1]), 3)
    found = lipschitz_constant(model, input_shape=(4,), spec=spec)
    assert found.rows[0][0] == found.rows[1][0]  # y0 - y1 and y1 - y0
    for sample, rows in enumerate(found.rows):
        for place, value in enumerate(rows):
            single = nn.Sequential(model, nn.Linear(3, 1, bias=False)).eval()
            single[1].weight.data = spec.C[sample, place][None]
            alone = lipschitz_constant(single, input_shape=(4,)).value
            assert value == pytest.approx(alone, rel=1e-4)
    check_lipschitz(model, found, input_shape=(4,), spec=spec)


def test_local_constants_are_below_global_ones() -> None:
    torch.manual_seed(6)
    model = mlp((4, 8, 8, 3), "relu").eval()
    x = torch.randn(2, 4)
    for p in (2, INF):
        whole = lipschitz_constant(model, p=p, input_shape=(4,)).value
        values = [lipschitz_constant(model, p=p, domain=LpBall(x, r, p=p)).value for r in (0.0, 0.05, 100.0)]
        lower = lipschitz_constant(model, p=p, domain=LpBall(x, 0.05, p=p), method="jacobian").value
        assert lower <= values[1]
        assert values == sorted(values)
        assert values[-1] <= whole * (1 + 1e-4)
        at_a_point = [torch.autograd.functional.jacobian(model, x[i : i + 1])[0, :, 0].double() for i in range(2)]
        exact = max(float(torch.linalg.matrix_norm(J, 2 if p == 2 else INF)) for J in at_a_point)
        assert values[0] == pytest.approx(exact, rel=1e-5)


# Soundness.


@pytest.mark.parametrize("seed", range(40))
def test_no_attained_ratio_is_above_a_random_networks_bound(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, shape = random_net(seed)
    monkeypatch.setattr(compiling, "NEURONS", (0, 12, 256)[seed % 3])
    monkeypatch.setattr(compiling, "WORK", (2e9, 2e9, 2e4)[seed % 3])
    domain = LpBall(torch.rand(2, *shape), 0.3, p=2) if seed % 2 else None
    options = {"domain": domain} if domain is not None else {"input_shape": shape}
    lower = attained(model, shape, domain)
    for method in (QUICK, "eclipse-fast", "product"):
        assert lower <= lipschitz_constant(model, method=method, **options).value * (1 + 1e-12)


class _Reflect(nn.Module):
    def forward(self, x):
        return F.pad(x, (1, 1, 1, 1), mode="reflect")


def test_segments_that_cannot_be_expressed_are_bridged(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(7)
    model = nn.Sequential(
        nn.Conv2d(1, 3, 3, padding=1),
        _Reflect(),
        nn.Conv2d(3, 3, 3),
        nn.ReLU(),
        nn.Conv2d(3, 2, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(72, 3),
    ).eval()
    monkeypatch.setattr(compiling, "NEURONS", 0)
    monkeypatch.setattr(compiling, "WORK", 2e4)
    chain = _chain(model, (1, 6, 6))
    assert any(isinstance(step, (Renew, Mix)) for step in chain.steps[:2])
    found = lipschitz_constant(model, input_shape=(1, 6, 6), method=QUICK).value
    assert attained(model, (1, 6, 6), None) <= found
    with pytest.raises(UnsupportedOperation, match="linf"):
        lipschitz_constant(model, p=INF, input_shape=(1, 6, 6), method=QUICK)


@pytest.mark.parametrize("slope", [-1.0, -0.5])
def test_negative_slopes_count(slope: float) -> None:
    """Dropping the term a b < 0 of a sector gives .1 for a network whose constant is 1."""
    act = nn.LeakyReLU(slope)
    model = nn.Sequential(nn.Linear(1, 2, bias=False), act, nn.Linear(2, 1, bias=False)).double().eval()
    model[0].weight.data = torch.tensor([[1.0], [-1.0]]).double()
    model[2].weight.data = torch.tensor([[1.0, -1.0]]).double()
    lower = attained(model, (1,), None)
    for method in ("recursion", "eclipse-fast", "product", "lipsdp-neuron", "lipsdp-layer"):
        assert lower <= lipschitz_constant(model, input_shape=(1,), method=method).value


def test_the_difference_of_two_relus_is_one() -> None:
    """relu(x) - relu(x - 1): coupled multipliers (LipSDP-Network) give 4.7e-6."""
    model = dense(torch.ones(2, 1), torch.tensor([[1.0, -1.0]]))
    model[0].bias = nn.Parameter(torch.tensor([0.0, -1.0]).double())
    for method in ("recursion", "eclipse-fast", "lipsdp-neuron", "lipsdp-layer"):
        assert lipschitz_constant(model, input_shape=(1,), method=method).value >= 1 - 1e-15


def test_a_step_is_above_the_exact_one_in_sixty_digits() -> None:
    generator = torch.Generator().manual_seed(0)
    with mpmath.workdps(60):
        for scale in (1.0, 1e-9, 1e9):
            root = torch.randn(5, 5, dtype=torch.float64, generator=generator) * scale
            root[0] *= 1e-6
            P = root @ root.T
            P = torch.tril(P) + torch.tril(P, -1).T
            c, r = (torch.rand(1, 3, dtype=torch.float64, generator=generator) for _ in range(2))
            r[0, 1] = 0
            T = 1 / (P.diagonal()[:3] * (2 + torch.rand(3, dtype=torch.float64, generator=generator)) * 3)[None]
            gate = Gate("act", c, r)
            bound = mpmath.matrix(gate.bound(P[None, None], T)[0, 0].tolist())
            exact = exact_gate(mpmath.matrix(P.tolist()), c[0].tolist(), r[0].tolist(), T[0].tolist())
            least = min(mpmath.eigsy(bound - exact, eigvals_only=True))
            assert least >= -(mpmath.mpf(10) ** -45) * scale**2
            assert mpmath.norm(bound - exact) <= 1e-11 * mpmath.norm(exact)


def test_the_largest_eigenvalue_is_bounded_from_above() -> None:
    generator = torch.Generator().manual_seed(1)
    root = torch.randn(4, 1, 6, 6, dtype=torch.float64, generator=generator)
    P = root @ root.mT
    P[1] = torch.eye(6, dtype=torch.float64)
    exact = [max(mpmath.eigsy(mpmath.matrix(p[0].tolist()), eigvals_only=True)) for p in P]
    found = top(P)
    for value, truth in zip(found.tolist(), exact, strict=True):
        assert truth <= value <= truth * (1 + 1e-11)
    P[2] = torch.nan
    assert torch.isinf(top(P)[2])


def test_multipliers_that_are_too_small_prove_nothing() -> None:
    torch.manual_seed(8)
    model = mlp((3, 6, 6, 2), "relu").double().eval()
    found = lipschitz_constant(model, input_shape=(3,))
    question = Question(trace(model, torch.zeros(1, 3, dtype=torch.float64)), 2.0, None, None)
    assert recheck(question, found.multipliers) == pytest.approx([found.value], rel=1e-11)
    for name in found.multipliers:
        for factor in (0.5, 1e-3):
            rows = tuple(tuple(value * factor for value in row) for row in found.multipliers[name])
            assert recheck(question, {**found.multipliers, name: rows})[0] > found.value
        (row,) = found.multipliers[name]
        for bad in (-1.0, 0.0, math.nan, -math.inf):
            for changed in ((bad * row[0], *row[1:]), tuple(bad * value for value in row)):
                assert recheck(question, {**found.multipliers, name: (changed,)})[0] == INF


@pytest.mark.parametrize("bad", [-1.0, 0.0, math.nan, -math.inf])
def test_bad_multipliers_of_inputs_and_pools_prove_nothing(bad: float) -> None:
    torch.manual_seed(12)
    layers = [nn.Conv2d(1, 2, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(8, 2)]
    model = nn.Sequential(*layers).double().eval()
    found = lipschitz_constant(model, p=INF, input_shape=(1, 4, 4), method=QUICK)
    question = ask(model, p=INF, input_shape=(1, 4, 4))
    assert set(found.multipliers) == {"input", "1", "2"}
    assert max(recheck(question, found.multipliers)) <= found.value
    for name, rows in found.multipliers.items():
        changed = tuple((bad * row[0], *row[1:]) for row in rows)
        assert min(recheck(question, {**found.multipliers, name: changed})) == INF


def test_a_certificate_travels_and_is_checked() -> None:
    torch.manual_seed(9)
    model = mlp((4, 5, 3), "kaf").eval()
    domain = LpBall(torch.randn(2, 4), 0.1, p=2)
    spec = class_margins(torch.tensor([0, 1]), 3)
    found = lipschitz_constant(model, domain=domain, spec=spec)
    again = LipschitzEstimate.from_dict(json.loads(json.dumps(found.to_dict())))
    assert again == found
    check_lipschitz(model, again, domain=domain, spec=spec)
    with pytest.raises(AssertionError, match="certif"):
        check_lipschitz(model, replace(found, value=found.value * 0.999), domain=domain, spec=spec)
    with pytest.raises(InvalidInput, match="multipliers"):
        check_lipschitz(model, replace(found, multipliers={}), domain=domain, spec=spec)


# Gradients and the geometry of tori.


class _Branches(nn.Module):
    """Everything at once: strides, a shortcut, a max-pool, a read-out, a dense layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.act = nn.Conv2d(1, 2, 3, padding=1), KAF(2)
        self.a, self.mid, self.b = nn.Conv2d(2, 3, 3, 2, 1), nn.LeakyReLU(-0.3), nn.Conv2d(3, 3, 3, 1, 1)
        self.short, self.end = nn.Conv2d(2, 3, 1, 2), nn.ReLU()
        self.pool, self.hidden, self.head = nn.MaxPool2d(2, 1), nn.Linear(12, 4), nn.Linear(4, 2)

    def forward(self, x):
        x = self.act(self.stem(x))
        x = self.pool(self.end(self.b(self.mid(self.a(x))) + self.short(x)))
        return self.head(torch.tanh(self.hidden(x.flatten(1))))


@pytest.mark.parametrize("p", [2, INF])
def test_gradients_are_those_of_finite_differences(p: float, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(10)
    monkeypatch.setattr(compiling, "NEURONS", 0)
    chain = _chain(_Branches().eval(), (1, 6, 6), p)
    kinds = {type(step).__name__ for step in chain.steps}
    assert kinds >= {"Source", "Gate", "Mix", "Fold", "Renew", "Readout"}
    every = torch.arange(chain.problems)
    x = chain.start() + 0.7 + 0.1 * torch.randn(chain.problems, chain.size, dtype=torch.float64)
    _, gradient = chain.objective(x, every, 0.1)
    steps = 1e-6 * torch.eye(chain.size, dtype=torch.float64)
    numeric = torch.stack(
        [(chain.objective(x + d, every, 0.1)[0] - chain.objective(x - d, every, 0.1)[0]) / 2e-6 for d in steps], 1
    )
    torch.testing.assert_close(gradient, numeric, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("kernel", [(1, 1, 3), (2, 1, 2, 3)])
def test_a_torus_carries_convolutions_and_strides(kernel: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(2)
    dims = len(kernel) - 2
    weight = torch.randn(kernel, dtype=torch.float64, generator=generator)
    torus = Torus((5,) * dims, (8,) * dims)
    blocks, error = torus.transfer(weight, torus.frequencies, (1,) * dims, (1,) * dims)
    x = torch.zeros((1, *torus.size), dtype=torch.float64)
    x[(0, *[slice(0, 5)] * dims)] = torch.randn((5,) * dims, dtype=torch.float64, generator=generator)
    shifted = torch.zeros(kernel[0], *torus.size, dtype=torch.float64)
    for tap in itertools.product(*(range(k) for k in kernel[2:])):
        moved = torch.roll(x, [1 - t for t in tap], list(range(1, dims + 1)))
        shifted += weight[(slice(None), 0, *tap)].view(-1, *[1] * dims) * moved
    axes = list(range(1, dims + 1))
    place = tuple(torus.frequencies.T)
    expected = torch.fft.fftn(shifted, dim=axes)[(slice(None), *place)]
    found = blocks[..., 0].T * torch.fft.fftn(x, dim=axes)[(0, *place)]
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert float(error.max()) < 1e-12
    index, mirrored = torus.aliases((2,) * dims)
    spectrum = torch.fft.fftn(shifted[0])[place]
    parts = torch.where(mirrored, spectrum[index].conj(), spectrum[index]).sum(1) / 2**dims
    coarse = Torus(torus.grid, (4,) * dims)
    thinned = shifted[0][tuple([slice(None, None, 2)] * dims)]
    torch.testing.assert_close(parts, torch.fft.fftn(thinned)[tuple(coarse.frequencies.T)], rtol=1e-12, atol=1e-12)


def test_rows_on_a_torus_have_their_norm() -> None:
    generator = torch.Generator().manual_seed(3)
    rows = torch.randn(3, 2, 4, 5, dtype=torch.float64, generator=generator)
    torus = Torus((4, 5), (6, 7))
    blocks, error = torus.rows(rows, torus.frequencies)
    gram = torch.einsum("fmc,fnc,f->mn", blocks, blocks.conj(), torus.weights.to(blocks.dtype)).real
    torch.testing.assert_close(gram, rows.flatten(1) @ rows.flatten(1).T, rtol=1e-12, atol=1e-12)
    assert float(error.max()) < 1e-11


def test_less_time_gives_a_larger_bound_never_a_wrong_one() -> None:
    torch.manual_seed(11)
    model = mlp((6, 20, 20, 4), "relu").eval()
    fast = lipschitz_constant(model, input_shape=(6,), method="eclipse-fast").value
    hurried = lipschitz_constant(model, input_shape=(6,), method=Recursion(time_limit=1e-9)).value
    best = lipschitz_constant(model, input_shape=(6,)).value
    assert attained(model, (6,), None) <= best < hurried <= fast * (1 + 1e-12)
    with pytest.raises(InvalidInput, match="steps"):
        Recursion(steps=0)


def test_what_the_solver_cannot_take_is_refused() -> None:
    conv = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 2)).eval()
    with pytest.raises(UnsupportedOperation, match="dense sequence"):
        lipschitz_constant(conv, input_shape=(1, 8, 8), method="lipsdp-neuron")
    with pytest.raises(UnsupportedOperation, match="200 hidden neurons"):
        lipschitz_constant(mlp((4, 200, 2)).eval(), input_shape=(4,), method="lipsdp-neuron")
    assert isinstance(_chain(mlp((4, 5, 2)).eval(), (4,)).steps[0], Source)
