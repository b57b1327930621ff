"""Every form of the sum of Gaussians against its definition in float64: by powers, term by term, eager and compiled."""

from __future__ import annotations

import copy
import warnings
from functools import cache

import pytest
import torch
from torch import Tensor, nn

from certify.enclosures import Interval
from certify.rounding import gamma as roundings
from models import KAF, KAFFacts, fuse, fusion
from models.gaussian import gaussian_sum
from models.plan import make_plan


def definition(kaf: KAF, x: Tensor) -> Tensor:
    """Return sum_i alpha_i exp(-gamma (s - d_i)^2) in float64 for x [n, c]."""
    alpha, d, gamma = (value.detach().double() for value in kaf.gaussian())
    y = torch.zeros_like(x, dtype=torch.float64)
    for i in range(len(d)):
        y += alpha[:, i] * torch.exp(-gamma * (x.double() - d[i]).square())
    return y


def everywhere(kaf: KAF) -> Tensor:
    """Points on and around the dictionary, and as far as float32 goes, for every channel."""
    end = float(kaf.dictionary.max()) + 6
    far = torch.tensor([20.0, 50.0, 1e3, 1e6, 1e18, 1e30, 3e38])
    s = torch.cat([torch.linspace(-end, end, 20_001), kaf.dictionary, far, -far, torch.tensor([torch.inf, -torch.inf])])
    return s[:, None].expand(-1, len(kaf.alpha)).contiguous()


@cache
def compiler() -> str | None:
    """Why torch.compile cannot be tested here, if so."""
    try:
        torch.compile(lambda x: x + 1, dynamic=True)(torch.zeros(3))
    except Exception as error:
        return f"torch.compile does not work here: {type(error).__name__}"
    return None


@pytest.fixture
def compiling() -> None:
    if (reason := compiler()) is not None:
        pytest.skip(reason)


@pytest.mark.parametrize("size", [2, 3, 5, 12, 20, 33])
@pytest.mark.parametrize("convention", ["paper", "authors"])
def test_float32_error_is_below_a_millionth_of_the_weights(convention: str, size: int) -> None:
    kafs = [KAF(1, size=size, convention=convention, init=init) for init in ("elu", "silu", "relu", "tanh")]
    kafs += [KAF(5, size=size, convention=convention), KAF(size, size=size, convention=convention)]
    kafs[-1].alpha.data.copy_(torch.eye(size))
    for kaf in kafs:
        x = everywhere(kaf)
        error = (kaf(x).detach().double() - definition(kaf, x)).abs().amax(0)
        mass = kaf.alpha.detach().double().abs().sum(1)
        assert bool((error <= 1e-6 * mass).all())
        assert bool((error <= roundings(4 * size + 10, torch.float32) * mass).all())


@pytest.mark.parametrize("size", [5, 20])
def test_float64_by_powers_is_as_exact(size: int) -> None:
    kaf = KAF(size, size=size).double()
    kaf.dictionary.copy_(torch.arange(size) * 0.3125 - 3)
    kaf.alpha.data.copy_(torch.eye(size))
    x = everywhere(kaf).double()
    y = kaf(x).detach()
    assert kaf._planned(torch.float64).groups
    assert bool(((y - definition(kaf, x)).abs() <= 0.5 * roundings(4 * size + 10, torch.float64)).all())


@pytest.mark.parametrize("width", [1e-8, 1e-4, 0.05, 1.0, 5.0, 1e4])
def test_any_bandwidth_stays_inside_the_contract(width: float) -> None:
    kaf = KAF(20, gamma=width * (19 / 6) ** 2)
    kaf.alpha.data.copy_(torch.eye(20))
    x = everywhere(kaf)
    error = (kaf(x).detach().double() - definition(kaf, x)).abs()
    assert bool((error <= roundings(90, torch.float32)).all())
    assert bool((error <= 1e-6).all())


def test_any_even_dictionary_errs_by_less_than_its_plan_proves() -> None:
    grouped = 0
    for _ in range(60):
        size, reach, width = (
            int(torch.randint(2, 66, ())),
            10 ** (3 * torch.rand(()) - 1.5),
            10 ** (6 * torch.rand(()) - 5),
        )
        middle = 2 * reach * torch.randn(())
        d = torch.linspace(float(middle - reach), float(middle + reach), size)
        gamma, alpha = width * ((size - 1) / (2 * reach)) ** 2, torch.eye(size)
        plan = make_plan(d, gamma, torch.float32)
        grouped += bool(plan.groups)
        far = 9 / gamma.sqrt()
        x = torch.cat([torch.linspace(float(d[0] - far), float(d[-1] + far), 2001), d, torch.tensor([-1e30, 1e30])])
        exact = torch.exp(-gamma.double() * (x[:, None].double() - d.double()).square())
        y = gaussian_sum(x[:, None].repeat(1, size), alpha, d, gamma, plan)
        bound = (
            min(1e-6, roundings(4 * size + 10, torch.float32))
            if plan.groups
            else roundings(4 * size + 10, torch.float32)
        )
        assert bool(((y - exact).abs() <= bound).all())
    assert grouped >= 20


