"""Intervals that a method takes from another one."""

from __future__ import annotations

from certify.errors import InvalidInput
from certify.graph import Graph
from certify.propagate.methods import BoundMethod, Propagation, resolve_method
from certify.propagate.state import Knowledge
from certify.rounding import Arithmetic
from certify.sets import PerturbationSet


def learned(intervals: str | BoundMethod, graph: Graph, domain: PerturbationSet, arithmetic: Arithmetic) -> Knowledge:
    """Return what the method ``intervals`` knows of every node; raises ``InvalidInput`` if it only answers claims."""
    method = resolve_method(intervals)
    if not isinstance(method, Propagation):
        raise InvalidInput(
            f"intervals={method.name!r}, which has none", "ibp, crown or alpha-crown", 'intervals="crown"'
        )
    return method.learn(graph, domain, arithmetic)
