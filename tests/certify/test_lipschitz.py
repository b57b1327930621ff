"""Lipschitz constants: upper bounds are never below what is attained, and equal known answers."""

from __future__ import annotations

import json
import math
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from random_nets import dense
from shared_data import SHARED, load_case, needs_shared, with_our_kafs
from torch import nn

import certify
from certify.errors import InvalidInput, UnsupportedOperation
from certify.lipschitz import lipschitz_constant
from certify.lipschitz.product import ProductBound
from certify.lipschitz.sampled import JacobianAscent
from certify.lipschitz.spectral import convolution_norm, singular_bound
from certify.results import LipschitzEstimate
from certify.sets import Box, LpBall
from certify.specs import class_margins, logit_sign

product_bound = partial(lipschitz_constant, method="product")
INF = torch.inf


def _matrix(layer: nn.Module, shape: tuple[int, ...]) -> torch.Tensor:
    """The matrix of an affine layer, column by column."""
    layer = layer.double().eval()
    size = torch.Size(shape).numel()
    eye = torch.eye(size, dtype=torch.float64).view(size, *shape)
    with torch.no_grad():
        return (layer(eye) - layer(torch.zeros_like(eye))).flatten(1).T


def _close(found: float, exact: float, rel: float = 1e-9) -> None:
    assert exact <= found <= exact * (1 + rel) + 1e-300


def test_zero_padded_convolution_beats_the_fft_of_its_own_size() -> None:
    """[1, -1, 0] on three points: the FFT of size 3 gives 1.732, the truth is 1.801938."""
    kernel = torch.tensor([1.0, -1.0, 0.0], dtype=torch.float64).view(1, 1, 3)
    exact = float(torch.linalg.matrix_norm(_matrix(_conv1d(kernel), (1, 3)), ord=2))
    assert exact == pytest.approx(1.801938, abs=1e-6)
    assert exact <= convolution_norm(kernel, (3,), (1,)) <= 2.0


def _conv1d(kernel: torch.Tensor) -> nn.Module:
    layer = nn.Conv1d(1, 1, 3, padding=1, bias=False)
    layer.weight.data = kernel.clone()
    return layer


CONVOLUTIONS = [
    (nn.Conv2d(2, 3, 3, padding=1), (2, 5, 6)),
    (nn.Conv2d(2, 4, 3), (2, 6, 5)),
    (nn.Conv2d(3, 2, 4, stride=2, padding=1), (3, 7, 7)),
    (nn.Conv2d(2, 2, 3, padding=2, dilation=2), (2, 6, 6)),
    (nn.Conv2d(4, 6, 3, padding=1, groups=2), (4, 4, 4)),
    (nn.Conv1d(2, 3, 5, padding=4), (2, 7)),
    (nn.ConvTranspose2d(3, 2, 3, stride=2, padding=1, output_padding=1), (3, 4, 4)),
    (nn.ConvTranspose2d(4, 2, 3, groups=2), (4, 3, 3)),
    (nn.ConvTranspose1d(2, 3, 3, dilation=2), (2, 5)),
    (nn.AvgPool2d(2), (2, 4, 4)),
    (nn.AvgPool2d(3, stride=1, padding=1), (1, 5, 5)),
    (nn.AdaptiveAvgPool2d(1), (3, 4, 4)),
    (nn.Linear(5, 4), (3, 5)),
]


@pytest.mark.parametrize(("layer", "shape"), CONVOLUTIONS, ids=lambda item: str(item)[:40])
@pytest.mark.parametrize("p", [2, INF])
def test_affine_layers_are_never_below_their_dense_norm(layer: nn.Module, shape: tuple[int, ...], p: float) -> None:
    matrix = _matrix(layer, shape)
    exact = float(torch.linalg.matrix_norm(matrix, ord=p))
    found = product_bound(layer, p=p, input_shape=shape).value
    torus = p == 2 and "Conv" in type(layer).__name__
    _close(found, exact, 1.0 if torus else 1e-9)