def test_the_float_contract_of_the_facts_holds_for_what_runs() -> None:
    kaf = KAF(6, init="elu").eval()
    x = everywhere(kaf)
    allowed = KAFFacts(kaf, None, 1).rounding_error(Interval(x, x))
    for module in (kaf, copy.deepcopy(kaf).double().float()):
        assert bool(((module(x).detach().double() - definition(kaf, x)).abs() <= allowed).all())


def test_weights_whose_powers_overflow_have_no_bound() -> None:
    kaf = KAF(1).eval()
    kaf.alpha.data.fill_(1e25)
    assert bool(
        torch.isinf(KAFFacts(kaf, None, 1).rounding_error(Interval(torch.zeros(1, 1), torch.zeros(1, 1)))).all()
    )


def test_nan_stays_nan() -> None:
    assert bool(KAF(1)(torch.full((1, 1), torch.nan)).isnan().all())


@pytest.mark.parametrize("parameters", [1, 3])
@pytest.mark.parametrize("shape", [(4, 3), (2, 3, 2)])
def test_first_and_second_derivatives_by_powers(parameters: int, shape: tuple[int, ...]) -> None:
    alpha = torch.randn(parameters, 7, dtype=torch.float64, requires_grad=True)
    dictionary, gamma = torch.arange(7).double() / 2 - 1.5, torch.tensor(0.75).double()
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    plan = make_plan(dictionary, gamma, torch.float64)
    assert plan.groups

    def f(x: Tensor, alpha: Tensor) -> Tensor:
        return gaussian_sum(x, alpha, dictionary, gamma, plan)

    assert torch.autograd.gradcheck(f, (x, alpha))
    assert torch.autograd.gradgradcheck(f, (x, alpha))


