"""The network in real arithmetic: its rules with the same numbers in float64."""

from __future__ import annotations

import copy
from dataclasses import replace

import torch
from torch import Tensor

from certify.graph import Graph
from certify.ops.base import Rule


def in_float64(graph: Graph) -> Graph:
    """Return the graph with the same numbers in float64."""
    nodes = type(graph.nodes)((name, replace(node, rule=_doubled(node.rule))) for name, node in graph.nodes.items())
    return replace(graph, model=copy.deepcopy(graph.model).double(), nodes=nodes, dtype=torch.float64)


def _doubled(rule: Rule) -> Rule:
    twin = copy.copy(rule)
    for name, value in vars(rule).items():
        if isinstance(value, Tensor) and value.is_floating_point():
            setattr(twin, name, value.double())
    return twin
