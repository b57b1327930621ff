"""Random networks and sets for property tests; everything comes from one seed."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import certify
import models
from models.pssilu import PSSiLU


class Function(nn.Module):
    """A module around a function, for calls that are no modules."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def _kaf(channels: int, init: str, **options: object) -> nn.Module:
    kaf = models.KAF(channels, init=init, **options)
    with torch.no_grad():
        kaf.alpha.add_(0.02 * torch.randn_like(kaf.alpha))
    return kaf


def _prelu(channels: int) -> nn.Module:
    act = nn.PReLU(channels)
    with torch.no_grad():
        act.weight.copy_(torch.randn(channels) / 2)
    return act


#: Activations by name: ``factory(channels)``.
ACTIVATIONS: dict[str, Callable[[int], nn.Module]] = {
    "relu": lambda _: nn.ReLU(),
    "leaky": lambda _: nn.LeakyReLU(0.1),
    "prelu": _prelu,
    "hardtanh": lambda _: nn.Hardtanh(-0.3, 0.7),
    "relu6": lambda _: nn.ReLU6(),
    "clamp": lambda _: Function(lambda x: x.clamp(min=0.1)),
    "abs": lambda _: Function(torch.abs),
    "sigmoid": lambda _: nn.Sigmoid(),
    "tanh": lambda _: nn.Tanh(),
    "elu": lambda _: nn.ELU(0.7),
    "silu": lambda _: nn.SiLU(),
    "gelu": lambda _: nn.GELU(),
    "softplus": lambda _: nn.Softplus(2.0),
    "hardswish": lambda _: nn.Hardswish(),
    "hardsigmoid": lambda _: nn.Hardsigmoid(),
    "pssilu": lambda _: PSSiLU(1.7, 0.2),
    "kaf": lambda channels: _kaf(channels, "random"),
    "kaf-elu": lambda channels: _kaf(channels, "elu"),
    "kaf-authors": lambda channels: _kaf(channels, "tanh", convention="authors"),
    "kaf-tailed": lambda channels: _kaf(channels, "elu", bound=0.8, tails="linear"),
    "kaf-based": lambda channels: _kaf(channels, "random", base=nn.ELU(0.5)),
}
PIECEWISE = ("relu", "leaky", "prelu", "hardtanh", "relu6", "clamp", "abs")


