"""Activations that auto-lirpa does not know: fed with our lines, its propagation gives the bounds that ours gives."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from shared_data import load_case, needs_shared
from torch import nn

import models
from certify import CROWN, LpBall, PerturbationSet, Spec, class_margins
from certify.graph import trace
from certify.oracle.auto_lirpa import intermediate_bounds, margins
from certify.rounding import Real


def _kaf(channels: int, init: str = "random") -> nn.Module:
    kaf = models.KAF(channels, init=init)
    kaf.alpha.data.add_(0.02 * torch.randn_like(kaf.alpha))
    return kaf


class _Twice(nn.Module):
    """One KAF in two places."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.act = nn.Linear(5, 5), _kaf(5)

    def forward(self, x):
        return self.layer(self.act(self.layer(self.act(self.layer(x)))))[:, :3]


#: Networks of activations that auto-lirpa does not know, and their input shapes.
FOREIGN: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "dense": (lambda: _dense(_kaf(12), _kaf(8, "elu")), (5,)),
    "mixed": (lambda: _dense(_kaf(12), nn.ReLU()), (5,)),
    "smooth": (lambda: _dense(nn.GELU(), nn.Softplus(2.0)), (5,)),
    "based": (lambda: _dense(models.KAF(12, base=nn.SiLU()), nn.Tanh()), (5,)),
    "twice": (_Twice, (5,)),
    "conv": (lambda: _conv(_kaf(3), _kaf(2, "tanh")), (1, 6, 6)),
    "mixed conv": (lambda: _conv(nn.ReLU(), _kaf(2)), (1, 6, 6)),
}


def _dense(first: nn.Module, second: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(5, 12), first, nn.Linear(12, 8), second, nn.Linear(8, 3))


def _conv(first: nn.Module, second: nn.Module) -> nn.Module:
    layers = [nn.Conv2d(1, 3, 3, padding=1), first, nn.Conv2d(3, 2, 3, stride=2), second]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(8, 3))


def _crown_on_its_intervals(model: nn.Module, domain: PerturbationSet, spec: Spec) -> torch.Tensor:
    """Our CROWN's lower bounds with the oracle's intermediate intervals."""
    graph = trace(model, domain.center)
    read = [node.inputs[0] for node in graph.nodes.values() if not node.rule.affine]
    given = dict(zip(read, intermediate_bounds(model, domain), strict=True))
    with torch.no_grad():
        return CROWN(intermediate=given).bound(graph, domain, spec, Real())


@pytest.mark.parametrize("kind", FOREIGN)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_oracle_s_propagation_of_our_lines_equals_ours(kind: str, dtype: torch.dtype) -> None:
    build, shape = FOREIGN[kind]
    model = build().eval().to(dtype)
    domain = LpBall(torch.rand(3, *shape, dtype=dtype), 0.03)
    spec = class_margins(torch.tensor([0, 1, 2]), 3, dtype=dtype)
    theirs = margins(model, domain, spec).double()
    ours = _crown_on_its_intervals(model, domain, spec)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    intervals = margins(model, domain, spec, "ibp")
    assert bool((theirs >= intervals - 1e-5).all())
    for point in domain.sample(50, torch.Generator().manual_seed(0)):
        assert bool((spec.rows(model(point)) >= torch.maximum(theirs, intervals) - 1e-5).all())


@needs_shared
@pytest.mark.shared
def test_the_oracle_confirms_our_crown_on_the_reference_kaf_network() -> None:
    model, images, labels, _ = load_case("mnist_kaf_2x32")
    for i, layer in enumerate(model.layers):
        if type(layer).__name__ == "KAF":
            model.layers[i] = ours = models.KAF(len(layer.coef), size=layer.coef.shape[1], gamma=layer.gamma).eval()
            ours.alpha.data.copy_(layer.coef)
            ours.dictionary.copy_(layer.grid)
    domain, spec = LpBall(images[:5], 0.01, clip=(0.0, 1.0)), class_margins(labels[:5], 10)
    theirs = margins(model, domain, spec).double()
    torch.testing.assert_close(_crown_on_its_intervals(model, domain, spec), theirs, rtol=1e-4, atol=1e-4)