def test_the_torus_bound_is_close_on_larger_images() -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(2, 2, 3, padding=1, bias=False)
    exact = float(torch.linalg.matrix_norm(_matrix(layer, (2, 14, 14)), ord=2))
    _close(product_bound(layer, input_shape=(2, 14, 14)).value, exact, 0.03)


def test_a_convolution_is_not_its_reshaped_kernel() -> None:
    torch.manual_seed(1)
    layer = nn.Conv2d(1, 4, 3, padding=1, bias=False).double().eval()
    reshaped = float(torch.linalg.matrix_norm(layer.weight.detach().flatten(1), ord=2))
    assert product_bound(layer, input_shape=(1, 8, 8)).value > 1.2 * reshaped


@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (7, 3), (40, 40)])
def test_singular_bounds_hold_on_hard_matrices(shape: tuple[int, int]) -> None:
    torch.manual_seed(2)
    for matrix in (
        torch.randn(shape, dtype=torch.float64),
        torch.eye(*shape, dtype=torch.float64),
        torch.ones(shape, dtype=torch.float64),
        1e-200 * torch.randn(shape, dtype=torch.float64),
        1e200 * torch.randn(shape, dtype=torch.float64),
        torch.linalg.qr(torch.randn(shape, dtype=torch.float64))[0],
    ):
        exact = float(torch.linalg.matrix_norm(matrix / matrix.abs().max(), ord=2) * matrix.abs().max())
        assert exact * (1 - 1e-15) <= singular_bound(matrix[None]) <= exact * (1 + 1e-9)
    assert singular_bound(torch.zeros(1, *shape, dtype=torch.float64)) == 0
    stack = torch.randn(200, 4, 6, dtype=torch.complex128)
    exact = float(torch.linalg.matrix_norm(stack, ord=2).max())
    assert exact <= singular_bound(stack) <= exact * (1 + 1e-9)
    assert singular_bound(stack, 100.0) == pytest.approx(100.0)
    assert singular_bound(stack, 100.0) >= 100.0


