"""Nodes as affine maps of the input and of the outputs of other nodes: matrices in float64, with their errors.

The maps are those of the real network, whose weights are the float network's own numbers; they depend on no sample.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

from certify.enclosures import Interval
from certify.errors import UnsupportedOperation
from certify.graph import INPUT, Graph, Node
from certify.ops.arithmetic import Scale, Sum
from certify.ops.base import Affine, Rule
from certify.ops.conv import Conv, ConvTranspose
from certify.ops.linear import Linear
from certify.ops.pool import Average
from certify.ops.shape import Concat, Select
from certify.rounding import gamma, tiny

CPU = torch.device("cpu")
RuleT = TypeVar("RuleT", bound=Rule)

#: Rules whose numbers are all tensors, or exact in every dtype, so that a float64 copy is the same map.
KNOWN = (Linear, Conv, ConvTranspose, Scale, Sum, Average, Select, Concat)


@dataclass(frozen=True, eq=False)
class Expansion:
    """y[k] = sum over sources and j of (M[j, k] +- E[j, k]) source[j] + (constant[k] +- error[k]), all float64.

    ``parts`` holds (M, E) [source size, *shape] by the source's name; ``constant`` and ``error`` are [1, *shape].
    """

    parts: dict[str, tuple[Tensor, Tensor]]
    constant: Tensor
    error: Tensor


def expand(graph: Graph) -> dict[str, Expansion]:
    """Return the expansion of the input and of every node; those that are not affine stand for themselves."""
    found = {INPUT: _itself(INPUT, graph.input_shape)}
    for node in graph.nodes.values():
        if node.rule.affine:
            found[node.name] = _through(graph, node, [found[name] for name in node.inputs])
        else:
            found[node.name] = _itself(node.name, node.shape)
    return found


def _itself(name: str, shape: tuple[int, ...]) -> Expansion:
    size = torch.Size(shape).numel()
    eye = torch.eye(size, dtype=torch.float64).view(size, *shape)
    zero = torch.zeros(1, *shape, dtype=torch.float64)
    return Expansion({name: (eye, torch.zeros_like(eye))}, zero, zero)


def _through(graph: Graph, node: Node, inputs: list[Expansion]) -> Expansion:
    rule = doubled(_known(node), graph.dtype)
    g, flushed = gamma(rule.fan_in + 8, torch.float64), (rule.fan_in + 1) * tiny(torch.float64)
    parts = {}
    for source in dict.fromkeys(source for part in inputs for source in part.parts):
        size = torch.Size(graph.shape(source)).numel()
        empty = [torch.zeros(size, *part.constant.shape[1:], dtype=torch.float64) for part in inputs]
        pairs = [part.parts.get(source, (zero, zero)) for part, zero in zip(inputs, empty, strict=True)]
        # Every computed sum errs by g |W| |M|; the factor covers the roundings of the error itself.
        error = rule.absolute(*(E + g * M.abs() for M, E in pairs)) * (1 + 2 * g) + flushed
        parts[source] = rule.linear(*(M for M, _ in pairs)), error
    constants = [part.constant for part in inputs]
    error = rule.absolute(*(part.error for part in inputs)) * (1 + 2 * g) + flushed
    own = rule.rounding_error(*(Interval(c, c) for c in constants))
    return Expansion(parts, rule.forward(*constants), error if own is None else (error + own) * (1 + 2 * g))


def in_float64(graph: Graph) -> Graph:
    """Return the graph with the same numbers in float64: in real arithmetic the two are one network."""
    nodes = type(graph.nodes)(
        (name, replace(node, rule=doubled(node.rule, graph.dtype, graph.device))) for name, node in graph.nodes.items()
    )
    return replace(graph, model=copy.deepcopy(graph.model).double(), nodes=nodes, dtype=torch.float64)


def doubled(rule: RuleT, dtype: torch.dtype, device: torch.device = CPU) -> RuleT:
    """Return a copy of a rule of a network in ``dtype`` with the same numbers in float64, on ``device``."""
    twin = copy.copy(rule)
    for name, value in vars(rule).items():
        if isinstance(value, Tensor):
            value = value.detach().to(device)
            setattr(twin, name, value.double() if value.is_floating_point() else value)
    if isinstance(twin, Select):
        twin.fill = float(torch.tensor(twin.fill, dtype=torch.float64).to(dtype))  # as the network pads
    return twin


def _known(node: Node) -> Affine:
    if type(node.rule) not in KNOWN:
        raise UnsupportedOperation(
            f"{node.kind} at {node.name!r} in a linear program", "affine operations of the package", 'method="crown"'
        )
    assert isinstance(node.rule, Affine)
    return node.rule
