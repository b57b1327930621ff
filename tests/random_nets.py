"""Random small networks of many kinds, and ratios that they attain: for claims about Lipschitz constants."""

from __future__ import annotations

import random

import torch
from torch import Tensor, nn

from certify import LpBall
from models import KAF

_ACTS = (
    lambda c: nn.ReLU(),
    lambda c: nn.LeakyReLU(0.2),
    lambda c: nn.LeakyReLU(-1.0),
    lambda c: nn.PReLU(c, init=-0.5),
    lambda c: nn.Tanh(),
    lambda c: nn.SiLU(),
    KAF,
)


class _Sum(nn.Module):
    """end(branch(x) + shortcut(x))."""

    def __init__(self, branch: nn.Module, shortcut: nn.Module, end: nn.Module) -> None:
        super().__init__()
        self.branch, self.shortcut, self.end = branch, shortcut, end

    def forward(self, x):
        return self.end(self.branch(x) + self.shortcut(x))


def dense(*weights: Tensor, act: type[nn.Module] = nn.ReLU) -> nn.Sequential:
    """Return a float64 network of these matrices [out, in] without biases, in eval mode."""
    layers: list[nn.Module] = []
    for weight in weights:
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False).double()
        layer.weight.data = weight.double()
        layers += [layer, act()]
    return nn.Sequential(*layers[:-1]).eval()


def random_net(seed: int) -> tuple[nn.Module, tuple[int, ...]]:
    """Return a network in eval mode, of dense or convolutional, residual and pooling blocks, and its input shape."""
    rng = random.Random(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        found = _layered(rng) if rng.random() < 0.3 else _spatial(rng)
        for module in found[0].modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.weight, -2, 2)
                nn.init.uniform_(module.running_var, 0.2, 2)
    return found[0].eval(), found[1]


def _act(rng: random.Random, channels: int) -> nn.Module:
    return rng.choice(_ACTS)(channels)


def _layered(rng: random.Random) -> tuple[nn.Module, tuple[int, ...]]:
    width = first = rng.randint(1, 5)
    layers: list[nn.Module] = []
    for _ in range(rng.randint(1, 4)):
        after = rng.randint(1, 7)
        block: nn.Module = nn.Sequential(nn.Linear(width, after), _act(rng, after))
        if rng.random() < 0.3:
            block = _Sum(nn.Sequential(*block, nn.Linear(after, width)), nn.Identity(), _act(rng, width))
            after = width
        layers.append(block)
        width = after
    return nn.Sequential(*layers, nn.Linear(width, rng.randint(1, 3))), (first,)


def _spatial(rng: random.Random) -> tuple[nn.Module, tuple[int, ...]]:
    channels, height, width = shape = rng.randint(1, 2), rng.randint(4, 6), rng.randint(4, 7)
    layers: list[nn.Module] = []
    for _ in range(rng.randint(1, 3)):
        block = _block(rng, channels)
        try:
            with torch.no_grad():
                after = block.eval()(torch.zeros(1, channels, height, width)).shape[1:]
        except RuntimeError:  # the map is too small for it
            continue
        layers.append(block)
        channels, height, width = after
    hidden = rng.randint(2, 6)
    tail = rng.choice(
        [
            [nn.Flatten(), nn.Linear(channels * height * width, 3)],
            [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 3)],
            [nn.Flatten(), nn.Linear(channels * height * width, hidden), _act(rng, hidden), nn.Linear(hidden, 2)],
        ]
    )
    return nn.Sequential(*layers, *tail), shape


def _block(rng: random.Random, c: int) -> nn.Module:
    o, kernel, padding = rng.randint(2, 4), rng.randint(1, 3), rng.randint(0, 2)
    stride, dilation = rng.choice([1, 1, 2]), rng.choice([1, 1, 2])
    grouped = nn.Conv2d(c, c * o, kernel, stride, padding, dilation, groups=c)
    plain = nn.Conv2d(c, o, kernel, stride, padding, dilation)
    return rng.choice(
        [
            nn.Sequential(grouped, _act(rng, c * o)),
            nn.Sequential(plain, _act(rng, o)),
            nn.Sequential(plain, nn.BatchNorm2d(o), _act(rng, o)),
            nn.Sequential(plain, nn.Conv2d(o, o, 3, padding=1)),
            _Sum(
                nn.Sequential(nn.Conv2d(c, o, 3, padding=1), _act(rng, o), nn.Conv2d(o, c, 3, padding=1)),
                nn.Identity(),
                _act(rng, c),
            ),
            _Sum(
                nn.Sequential(_act(rng, c), nn.Conv2d(c, o, 3, padding=1), _act(rng, o), nn.Conv2d(o, c, 1)),
                nn.Identity(),
                nn.Identity(),
            ),
            _Sum(
                nn.Sequential(nn.Conv2d(c, o, 3, 2, 1), _act(rng, o), nn.Conv2d(o, o, 3, 1, 1)),
                nn.Conv2d(c, o, 1, 2),
                _act(rng, o),
            ),
            nn.MaxPool2d(2, rng.randint(1, 2)),
            nn.AvgPool2d(2, rng.randint(1, 2), rng.randint(0, 1)),
        ]
    )


def attained(model: nn.Module, shape: tuple[int, ...], domain: LpBall | None, seed: int = 0) -> float:
    """Return the largest l2 ratio met: Jacobians at random points and difference quotients, in float64."""
    generator = torch.Generator().manual_seed(seed)
    twin, found = model.double(), 0.0
    for scale in (0.3, 1.0, 3.0):
        if domain is None:
            x = torch.randn(12, *shape, dtype=torch.float64, generator=generator) * scale
            y = x + 0.1 * scale * torch.randn(x.shape, dtype=torch.float64, generator=generator)
        else:
            x, y = (domain.double().sample(6, generator).flatten(0, 1) for _ in range(2))
        jacobian = torch.autograd.functional.jacobian(lambda z: twin(z).sum(0), x).movedim(1, 0).flatten(2)
        found = max(found, float(torch.linalg.matrix_norm(jacobian, 2).max()), _quotient(twin, x, y, domain))
    return found


def _quotient(model: nn.Module, x: Tensor, y: Tensor, domain: LpBall | None) -> float:
    """Pairs of one sample's domain stand at the same place modulo the batch."""
    with torch.no_grad():
        rise = torch.linalg.vector_norm((model(x) - model(y)).flatten(1), dim=1)
    run = torch.linalg.vector_norm((x - y).flatten(1), dim=1)
    return float((rise / run.clamp(min=1e-12)).max())