class _Piece(nn.Module):
    """relu(x) - relu(x - 1): rises from 0 to 1 once, so its constant is 1."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(1, 2), nn.Linear(2, 1)
        with torch.no_grad():
            self.inner.weight.copy_(torch.ones(2, 1))
            self.inner.bias.copy_(torch.tensor([0.0, -1.0]))
            self.outer.weight.copy_(torch.tensor([[1.0, -1.0]]))
            self.outer.bias.zero_()

    def forward(self, x):
        return self.outer(torch.relu(self.inner(x)))


@pytest.mark.parametrize("p", [2, INF])
def test_the_difference_of_two_relus_is_never_below_one(p: float) -> None:
    model = _Piece().eval()
    upper = product_bound(model, p=p, input_shape=(1,))
    lower = lipschitz_constant(model, p=p, input_shape=(1,), method="jacobian")
    assert upper.value >= 1 >= lower.value
    assert lower.value == pytest.approx(1)
    rising = Box(torch.tensor([[0.2]]), torch.tensor([[0.8]]))
    _close(product_bound(model, p=p, domain=rising, spec=logit_sign(torch.tensor([1]))).value, 1.0)
    flat = product_bound(model, p=p, domain=Box(torch.tensor([[-3.0]]), torch.tensor([[-1.0]])))
    assert flat.value == 0


def test_a_lower_bound_is_no_artefact_of_a_kink() -> None:
    """x - (relu(x) - relu(-x)) is 0, but autograd calls its slope 1 at the kink."""

    class Zero(nn.Module):
        def forward(self, x):
            return x - (torch.relu(x) - torch.relu(-x))

    domain = Box(torch.zeros(1, 3), torch.ones(1, 3))
    for options in ({"domain": domain}, {"input_shape": (3,)}, {"domain": LpBall(torch.zeros(1, 3), 1.0)}):
        assert lipschitz_constant(Zero().eval(), method="jacobian", **options).value == 0


class _Residual(nn.Module):
    def __init__(self, act: type[nn.Module]) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(1, 3, 3, padding=1, stride=2), nn.BatchNorm2d(3)
        self.act, self.conv, self.pool = act(), nn.Conv2d(3, 3, 3, padding=1), nn.MaxPool2d(2, 1)
        self.head = nn.Linear(24, 3)
        nn.init.uniform_(self.norm.weight, 0.5, 2)
        nn.init.uniform_(self.norm.running_var, 0.2, 2)

    def forward(self, x):
        y = self.act(self.norm(self.stem(x)))
        z = self.pool(self.act(y + self.conv(y)))
        return self.head(torch.cat([z, -0.5 * z], 1).flatten(1))


def _networks() -> list[tuple[nn.Module, tuple[int, ...]]]:
    found: list[tuple[nn.Module, tuple[int, ...]]] = []
    for seed, act in enumerate((nn.ReLU, nn.Tanh, nn.SiLU)):
        torch.manual_seed(seed)
        found.append((nn.Sequential(nn.Linear(4, 9), act(), nn.Linear(9, 7), act(), nn.Linear(7, 3)), (4,)))
        found.append((_Residual(act), (1, 6, 6)))
        found.append(
            (nn.Sequential(nn.Conv2d(1, 2, 3), act(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(8, 3)), (1, 6, 6))
        )
    return [(model.eval(), shape) for model, shape in found]


@pytest.mark.parametrize("p", [2, INF])
@pytest.mark.parametrize("case", range(9))
def test_lower_never_exceeds_upper_and_local_never_exceeds_global(case: int, p: float) -> None:
    model, shape = _networks()[case]
    x = torch.rand(2, *shape, generator=torch.Generator().manual_seed(case))
    domain = LpBall(x, 0.1)
    spec = class_margins(torch.tensor([0, 2]), 3)
    ascent = JacobianAscent(starts=6, steps=8)
    whole = product_bound(model, p=p, input_shape=shape)
    local = product_bound(model, p=p, domain=domain)
    met = lipschitz_constant(model, p=p, domain=domain, method=ascent)
    anywhere = lipschitz_constant(model, p=p, input_shape=shape, method=ascent)
    assert 0 < met.value <= local.value <= whole.value * (1 + 1e-9)
    assert anywhere.value <= whole.value
    rows = product_bound(model, p=p, domain=domain, spec=spec)
    gradients = lipschitz_constant(model, p=p, domain=domain, spec=spec, method=ascent)
    assert np.shape(rows.rows) == np.shape(gradients.rows) == (2, 2)
    assert (np.array(gradients.rows) <= np.array(rows.rows)).all()
    assert rows.value == max(map(max, rows.rows))
    assert rows.value <= local.value * (math.sqrt(2) if p == 2 else 2) * (1 + 1e-9)


@pytest.mark.parametrize("p", [2, INF])
@pytest.mark.parametrize("case", range(9))
def test_difference_quotients_stay_below_the_upper_bound(case: int, p: float) -> None:
    model, shape = _networks()[case]
    model = model.double()
    generator = torch.Generator().manual_seed(case)
    domain = LpBall(torch.rand(1, *shape, generator=generator).double(), 0.3)
    spec = class_margins(torch.tensor([1]), 3, dtype=torch.float64)
    left, right = (domain.sample(200, generator)[:, 0] for _ in range(2))
    distance = torch.linalg.vector_norm((left - right).flatten(1), ord=p, dim=1)
    with torch.no_grad():
        moved = model(left) - model(right)
    quotient = float((torch.linalg.vector_norm(moved, ord=p, dim=1) / distance).max())
    assert quotient <= product_bound(model, p=p, domain=domain).value
    bound = torch.tensor(product_bound(model, p=p, domain=domain, spec=spec).rows[0])
    assert bool(((moved @ spec.C[0].T).abs().amax(1) <= bound.max() * distance).all())
    assert bool(((moved @ spec.C[0].T).abs() <= bound * distance[:, None]).all())


@pytest.mark.parametrize("p", [2, INF])
def test_an_affine_model_is_exact_from_both_sides(p: float) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.Flatten(), nn.BatchNorm1d(4)).double().eval()
    exact = float(torch.linalg.matrix_norm(_matrix(model, (5,)), ord=p))
    _close(product_bound(model, p=p, input_shape=(5,)).value, exact)
    lower = lipschitz_constant(model, p=p, input_shape=(5,), method="jacobian").value
    assert lower == pytest.approx(exact, rel=1e-9)
    deep = nn.Sequential(nn.Linear(5, 6), nn.Linear(6, 3)).double().eval()
    spec = class_margins(torch.tensor([0, 1]), 3, dtype=torch.float64)
    rows = torch.linalg.vector_norm(spec.C @ _matrix(deep, (5,)), ord=2 if p == 2 else 1, dim=2)
    found = product_bound(deep, p=p, input_shape=(5,), spec=spec)
    torch.testing.assert_close(torch.tensor(found.rows, dtype=torch.float64), rows, rtol=1e-9, atol=0)
    assert bool((torch.tensor(found.rows, dtype=torch.float64) >= rows).all())


def test_slopes_go_inside_the_norm() -> None:
    """||diag(slopes) W||, not max(slopes) ||W||; a dead neuron costs nothing."""
    torch.manual_seed(0)
    slopes = torch.tensor([1.0, 0.1, 2.0, 0.3])
    act = nn.PReLU(4)
    act.weight.data = slopes.clone()
    dense = nn.Linear(3, 4)
    model = nn.Sequential(dense, act).eval()
    inside = torch.maximum(slopes, torch.ones(4)).double()[:, None] * dense.weight.double()
    exact = float(torch.linalg.matrix_norm(inside.detach(), ord=2))
    _close(product_bound(model, input_shape=(3,)).value, exact)
    conv = nn.Conv2d(1, 4, 3).eval()
    convs = nn.Sequential(conv, act).eval()
    naive = 2.0 * product_bound(conv, input_shape=(1, 6, 6)).value
    assert product_bound(convs, input_shape=(1, 6, 6)).value < 0.99 * naive
    estimate = product_bound(convs, input_shape=(1, 6, 6))
    assert estimate.layers["1"] == pytest.approx(2)
    assert estimate.layers["0"] == pytest.approx(naive / 2)


class _Graph(nn.Module):
    def __init__(self, run) -> None:
        super().__init__()
        self.run = run

    def forward(self, x):
        return self.run(x)


GRAPHS = [
    (lambda x: x + 2 * x, (3,), 3.0, 3.0),
    (lambda x: x - x, (3,), 2.0, 2.0),
    (lambda x: torch.cat([3 * x, 4 * x], 1), (3,), 5.0, 4.0),
    (lambda x: F.max_pool2d(x, 2, 1), (1, 4, 4), 2.0, 1.0),
    (lambda x: F.max_pool2d(x, 2), (1, 4, 4), 1.0, 1.0),
    (lambda x: F.pad(x, (1, 1)) * 2, (3,), 2.0, 2.0),
    (lambda x: F.pad(x, (2, 2), mode="reflect"), (1, 3), math.sqrt(3), 1.0),
    (lambda x: x.mean((2, 3)), (2, 4, 4), 0.25, 1.0),
    (lambda x: (x - 0.5) / 0.25, (3,), 4.0, 4.0),
    (lambda x: x.flatten(1)[:, 1:3], (2, 2), 1.0, 1.0),
]


@pytest.mark.parametrize("case", range(len(GRAPHS)))
def test_sums_concatenations_and_movements_have_their_textbook_factors(case: int) -> None:
    run, shape, euclidean, maximum = GRAPHS[case]
    _close(product_bound(_Graph(run).eval(), input_shape=shape).value, euclidean)
    _close(product_bound(_Graph(run).eval(), p=INF, input_shape=shape).value, maximum)


def test_answers_say_their_side_and_travel_as_plain_data() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).eval()
    spec = class_margins(torch.tensor([0]), 2)
    upper = product_bound(model, input_shape=(3,), spec=spec)
    lower = lipschitz_constant(model, input_shape=(3,), spec=spec, method="jacobian")
    assert (upper.side, lower.side) == ("upper", "lower")
    assert set(upper.layers) == {"0", "1", "2"}
    assert LipschitzEstimate.from_dict(json.loads(json.dumps(upper.to_dict()))) == upper
    assert {"product", "jacobian"} <= set(certify.registry.ESTIMATORS)
    assert model[0].weight.dtype == torch.float32


def test_the_same_seed_gives_the_same_lower_bound() -> None:
    model = _networks()[1][0]
    state = torch.get_rng_state()
    values = {
        lipschitz_constant(
            model, input_shape=(1, 6, 6), method=JacobianAscent(generator=torch.Generator().manual_seed(3))
        ).value
        for _ in range(2)
    }
    assert len(values) == 1
    assert torch.equal(state, torch.get_rng_state())


def test_bad_questions_are_typed_errors() -> None:
    model = nn.Sequential(nn.Linear(3, 2)).eval()
    with pytest.raises(InvalidInput, match="p = 3"):
        lipschitz_constant(model, p=3, input_shape=(3,))
    with pytest.raises(InvalidInput, match="input_shape"):
        lipschitz_constant(model)
    with pytest.raises(InvalidInput, match="interval-jacobian, jacobian"):
        lipschitz_constant(model, input_shape=(3,), method="guess")
    with pytest.raises(InvalidInput, match="2 samples"):
        lipschitz_constant(model, domain=LpBall(torch.zeros(1, 3), 1), spec=class_margins(torch.tensor([0, 1]), 2))
    with pytest.raises(InvalidInput, match="5 outputs"):
        lipschitz_constant(model, input_shape=(3,), spec=class_margins(torch.tensor([0]), 5))
    with pytest.raises(UnsupportedOperation):
        lipschitz_constant(nn.Sequential(nn.LayerNorm(3)).eval(), input_shape=(3,))
    with pytest.raises(InvalidInput):
        JacobianAscent(starts=0)
    with pytest.raises(InvalidInput, match="no intervals of layers"):
        lipschitz_constant(model, domain=LpBall(torch.zeros(1, 3), 1), method=ProductBound(intervals="auto-lirpa/ibp"))


@needs_shared
@pytest.mark.shared
def test_published_networks_have_their_known_products() -> None:
    assert SHARED is not None
    known = json.loads((SHARED / "lipschitz" / "expected.json").read_text())["cases"]
    for case in known.values():
        arrays = np.load(SHARED / "lipschitz" / case["file"])
        model = dense(*(torch.from_numpy(arrays[key]) for key in sorted(arrays.files)))
        upper = product_bound(model, input_shape=(model[0].in_features,)).value
        _close(upper, case["product_of_norms"] * (1 - 1e-12))
        assert upper >= case.get("exact", 0)


@needs_shared
@pytest.mark.shared
def test_a_kaf_network_gets_its_slopes_inside_the_norm() -> None:
    """Naive product times the largest slope: 135.0; slopes inside: 66.93; the largest Jacobian met: 26.46."""
    source, images, _, description = load_case("mnist_kaf_2x32")
    expected = source(images[:5])
    model = with_our_kafs(source)
    shape = tuple(images.shape[1:])
    torch.testing.assert_close(model(images[:5]), expected, rtol=1e-4, atol=1e-4)
    upper = product_bound(model, input_shape=shape)
    assert upper.value == pytest.approx(66.93, abs=0.02)
    domain = LpBall(images[:2], description["eps_raw"], clip=(0.0, 1.0))
    local = product_bound(model, domain=domain)
    lower = lipschitz_constant(model, domain=domain, method=JacobianAscent(starts=4, steps=6))
    assert 3 < lower.value <= local.value < upper.value


def test_a_function_without_second_derivatives_in_torch_is_climbed_along_its_gradient():
    model = nn.Sequential(nn.Linear(3, 8), nn.Hardsigmoid(), nn.Linear(8, 2)).eval()
    lower, upper = (lipschitz_constant(model, input_shape=(3,), method=m).value for m in ("jacobian", "recursion"))
    assert 0.3 * upper < lower <= upper