def test_gradients_by_powers_and_term_by_term_agree() -> None:
    kaf, x = KAF(6, init="elu"), 2 * torch.randn(40, 6, 5, 5)
    x.requires_grad_()
    upstream = torch.randn_like(x)
    powers = torch.autograd.grad(kaf(x), (x, kaf.alpha), upstream)
    terms = torch.autograd.grad(gaussian_sum(x, *kaf.gaussian()), (x, kaf.alpha), upstream)
    mass = float(kaf.alpha.detach().abs().sum(1).max())
    torch.testing.assert_close(powers[0], terms[0], rtol=0, atol=1e-5 * mass)
    torch.testing.assert_close(powers[1], terms[1], rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("parameters", [1, 6])
@pytest.mark.parametrize("last", [False, True])
def test_blocks_do_not_change_values_or_gradients(parameters: int, last: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    kaf, x = KAF(parameters), torch.randn(5, 6, 4, 3)
    x = x.to(memory_format=torch.channels_last) if last else x
    x.requires_grad_()
    whole = (kaf(x), *torch.autograd.grad(kaf(x).square().sum(), (x, kaf.alpha)))
    for elements in (1, 30, 6 * 12 * 2, 10**6):
        monkeypatch.setattr("models.recursion.BLOCK", {"cpu": elements})
        parts = (kaf(x), *torch.autograd.grad(kaf(x).square().sum(), (x, kaf.alpha)))
        for a, b in zip(whole, parts, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("free", [False, True])
def test_channels_last_stays_channels_last(free: bool) -> None:
    kaf, x = KAF(4, trainable=free), torch.randn(3, 4, 6, 5)
    last = x.to(memory_format=torch.channels_last).requires_grad_()
    y = kaf(last)
    assert y.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(y, kaf(x))
    y.sum().backward()
    assert last.grad is not None
    assert last.grad.is_contiguous(memory_format=torch.channels_last)
    sliced = torch.randn(3, 8, 6, 5)[:, ::2]
    torch.testing.assert_close(kaf(sliced), kaf(sliced.contiguous()))


def test_the_gradient_of_alpha_is_the_same_every_time() -> None:
    kaf, x = KAF(16), torch.randn(64, 16, 20, 20, requires_grad=True)
    first, second = (torch.autograd.grad(kaf(x).square().sum(), kaf.alpha)[0] for _ in range(2))
    assert torch.equal(first, second)


def test_uneven_dictionaries_and_narrow_kernels_are_summed_term_by_term() -> None:
    even = KAF(2)
    assert make_plan(even.dictionary, even.gamma, torch.float32).groups
    bent = even.dictionary.clone()
    bent[7] += 1e-4
    assert not make_plan(bent, even.gamma, torch.float32).groups
    assert not make_plan(even.dictionary.flip(0), even.gamma, torch.float32).groups
    assert not make_plan(even.dictionary, torch.tensor(1e3), torch.float32).groups
    assert not make_plan(even.dictionary, even.gamma, torch.float64).groups  # float32 points are uneven to float64


def test_the_plan_follows_the_dictionary_however_it_changes() -> None:
    kaf = KAF(3)
    x = 2 * torch.randn(500, 3)
    changes = [
        lambda: kaf.load_state_dict(KAF(3, bound=5.0).state_dict()),
        lambda: kaf.dictionary.data.mul_(1.01),
        lambda: kaf.dictionary[3].add_(0.05),
        lambda: kaf.gamma.data.fill_(0.3),
        lambda: setattr(kaf, "dictionary", torch.linspace(-2, 2, 20)),
    ]
    for change in changes:
        kaf(x)
        change()
        torch.testing.assert_close(kaf(x).double(), definition(kaf, x), rtol=0, atol=2e-5)


def test_memory_by_powers_is_that_of_the_input() -> None:
    kaf, x, kept = KAF(8), torch.randn(16, 8, 12, 12, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        kaf(x)
    assert sum(kept) <= x.numel() + sum(value.numel() for value in kaf.gaussian())


def test_fuse_is_an_attribute_and_nothing_else() -> None:
    net = nn.Sequential(nn.Linear(3, 4), KAF(4))
    state = set(net.state_dict())
    assert fuse(net) is net
    assert "fused=True" in repr(net)
    assert set(net.state_dict()) == state
    assert "fused" not in repr(fuse(net, False))


def test_without_a_compiler_one_warning_and_the_eager_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> None:
        raise RuntimeError("no C++ compiler")

    monkeypatch.setattr(fusion, "_broken", [])
    monkeypatch.setattr(fusion, "_compiled", lambda formula: refuse)
    kaf, x = KAF(3), torch.randn(9, 3, requires_grad=True)
    eager = (kaf(x), *torch.autograd.grad(kaf(x).sum(), (x, kaf.alpha)))
    fuse(kaf)
    with pytest.warns(RuntimeWarning, match="no C\\+\\+ compiler"):
        kaf(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fused = (kaf(x), *torch.autograd.grad(kaf(x).sum(), (x, kaf.alpha)))
    assert all(torch.equal(a, b) for a, b in zip(eager, fused, strict=True))


@pytest.mark.slow
def test_fused_sums_err_as_little(compiling: None) -> None:
    for kaf in (KAF(20), KAF(1, init="elu"), KAF(5, convention="authors")):
        if len(kaf.alpha) == 20:
            kaf.alpha.data.copy_(torch.eye(20))
        x = everywhere(kaf)
        error = (fuse(kaf)(x).detach().double() - definition(kaf, x)).abs().amax(0)
        assert bool((error <= 1e-6 * kaf.alpha.detach().double().abs().sum(1)).all())
    assert not fusion._broken


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(70, 6), (4, 6, 9, 9), (3, 6, 160, 160)])
@pytest.mark.parametrize("last", [False, True])
def test_fused_is_eager_up_to_rounding(compiling: None, shape: tuple[int, ...], last: bool) -> None:
    kaf, x = KAF(6), torch.randn(shape)
    x = x.to(memory_format=torch.channels_last) if last and len(shape) == 4 else x
    x.requires_grad_()
    results = []
    for fused in (False, True):
        y = fuse(kaf, fused)(x)
        results.append((y, *torch.autograd.grad(y.square().sum(), (x, kaf.alpha))))
    assert not fusion._broken
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-5 * max(1.0, float(a.detach().abs().max())))


@pytest.mark.slow
@pytest.mark.parametrize("parameters", [1, 3])
def test_fused_term_by_term_is_eager_up_to_rounding(compiling: None, parameters: int) -> None:
    kaf, x = KAF(parameters, size=6, trainable=True), torch.randn(7, 3, 8, 8, requires_grad=True)
    inputs, results = (x, *kaf.parameters()), []
    for fused in (False, True):
        y = fuse(kaf, fused)(x)
        results.append((y, *torch.autograd.grad(y.square().sum(), inputs)))
    assert not fusion._broken
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * max(1.0, float(a.detach().abs().max())))


@pytest.mark.slow
@pytest.mark.parametrize("free", [False, True])
def test_torch_compile_takes_a_kaf_whole(compiling: None, free: bool) -> None:
    net = nn.Sequential(nn.Linear(5, 4), KAF(4, trainable=free), nn.Linear(4, 2))
    x = torch.randn(11, 5)
    compiled = torch.compile(net, fullgraph=True)
    torch.testing.assert_close(compiled(x), net(x), rtol=1e-4, atol=1e-5)
    expected = torch.autograd.grad(net(x).square().sum(), tuple(net.parameters()))
    found = torch.autograd.grad(compiled(x).square().sum(), tuple(net.parameters()))
    for a, b in zip(expected, found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
