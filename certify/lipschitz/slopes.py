"""What local constants start from: the slope range of every neuron, and adjoints with positive weights."""

from __future__ import annotations

import torch
from torch import Tensor

from certify.enclosures import Interval
from certify.errors import InvalidInput
from certify.graph import Graph, Node
from certify.ops.base import Affine, Elementwise
from certify.ops.pool import MaxPool
from certify.propagate.methods import BoundMethod, Propagation, resolve_method
from certify.propagate.state import Knowledge
from certify.rounding import FloatAnyOrder, gamma
from certify.sets import PerturbationSet


def learned(graph: Graph, domain: PerturbationSet | None, method: str | BoundMethod) -> Knowledge | None:
    """Return what a bound method knows of the values of all nodes; None on the whole space."""
    chosen = resolve_method(method)
    if not isinstance(chosen, Propagation):
        raise InvalidInput(f"method {chosen.name!r} has no intervals of layers", "ibp, crown-ibp or crown")
    return None if domain is None else chosen.learn(graph, domain, FloatAnyOrder(graph.dtype))


def batch_of(domain: PerturbationSet | None) -> int:
    """Return how many samples have constants of their own: one on the whole space."""
    return 1 if domain is None else domain.batch


def slope_ranges(graph: Graph, knowledge: Knowledge | None) -> dict[str, Interval]:
    """Return [m, M] [batch, *shape], float64, of every activation's neurons: m (s - t) <= f(s) - f(t) <= M (s - t).

    A NaN end of an activation's facts knows nothing and becomes infinite.
    """
    found = {}
    batch = batch_of(None if knowledge is None else knowledge.domain)
    for node in graph.nodes.values():
        if isinstance(node.rule, Elementwise):
            slope = node.rule.facts.slope_range(_inputs(graph, knowledge, node)).double().sanitized()
            found[node.name] = Interval(*(end.expand(batch, *node.shape) for end in (slope.lower, slope.upper)))
    return found


def contenders(graph: Graph, knowledge: Knowledge | None) -> dict[str, Tensor]:
    """Return, for every max-pooling, which inputs of its windows may be the largest: bool [batch, outputs, k]."""
    found = {}
    for node in graph.nodes.values():
        if isinstance(node.rule, MaxPool):
            z, windows = _inputs(graph, knowledge, node), node.rule.windows.to(graph.device)
            low, up = (end.flatten(1)[:, windows].masked_fill(windows < 0, -torch.inf) for end in (z.lower, z.upper))
            found[node.name] = (windows >= 0) & ~(up < low.amax(2, keepdim=True))
    return found


def absolute_transpose(rule: Affine, A: Tensor, shapes: list[tuple[int, ...]]) -> tuple[Tensor, ...]:
    """Return |W|^T A per input."""
    with torch.enable_grad():
        zeros = [A.new_zeros((len(A), *shape), requires_grad=True) for shape in shapes]
        return torch.autograd.grad(rule.absolute(*zeros), zeros, A)


def pulled_back(graph: Graph, node: Node, rows: Tensor, error: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Return rows [n, *out] over the inputs of an affine node, with bounds of their entries' errors."""
    rule = node.rule
    assert isinstance(rule, Affine)
    shapes = [graph.shape(parent) for parent in node.inputs]
    roundings = gamma(2 * rule.fan_out + 16, torch.float64)
    sizes = absolute_transpose(rule, (rows.abs() * roundings + error) * (1 + roundings), shapes)
    return list(zip(rule.transpose(rows), sizes, strict=True))


def _inputs(graph: Graph, knowledge: Knowledge | None, node: Node) -> Interval:
    if knowledge is not None:
        return knowledge.inputs(node)[0]
    end = torch.full((1, *graph.shape(node.inputs[0])), torch.inf, dtype=torch.float64, device=graph.device)
    return Interval(-end, end)
