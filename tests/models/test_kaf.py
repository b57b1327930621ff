"""The KAF against its definition in float64, its derivatives, its memory and its refusals."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from certify.enclosures import Interval
from certify.errors import InvalidInput
from certify.rounding import gamma as roundings
from models import KAF, KAFFacts, mlp
from models.gaussian import gaussian_sum
from models.kaf_table import Gaussians, Table


def definition(kaf: KAF, x: Tensor) -> Tensor:
    """Return sum_i alpha_i exp(-gamma (s - d_i)^2) in float64, one neuron and one term at a time."""
    alpha, dictionary, gamma = (value.double() for value in kaf.gaussian())
    y = torch.zeros_like(x, dtype=torch.float64)
    for channel in range(x.shape[1]):
        row = alpha[channel if len(alpha) > 1 else 0]
        for weight, point in zip(row, dictionary, strict=True):
            y[:, channel] += weight * torch.exp(-gamma * (x[:, channel].double() - point) ** 2)
    return y


def contract(kaf: KAF) -> Tensor:
    """Return the error that certificates allow for float32, per channel."""
    alpha, dictionary, _ = kaf.gaussian()
    return 0.25 * roundings(4 * len(dictionary) + 10, torch.float32) * alpha.double().abs().sum(1)


@pytest.mark.parametrize("shape", [(5, 3), (4, 3, 7), (2, 3, 5, 6), (0, 3), (1, 3, 150, 100)])
@pytest.mark.parametrize("parameters", [1, 3])
def test_forward_is_the_definition(shape: tuple[int, ...], parameters: int) -> None:
    torch.manual_seed(0)
    kaf = KAF(parameters).double()
    x = 3 * torch.randn(shape, dtype=torch.float64)
    torch.testing.assert_close(kaf(x), definition(kaf, x), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("init", ["random", "elu", "silu", "relu", "tanh"])
@pytest.mark.parametrize("convention", ["paper", "authors"])
def test_float32_error_stays_inside_the_contract(init: str, convention: str) -> None:
    torch.manual_seed(0)
    kaf = KAF(4, init=init, convention=convention)
    far = torch.tensor([-1e30, -1e6, -50.0, -9.0, 9.0, 50.0, 1e6, 1e30]).repeat(4, 1).T
    x = torch.cat([6 * torch.rand(50_000, 4) - 3, 4 * torch.randn(20_000, 4), far])
    y = kaf(x).detach()
    assert torch.isfinite(y).all()
    assert ((y.double() - definition(kaf, x)).abs() <= contract(kaf)).all()


def test_a_single_term_stays_inside_the_contract_at_both_ends_of_the_dictionary() -> None:
    kaf = KAF(20)
    with torch.no_grad():
        kaf.alpha.copy_(torch.eye(20))
    x = torch.linspace(-8, 8, 40_001)[:, None].expand(-1, 20)
    assert ((kaf(x).detach().double() - definition(kaf, x)).abs() <= contract(kaf)).all()


def test_gradients_are_finite_far_from_the_dictionary() -> None:
    kaf = KAF(2, init="elu", trainable=True)
    x = torch.tensor([[-1e30, 1e30], [-1e6, 1e6]], requires_grad=True)
    kaf(x).sum().backward()
    assert all(bool(torch.isfinite(p.grad).all()) for p in (x, *kaf.parameters()) if p.grad is not None)
    assert bool((x.grad == 0).all())


@pytest.mark.parametrize("parameters", [1, 3])
def test_first_and_second_derivatives_of_all_four_arguments(parameters: int) -> None:
    torch.manual_seed(1)
    alpha = torch.randn(parameters, 4, dtype=torch.float64, requires_grad=True)
    dictionary = torch.linspace(-1.5, 1.5, 4, dtype=torch.float64).requires_grad_()
    gamma = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    x = torch.randn(2, 3, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(gaussian_sum, (x, alpha, dictionary, gamma))
    assert torch.autograd.gradgradcheck(gaussian_sum, (x, alpha, dictionary, gamma))


def test_gradients_do_not_depend_on_the_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(2)
    kaf, x = KAF(6, trainable=True).double(), torch.randn(5, 6, 7, dtype=torch.float64, requires_grad=True)
    inputs = (x, *kaf.parameters())
    whole = torch.autograd.grad(kaf(x).square().sum(), inputs)
    for terms in (1, 20 * 7 * 4, 20 * 7 * 6 * 2):
        monkeypatch.setattr("models.direct.BLOCK", {"cpu": terms})
        for a, b in zip(whole, torch.autograd.grad(kaf(x).square().sum(), inputs), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_memory_is_that_of_the_input() -> None:
    """Autograd keeps x and the parameters, nothing of the size of x times the dictionary."""
    kaf, x, kept = KAF(8), torch.randn(16, 8, 12, 12, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        kaf(x)
    assert sum(kept) <= x.numel() + sum(value.numel() for value in kaf.gaussian())


@pytest.mark.parametrize(("init", "error"), [("elu", 2e-2), ("silu", 2e-2), ("relu", 0.2), ("tanh", 2e-2)])
def test_ridge_start_is_close_to_its_target_on_the_dictionary(init: str, error: float) -> None:
    target = {"elu": nn.ELU(), "silu": nn.SiLU(), "relu": nn.ReLU(), "tanh": nn.Tanh()}[init]
    x = torch.linspace(-2.9, 2.9, 301)[:, None]
    torch.testing.assert_close(KAF(1, init=init)(x).detach(), target(x), rtol=0, atol=error)


def test_ridge_start_solves_its_normal_equations() -> None:
    kaf = KAF(2, init=torch.sin, size=12, bound=2.0)
    alpha, d, gamma = (value.double() for value in kaf.gaussian())
    system = torch.exp(-gamma * (d[:, None] - d[None, :]) ** 2) + 1e-6 * torch.eye(12)
    torch.testing.assert_close(alpha @ system, torch.sin(d).expand(2, -1), rtol=0, atol=1e-4)


@pytest.mark.parametrize(("convention", "bound", "scale"), [("paper", 3.0, 6.0), ("authors", 4.0, 8.0)])
def test_conventions(convention: str, bound: float, scale: float) -> None:
    _, d, gamma = KAF(1, convention=convention).gaussian()
    step = 2 * bound / 19
    torch.testing.assert_close(d, torch.arange(20) * step - bound)
    assert float(gamma) == pytest.approx(1 / (scale * step**2), rel=1e-6)


def test_base_is_added() -> None:
    x = torch.randn(7, 3)
    kaf = KAF(3, base=nn.SiLU())
    torch.testing.assert_close(kaf(x), nn.functional.silu(x) + definition(kaf, x).float())


def test_trainable_dictionary_and_bandwidth_get_gradients_and_stay_positive() -> None:
    kaf = KAF(3, trainable=True, gamma=0.5)
    kaf(torch.randn(9, 3)).square().sum().backward()
    assert {name for name, p in kaf.named_parameters() if p.grad is not None} == {
        "alpha",
        "dictionary",
        "log_gamma",
    }
    with torch.no_grad():
        kaf.log_gamma.fill_(-20)
    assert bool(kaf.gaussian()[2] > 0)
    assert float(KAF(3, gamma=0.5).gaussian()[2]) == 0.5


def test_half_precision_is_computed_in_float32() -> None:
    torch.manual_seed(3)
    kaf, x = KAF(4, init="elu"), torch.randn(100, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(kaf(x), kaf(x.float()), rtol=0, atol=0)
    low = x.bfloat16()
    torch.testing.assert_close(kaf(low), kaf(low.float()).bfloat16(), rtol=0, atol=0)


def test_state_dict_round_trip() -> None:
    for trainable in (False, True):
        a, b = KAF(3, trainable=trainable), KAF(3, trainable=trainable, bound=5.0)
        b.load_state_dict(a.state_dict())
        x = torch.randn(4, 3)
        assert torch.equal(a(x), b(x))


@pytest.mark.parametrize(
    "options",
    [
        {"size": 1},
        {"gamma": 0.0},
        {"gamma": float("nan")},
        {"bound": -1.0},
        {"init": "swoosh"},
        {"convention": "folklore"},
        {"init": lambda d: d[:2]},
    ],
)
def test_refuses_what_cannot_be_meant(options: dict) -> None:
    with pytest.raises(InvalidInput) as error:
        KAF(3, **options)
    assert len(str(error.value).splitlines()) <= 3


@pytest.mark.shared
def test_the_reference_network_computes_its_published_logits() -> None:
    nets = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "nets"
    if not nets.is_dir():
        pytest.skip("the shared reference networks are absent")
    arrays = {k: torch.from_numpy(v) for k, v in np.load(nets / "mnist_kaf_2x32.npz").items()}
    layers = json.loads((nets / "mnist_kaf_2x32.json").read_text())["layers"]
    gamma = next(layer["gamma"] for layer in layers if layer["op"] == "kaf")
    net = mlp([784, 32, 32, 10], lambda channels: KAF(channels, gamma=gamma))
    dense = [layer for layer in layers if layer["op"] == "linear"]
    curved = [layer for layer in layers if layer["op"] == "kaf"]
    for index, layer in enumerate(dense, 1):
        state = {"weight": arrays[layer["weight"]], "bias": arrays[layer["bias"]]}
        net.get_submodule(f"linear{index}").load_state_dict(state)
    for index, layer in enumerate(curved, 1):
        kaf = net.get_submodule(f"act{index}")
        assert isinstance(kaf, KAF)
        points = arrays[layer["grid"]].flatten()
        torch.testing.assert_close(kaf.dictionary, points)
        kaf.load_state_dict(
            {"alpha": arrays[layer["coef"]], "dictionary": points, "gamma": torch.tensor(layer["gamma"])}
        )
    images = np.load(nets.parent / "images" / "mnist_eran1000.npz")["images_u8"]
    expected = torch.from_numpy(np.load(nets / "mnist_kaf_2x32.logits.npy"))
    with torch.no_grad():
        logits = net(torch.from_numpy(images).float() / 255)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("fine", [4, 192])
def test_a_table_is_within_its_errors_of_the_sum_and_they_are_small(fine: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("models.kaf_table.FINE", fine)
    torch.manual_seed(4)
    kaf = KAF(3, init="elu")
    with torch.no_grad():
        kaf.alpha.add_(0.1 * torch.randn(kaf.alpha.shape))
    alpha, dictionary, gamma = (value.detach() for value in kaf.gaussian())
    f = Gaussians(alpha.double(), dictionary.double(), float(gamma))
    s = torch.cat([torch.linspace(-14, 14, 30_001, dtype=torch.float64), torch.tensor([-1e9, 1e9]).double()])
    for channel in range(3):
        table = Table.of(f).at(torch.full_like(s, channel, dtype=torch.long))
        y, second, error, blur = table.values(s[None])
        assert bool(((y[0] - f.derivative(0, s)[channel]).abs() <= error).all())
        assert bool(((second[0] - f.derivative(2, s)[channel]).abs() <= blur).all())
        assert bool((f.derivative(4, s)[channel].abs() <= table.fourth(s, s)).all())
        assert float(error.max()) <= (1e-9 if fine == 192 else 1e-2)


def test_ranges_of_values_and_slopes_are_attained() -> None:
    torch.manual_seed(5)
    facts = KAFFacts(KAF(6).eval().double(), None, 1)
    low = 3 * torch.randn(200, 6, dtype=torch.float64)
    z = Interval(low, low + 0.03 + 3 * torch.rand(200, 6, dtype=torch.float64) ** 3)
    found, slopes = facts.range(z), facts.slope_range(z)
    s = z.lower + torch.linspace(0, 1, 4001, dtype=torch.float64).view(-1, 1, 1) * z.width
    y = facts.forward(s.flatten(0, 1)).view(s.shape)
    assert bool(((y >= found.lower) & (y <= found.upper)).all())
    torch.testing.assert_close(found.lower, y.amin(0), rtol=0, atol=1e-5)
    torch.testing.assert_close(found.upper, y.amax(0), rtol=0, atol=1e-5)
    steep = y.diff(dim=0) / (z.width / 4000)
    torch.testing.assert_close(slopes.lower, steep.amin(0), rtol=0, atol=1e-2)
    torch.testing.assert_close(slopes.upper, steep.amax(0), rtol=0, atol=1e-2)
    line = Interval(torch.full((1, 6), -torch.inf).double(), torch.full((1, 6), torch.inf).double())
    for whole, part in ((facts.range(line), found), (facts.slope_range(line), slopes)):
        assert bool(torch.isfinite(whole.magnitude).all())
        assert bool(((whole.lower <= part.lower) & (whole.upper >= part.upper)).all())


def test_refuses_a_wrong_channel_count() -> None:
    with pytest.raises(InvalidInput, match="3 channels"):
        KAF(3)(torch.randn(2, 4))
    with pytest.raises(InvalidInput):
        KAF(1)(torch.randn(4))
