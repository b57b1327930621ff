"""The network in real arithmetic: rules in float64, affine maps as matrices, and how far floats drift from it."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float64
from torch import Tensor

from certify.errors import UnsupportedOperation
from certify.graph import INPUT, Graph, Node
from certify.lipschitz.slopes import pulled_back
from certify.ops.base import Affine, Elementwise, Rule
from certify.ops.pool import MaxPool
from certify.propagate.state import Knowledge
from certify.rounding import FloatAnyOrder, gamma


def in_float64(graph: Graph) -> Graph:
    """Return the graph with the same numbers in float64: it stands for the network in real arithmetic."""
    nodes = type(graph.nodes)((name, replace(node, rule=_doubled(node.rule))) for name, node in graph.nodes.items())
    return replace(graph, model=copy.deepcopy(graph.model).double(), nodes=nodes, dtype=torch.float64)


def _doubled(rule: Rule) -> Rule:
    twin = copy.copy(rule)
    for name, value in vars(rule).items():
        if isinstance(value, Tensor) and value.is_floating_point():
            setattr(twin, name, value.double())
    return twin


def output_drift(knowledge: Knowledge) -> Float64[Tensor, "batch outputs"]:
    """Return e: the float network's outputs are within e of the real network's, everywhere on the domain.

    0 for real arithmetic. Errors grow by |W| through affine maps and by max |f'| through activations.
    """
    graph, batch = knowledge.graph, knowledge.domain.batch
    drift = {INPUT: torch.zeros(batch, *graph.input_shape, dtype=torch.float64, device=graph.device)}
    if isinstance(knowledge.arithmetic, FloatAnyOrder):
        for name, node in graph.nodes.items():
            grown = _through(knowledge, node, [drift[parent] for parent in node.inputs])
            own = knowledge.error(node)
            drift[name] = grown if own is None else (grown + own.double()) * (1 + 2.0**-40)
        return drift[graph.output].flatten(1)
    return torch.zeros(batch, math.prod(graph.shape(graph.output)), dtype=torch.float64, device=graph.device)


def _through(knowledge: Knowledge, node: Node, drifts: list[Tensor]) -> Tensor:
    rule = node.rule
    if isinstance(rule, Elementwise):
        slope = rule.facts.slope_range(knowledge.inputs(node)[0]).magnitude.double()
        return torch.where(drifts[0] > 0, drifts[0] * slope.nan_to_num(nan=math.inf), 0)
    if isinstance(rule, Affine):
        twin = _doubled(rule)
        assert isinstance(twin, Affine)
        return twin.absolute(*drifts) * (1 + gamma(2 * rule.fan_in + 16, torch.float64))
    if isinstance(rule, MaxPool):
        return rule.run(drifts[0])
    raise UnsupportedOperation(f"no float drift through {node.kind} at {node.name!r}", "affine nodes and activations")


@dataclass(frozen=True, eq=False)
class AffineForm:
    """z = sum over sources of W u + b; entries are within ``errors`` and ``slack`` of the true ones."""

    weights: dict[str, Float64[Tensor, "n m"]]
    errors: dict[str, Float64[Tensor, "n m"]]
    bias: Float64[Tensor, "n"]
    slack: Float64[Tensor, "n"]


def affine_form(graph: Graph, name: str) -> AffineForm:
    """Return the value of a node in terms of the input and of activations' outputs; ``graph`` is in float64.

    Raises ``UnsupportedOperation`` for nodes that are neither affine nor activations.
    """
    shape = graph.shape(name)
    size = math.prod(shape)
    eye = torch.eye(size, dtype=torch.float64, device=graph.device).view(size, *shape)
    pending: dict[str, tuple[Tensor, Tensor]] = {name: (eye, torch.zeros_like(eye))}
    weights, errors = {}, {}
    bias = torch.zeros(size, dtype=torch.float64, device=graph.device)
    slack = torch.zeros_like(bias)
    for node in (*reversed(graph.nodes.values()), None):
        source = INPUT if node is None else node.name
        if source not in pending:
            continue
        rows, error = pending.pop(source)
        if node is None or isinstance(node.rule, Elementwise):
            weights[source], errors[source] = rows.flatten(1), error.flatten(1)
            continue
        if not isinstance(node.rule, Affine):
            raise UnsupportedOperation(
                f"{node.kind} at {node.name!r}", "affine nodes and activations", "method='crown'"
            )
        shapes = [graph.shape(parent) for parent in node.inputs]
        zeros = [torch.zeros(1, *each, dtype=torch.float64, device=graph.device) for each in shapes]
        constant = node.rule.forward(*zeros).flatten()
        bias = bias + rows.flatten(1) @ constant
        mass = (rows.abs() + error).flatten(1) @ constant.abs()
        slack = slack + error.flatten(1) @ constant.abs() + mass * gamma(2 * len(constant) + 32, torch.float64)
        for parent, (part, noise) in zip(node.inputs, pulled_back(graph, node, rows, error), strict=True):
            if parent in pending:
                part, noise = pending[parent][0] + part, pending[parent][1] + noise
                noise = noise + part.abs() * 2.0**-50
            pending[parent] = part, noise
    return AffineForm(weights, errors, bias, slack * (1 + 2.0**-40))
