"""Slope ranges of all activations: over the whole line, or over what an intermediate bound method proves."""

from __future__ import annotations

import torch

from certify.enclosures import Interval
from certify.errors import InvalidInput
from certify.graph import Graph
from certify.ops.base import Elementwise
from certify.propagate.methods import BoundMethod, Propagation, resolve_method
from certify.rounding import FloatAnyOrder
from certify.sets import PerturbationSet


def slope_ranges(graph: Graph, domain: PerturbationSet | None, method: str | BoundMethod) -> dict[str, Interval]:
    """Return [m, M] with m (s - t) <= f(s) - f(t) <= M (s - t), per neuron of every activation node, in float64.

    Each is [samples, *shape], for s, t that the neuron meets on the domain; one sample without a domain. Infinite
    where nothing is known.
    """
    chosen = resolve_method(method)
    if not isinstance(chosen, Propagation):
        raise InvalidInput(f"method {chosen.name!r} has no intervals of layers", "ibp, crown-ibp or crown")
    knowledge = None if domain is None else chosen.learn(graph, domain, FloatAnyOrder(graph.dtype))
    found: dict[str, Interval] = {}
    for node in graph.nodes.values():
        if not isinstance(node.rule, Elementwise):
            continue
        if knowledge is None:
            end = torch.full((1, *node.shape), torch.inf, dtype=torch.float64, device=graph.device)
            z = Interval(-end, end)
        else:
            (z,) = knowledge.inputs(node)
        slope = node.rule.facts.slope_range(z)
        batch = 1 if domain is None else domain.batch
        lower, upper = (end.double().expand(batch, *node.shape) for end in (slope.lower, slope.upper))
        found[node.name] = Interval(lower.nan_to_num(nan=-torch.inf), upper.nan_to_num(nan=torch.inf))
    return found
