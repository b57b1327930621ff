"""Fused KAFs: the same function and gradients as the others up to rounding, accurate everywhere, asked for by name."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn

import certify
from certify.rounding import gamma as roundings
from models import KAF, fuse, mlp
from models import fused as module
from models.fused import fused_sum, uniform_grid
from models.gaussian import gaussian_sum

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    WORKS = module._compiler_works("cpu")
needs_compiler = pytest.mark.skipif(not WORKS, reason="torch.compile finds no C++ compiler here")
pytestmark = [pytest.mark.slow, needs_compiler, pytest.mark.filterwarnings("ignore")]  # inductor's own

FAR = [1e2, -1e2, 3e3, -1e6, 1e15, -1e30, 3e38, -3e38]


def near_and_far(channels: int) -> torch.Tensor:
    return torch.cat([torch.linspace(-14, 14, 30_011), torch.tensor(FAR)])[:, None].expand(-1, channels)


def exact(kaf: KAF, x: torch.Tensor) -> torch.Tensor:
    return gaussian_sum(x.double(), *(value.detach().double() for value in kaf.gaussian()))


@pytest.mark.parametrize("size", [5, 16, 20, 33])
@pytest.mark.parametrize("convention", ["paper", "authors"])
def test_every_term_alone_is_accurate_everywhere(convention: str, size: int) -> None:
    kaf = fuse(KAF(size, size=size, convention=convention))
    with torch.no_grad():
        kaf.alpha.copy_(torch.eye(size))
        x = near_and_far(size)
        error = (kaf(x).double() - exact(kaf, x)).abs()
    assert float(error.max()) <= 1e-6
    assert float(error.max()) <= 0.5 * float(roundings(4 * size + 10, torch.float32))


@pytest.mark.parametrize("init", ["random", "elu", "relu"])
@pytest.mark.parametrize("trainable", [False, True])
def test_sums_are_accurate_relative_to_their_terms(init: str, trainable: bool) -> None:
    torch.manual_seed(0)
    kaf = fuse(KAF(6, init=init, trainable=trainable))
    x = near_and_far(6)
    error = (kaf(x).detach().double() - exact(kaf, x)).abs() / kaf.alpha.detach().double().abs().sum(1)
    assert float(error.max()) <= 1e-6


@pytest.mark.parametrize("gamma", [0.11, 1.0, 1.6])
def test_other_bandwidths_are_accurate_too(gamma: float) -> None:
    kaf = fuse(KAF(20, gamma=gamma))
    with torch.no_grad():
        kaf.alpha.copy_(torch.eye(20))
    x = near_and_far(20)
    assert float((kaf(x).detach().double() - exact(kaf, x)).abs().max()) <= 1e-6


SHAPES = {
    "dense": ((37, 6), 6),
    "images": ((3, 6, 5, 4), 6),
    "sequences": ((3, 6, 11), 6),
    "one function": ((3, 6, 5, 4), 1),
    "one function, dense": ((37, 6), 1),
    "empty": ((0, 6, 5, 4), 6),
}


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("trainable", [False, True])
def test_values_and_gradients_are_those_of_the_eager_sum(name: str, trainable: bool) -> None:
    torch.manual_seed(1)
    shape, channels = SHAPES[name]
    eager = KAF(channels, trainable=trainable)
    fused = fuse(copy.deepcopy(eager))
    inputs = [3 * torch.randn(shape) for _ in range(2)]
    x = [inputs[0].clone().requires_grad_() for _ in range(2)]
    outputs = [kaf(point) for kaf, point in zip((eager, fused), x, strict=True)]
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-5, atol=1e-5)
    for y in outputs:
        y.backward(inputs[1])
    torch.testing.assert_close(x[1].grad, x[0].grad, rtol=1e-4, atol=1e-4)
    for a, b in zip(eager.parameters(), fused.parameters(), strict=True):
        torch.testing.assert_close(b.grad, a.grad, rtol=1e-4, atol=1e-3)


def test_channels_last_stays_channels_last() -> None:
    torch.manual_seed(2)
    eager = KAF(6)
    fused = fuse(copy.deepcopy(eager))
    x = torch.randn(3, 6, 5, 4).to(memory_format=torch.channels_last).requires_grad_()
    y = fused(x)
    assert y.is_contiguous(memory_format=torch.channels_last)
    y.square().sum().backward()
    twin = x.detach().clone().requires_grad_()
    eager(twin).square().sum().backward()
    torch.testing.assert_close(x.grad, twin.grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(fused.alpha.grad, eager.alpha.grad, rtol=1e-4, atol=1e-3)


def test_second_derivatives_are_those_of_the_eager_sum() -> None:
    torch.manual_seed(3)
    eager = KAF(3, size=20)
    fused = fuse(copy.deepcopy(eager))
    for shape in ((4, 3), (2, 3, 4)):
        points, found = torch.randn(shape), []
        for kaf in (eager, fused):
            x = points.clone().requires_grad_()
            (gradient,) = torch.autograd.grad(kaf(x).square().sum(), x, create_graph=True)
            found.append(torch.autograd.grad(gradient.square().sum(), (x, kaf.alpha)))
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(b, a, rtol=1e-3, atol=1e-3)


def test_the_gradient_of_alpha_is_the_same_every_time() -> None:
    torch.manual_seed(4)
    kaf, x = fuse(KAF(8)), torch.randn(64, 8, 14, 14)
    gradients = [torch.autograd.grad(kaf(x).square().sum(), kaf.alpha)[0] for _ in range(3)]
    assert torch.equal(gradients[0], gradients[1])
    assert torch.equal(gradients[0], gradients[2])


def test_memory_is_that_of_the_input() -> None:
    kaf, x, kept = fuse(KAF(8)), torch.randn(16, 8, 12, 12, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        kaf(x)
    assert sum(kept) <= x.numel() + sum(value.numel() for value in kaf.gaussian())


def test_a_dictionary_that_is_not_uniform_has_no_grid() -> None:
    kaf = fuse(KAF(3))
    assert kaf._known_grid() is not None
    x = torch.linspace(-5, 5, 999)[:, None].expand(-1, 3)
    moved = kaf.dictionary.clone()
    moved[7] += 0.05
    kaf.load_state_dict({**kaf.state_dict(), "dictionary": moved})
    assert kaf._known_grid() is None
    torch.testing.assert_close(kaf(x).detach().double(), exact(kaf, x), rtol=0, atol=1e-5)
    kaf.gamma.fill_(300.0)
    torch.testing.assert_close(kaf(x).detach().double(), exact(kaf, x), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("points", "gamma"),
    [
        (torch.linspace(3, -3, 20), 1.0),
        (torch.linspace(100, 106, 20), 1.0),
        (torch.linspace(-3, 3, 20), 5.0),
        (torch.linspace(-3, 3, 20), 1e-3),
        (torch.linspace(-3, 3, 8), 0.1),
    ],
)
def test_grids_on_which_the_recursion_would_be_inaccurate_are_none(points: torch.Tensor, gamma: float) -> None:
    assert uniform_grid(points, torch.tensor(gamma)) is None


def test_double_precision_is_never_compiled() -> None:
    kaf, x = fuse(KAF(3)).double(), torch.randn(5, 3, dtype=torch.float64)
    assert torch.equal(kaf(x), exact(kaf, x))


def test_certificates_hold_for_fused_networks() -> None:
    """The contract covers fused arithmetic: outputs at corners and random points lie in the float bounds."""
    torch.manual_seed(5)
    model = fuse(mlp([8, 20, 20, 3], "kaf-elu")).eval()
    x = torch.rand(4, 8)
    for radius in (1e-6, 1e-2):
        ball = certify.LpBall(x, radius)
        bounds = certify.bounds(model, ball, "crown")
        with torch.no_grad():
            for points in [*ball.sample(50), ball.interval().lower, ball.interval().upper]:
                y = model(ball.project(points))
                assert bool(((y >= bounds.lower) & (y <= bounds.upper)).all())


def test_fuse_can_be_undone_and_is_shown() -> None:
    model = nn.Sequential(KAF(2), nn.Sequential(KAF(3, trainable=True)))
    assert fuse(model) is model
    assert "fused=True" in repr(model)
    assert "fused" not in "".join(model.state_dict())
    assert "fused" not in repr(fuse(model, enabled=False))


def test_users_may_compile_a_fused_network_themselves() -> None:
    torch.manual_seed(6)
    kaf, x = fuse(KAF(4)), torch.randn(6, 4)
    torch.testing.assert_close(torch.compile(kaf)(x), kaf(x), rtol=1e-5, atol=1e-5)


def test_without_a_compiler_it_warns_once_and_computes_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    module._compiler_works.cache_clear()

    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("no C++ compiler\nand a long story")

    monkeypatch.setattr(torch, "compile", broken)
    kaf, x = fuse(KAF(3)), torch.randn(5, 3)
    try:
        with pytest.warns(UserWarning, match="no C\\+\\+ compiler"):
            y = kaf(x)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert torch.equal(kaf(x), y)
        assert torch.equal(y, fuse(kaf, enabled=False)(x))
    finally:
        module._compiler_works.cache_clear()


def test_a_shared_alpha_has_no_channels() -> None:
    torch.manual_seed(7)
    x, alpha = torch.randn(3, 2, 5), torch.randn(1, 20)
    d, gamma = torch.linspace(-3, 3, 20), torch.tensor(1.7)
    torch.testing.assert_close(
        fused_sum(x, alpha, d, gamma, uniform_grid(d, gamma)), gaussian_sum(x, alpha, d, gamma), rtol=1e-5, atol=1e-5
    )