def seeded(build: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """Build in eval mode from ``seed``, leaving torch's own random state alone."""

    def with_seed(*arguments: object, seed: int = 0) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return _sharpened(build(*arguments)).eval()

    return with_seed


def _sharpened(model: nn.Module) -> nn.Module:
    """Random biases and running statistics, big means included, so that nothing is accidentally 0 or 1."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
            size = module.running_mean.shape
            module.running_mean.copy_(torch.randn(size) * 10 ** (4 * torch.rand(size) - 2))
            module.running_var.copy_(10 ** (3 * torch.rand(size) - 2))
            for parameter in module.parameters():
                nn.init.normal_(parameter)
        elif isinstance(module, nn.Linear) and module.bias is not None:
            with torch.no_grad():
                module.weight.mul_(1.7)
    return model


@seeded
def dense(activation: str = "relu", widths: tuple[int, ...] = (6, 16, 12, 4)) -> nn.Module:
    """A fully connected network, one activation after every layer but the last."""
    layers: list[nn.Module] = []
    for n, m in itertools.pairwise(widths):
        layers += [nn.Linear(n, m), ACTIVATIONS[activation](m)]
    return nn.Sequential(*layers[:-1])


class _Convolutional(nn.Module):
    """Normalised input, strided and grouped convolutions, batch normalisation, both poolings, a residual sum."""

    def __init__(self, activation: str) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor([0.4, 0.5]).view(1, 2, 1, 1))
        self.register_buffer("std", torch.tensor([0.2, 0.3]).view(1, 2, 1, 1))
        self.conv1 = nn.Conv2d(2, 6, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.act1 = ACTIVATIONS[activation](6)
        self.conv2 = nn.Conv2d(6, 6, 3, padding="same", groups=2)
        self.act2 = ACTIVATIONS[activation](6)
        self.pool = nn.MaxPool2d(2, stride=1)
        self.head = nn.Linear(24 + 6, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.act1(self.norm(self.conv1((x - self.mean) / self.std)))
        y = self.act2(self.conv2(y)) + y
        return self.head(torch.cat([self.pool(y).flatten(1), y.mean((2, 3))], 1))


@seeded
def convolutional(activation: str = "relu") -> nn.Module:
    """A small image network on samples of shape (2, 5, 5)."""
    return _Convolutional(activation)


class RandomGraph(nn.Module):
    """A random acyclic graph on vectors: forks, sums, differences, concatenations, shared layers, max-pools."""

    def __init__(self, size: int, outputs: int) -> None:
        super().__init__()
        self.plan: list[tuple[str, tuple[int, ...], int]] = []
        self.layers = nn.ModuleList()
        widths, names = [size], sorted(ACTIVATIONS)

        def pick(n: int) -> int:
            return int(torch.randint(n, ()))

        for _ in range(9):
            kind = ("linear", "linear", "act", "act", "sum", "difference", "cat", "pool", "again", "piece")[pick(10)]
            first = len(widths) - 1 - min(pick(4), len(widths) - 1)
            alike = [i for i, width in enumerate(widths) if width == widths[first]]
            second, layer, width = alike[pick(len(alike))], len(self.layers), widths[first]
            if kind == "again" and not any(isinstance(m, nn.Linear) and m.in_features == width for m in self.layers):
                kind = "linear"
            if kind == "linear":
                self.layers.append(nn.Linear(width, width := (3, 5, 8)[pick(3)]))
            elif kind == "again":
                layer = next(i for i, m in enumerate(self.layers) if getattr(m, "in_features", 0) == width)
                width = self.layers[layer].out_features
            elif kind == "act":
                self.layers.append(ACTIVATIONS[names[pick(len(names))]](width))
            elif kind == "cat":
                width *= 2
            elif kind == "piece":
                width = (width + 1) // 2
            elif kind == "pool":
                width = (width + 2 - 3) // 2 + 1
            self.plan.append((kind, (first, second), layer))
            widths.append(width)
        self.head = nn.Linear(sum(widths[-3:]), outputs)

    def forward(self, x: Tensor) -> Tensor:
        values = [x]
        for kind, (first, second), layer in self.plan:
            y, z = values[first], values[second]
            if kind in ("linear", "again", "act"):
                y = self.layers[layer](y)
            elif kind == "sum":
                y = y + z
            elif kind == "difference":
                y = 0.5 * y - z
            elif kind == "cat":
                y = torch.cat([y, z], 1)
            elif kind == "piece":
                y = y[:, ::2]
            else:
                y = F.max_pool1d(y.unsqueeze(1), 3, 2, 1).flatten(1)
            values.append(y)
        return self.head(torch.cat(values[-3:], 1))


@seeded
def random_graph(size: int = 6, outputs: int = 3) -> nn.Module:
    """A random acyclic graph on vectors of ``size`` elements."""
    return RandomGraph(size, outputs)


def _graph(first: int, *, seed: int = 0) -> nn.Module:
    return random_graph(seed=1000 * seed + first)


@seeded
def affine(size: int = 8, depth: int = 12) -> nn.Module:
    """Dense layers without activations: their bounds are as tight as rounding lets them be."""
    return nn.Sequential(*(nn.Linear(size, size) for _ in range(depth)), nn.Linear(size, 3))


@seeded
def wide(activation: str = "relu", size: int = 200) -> nn.Module:
    """Long sums."""
    act = ACTIVATIONS[activation]
    return nn.Sequential(nn.Linear(size, 30), act(30), nn.Linear(30, 100), act(100), nn.Linear(100, 3))


@seeded
def cancelling() -> nn.Module:
    """Large products of opposite signs: outputs far smaller than what they are summed from."""
    model = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 3))
    with torch.no_grad():
        for layer in model[::2]:
            layer.weight[:, ::2] *= 1000
            layer.weight[:, 1::2] = -layer.weight[:, ::2] * (1 + 1e-4 * torch.randn_like(layer.weight[:, ::2]))
            layer.bias.mul_(100)
    return model


@seeded
def saturated(activation: str = "tanh") -> nn.Module:
    """Steep first layer: activations far out on their tails and far outside a dictionary."""
    model = nn.Sequential(nn.Linear(6, 12), ACTIVATIONS[activation](12), nn.Linear(12, 3))
    with torch.no_grad():
        model[0].weight.mul_(40)
    return model


@seeded
def sequence() -> nn.Module:
    """Convolutions on sequences of shape (2, 13): strided, dilated, transposed, averaged."""
    return nn.Sequential(
        nn.Conv1d(2, 4, 3, stride=2, dilation=2), nn.BatchNorm1d(4), nn.ReLU(),
        nn.ConvTranspose1d(4, 4, 3, stride=2, output_padding=1, groups=2), nn.Tanh(), nn.AvgPool1d(3, 2, padding=1),
        nn.Conv1d(4, 4, 1), nn.ReLU(), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(4, 3),
    )  # fmt: skip


#: Every kind of network with the shape of its samples: ``build(seed=...)``.
FAMILIES: dict[str, tuple[Callable[..., nn.Module], tuple[int, ...]]] = {
    **{f"dense {name}": (partial(dense, name), (6,)) for name in ACTIVATIONS},
    **{f"saturated {name}": (partial(saturated, name), (6,)) for name in ACTIVATIONS},
    **{f"images {name}": (partial(convolutional, name), (2, 5, 5)) for name in ("relu", "kaf-elu", "gelu")},
    **{f"wide {name}": (partial(wide, name), (200,)) for name in ("relu", "silu")},
    **{f"deep {name}": (partial(dense, name, (6, *[8] * 8, 3)), (6,)) for name in ("relu", "kaf-elu", "softplus")},
    **{f"graph {seed}": (partial(_graph, seed), (6,)) for seed in range(12)},
    "affine": (affine, (8,)),
    "cancelling": (cancelling, (6,)),
    "sequence": (sequence, (2, 13)),
}


def inputs(shape: tuple[int, ...], batch: int = 2, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Points of the unit cube, some on its faces."""
    x = torch.rand((batch, *shape), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return ((1.4 * x - 0.2).clamp(0, 1)).to(dtype)


def domains(x: Tensor, radius: float) -> dict[str, certify.PerturbationSet]:
    """Sets of every kind around ``x`` in [0, 1]; the box has fixed features."""
    low, high = (x - radius).clamp(min=0), (x + radius).clamp(max=1)
    fixed = torch.zeros_like(x, dtype=torch.bool)
    fixed.view(len(x), -1)[:, ::3] = True
    return {
        "linf": certify.LpBall(x, radius, clip=(0.0, 1.0)),
        "l2": certify.LpBall(x, 2 * radius, p=2, clip=(0.0, 1.0)),
        "l1": certify.LpBall(x, 4 * radius, p=1, clip=(0.0, 1.0)),
        "box": certify.Box(torch.where(fixed, x, low), torch.where(fixed, x, high)),
    }
