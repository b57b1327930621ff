"""Lower ends of the layers' brackets: attained, below the upper ends, and near them."""

from __future__ import annotations

import pytest
import torch
from test_clarke import _cases
from test_lipschitz import CONVOLUTIONS, _matrix
from torch import nn

from certify.graph import trace
from certify.lipschitz import lipschitz_constant
from certify.lipschitz.power import attained
from certify.lipschitz.sampled import JacobianAscent
from certify.ops.base import Elementwise
from certify.sets import LpBall

INF = torch.inf
QUICK = JacobianAscent(starts=3, steps=2)


@pytest.mark.parametrize(("layer", "shape"), CONVOLUTIONS, ids=lambda item: str(item)[:40])
@pytest.mark.parametrize("p", [2, INF])
def test_power_iteration_is_below_the_dense_norm_and_near_it(
    layer: nn.Module, shape: tuple[int, ...], p: float
) -> None:
    exact = float(torch.linalg.matrix_norm(_matrix(layer, shape), ord=p))
    graph = trace(layer.double().eval(), torch.zeros((1, *shape), dtype=torch.float64))
    with torch.no_grad():
        found = attained(graph, graph.nodes[graph.output], p, None)
    assert exact * (1 - 1e-4) <= found <= exact


@pytest.mark.parametrize("p", [2, INF])
@pytest.mark.parametrize("case", range(11))
def test_every_layer_has_a_bracket(case: int, p: float) -> None:
    model, shape = _cases()[case]
    for domain in (None, LpBall(torch.rand(2, *shape, generator=torch.Generator().manual_seed(case)), 0.2, p=p)):
        lower, upper = (
            lipschitz_constant(model, p=p, domain=domain, input_shape=shape, method=method).layers
            for method in (QUICK, "product")
        )
        assert set(lower) == set(upper)
        assert all(lower[name] <= upper[name] for name in upper)
        graph = trace(model.double(), torch.zeros((1, *shape), dtype=torch.float64))
        model.float()
        for name, node in graph.nodes.items():
            if domain is None and isinstance(node.rule, Elementwise):
                assert lower[name] >= 0.9 * upper[name]


def test_one_input_of_an_overlapping_max_pool_moves_all_its_windows() -> None:
    model = nn.Sequential(nn.MaxPool2d(2, 1)).eval()
    found = lipschitz_constant(model, input_shape=(1, 4, 4), method=QUICK).layers["0"]
    assert found == pytest.approx(2)
    spike = torch.zeros(1, 1, 4, 4)
    spike[0, 0, 1, 1] = 1
    local = lipschitz_constant(model, domain=LpBall(spike, 0.01), method=QUICK).layers["0"]
    assert local >= 2 * (1 - 1e-12)
    assert lipschitz_constant(model, p=INF, input_shape=(1, 4, 4), method=QUICK).layers["0"] == 1
