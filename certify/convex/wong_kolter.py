"""``wong-kolter``: the dual network, which is CROWN with parallel lines.

Reference: Wong and Kolter, "Provable defenses against adversarial examples via the convex outer adversarial polytope"
(2018), arXiv 1711.00851, theorem 1 and algorithm 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from certify.enclosures import Relaxation
from certify.errors import InvalidInput
from certify.graph import Graph, Node
from certify.ops.base import Elementwise
from certify.propagate.backward import bound_neurons
from certify.propagate.methods import BoundMethod, Propagation, resolve_method, sweep
from certify.propagate.state import Knowledge
from certify.registry import register_method
from certify.rounding import Arithmetic
from certify.sets import PerturbationSet


class ParallelLines(Knowledge):
    """Knowledge whose piecewise linear activations have two lines of one slope: that of the upper one."""

    def relaxation(self, node: Node) -> Relaxation | None:
        """Return the lines; smooth activations keep those of CROWN."""
        found = super().relaxation(node)
        if not isinstance(node.rule, Elementwise) or not node.rule.facts.piecewise:
            return found
        assert found is not None
        slope: Tensor = found.upper_slope
        return node.rule.facts.lines(self.inputs(node)[0], (slope, slope))


@register_method("wong-kolter")
@dataclass(frozen=True)
class WongKolter(Propagation):
    """The dual network's bound: for ReLU both lines rise by u / (u - l).

    ``intervals`` are by the same method, layer by layer ("wong-kolter"), or those of another one.
    """

    name: ClassVar[str] = "wong-kolter"
    intervals: str | BoundMethod = "wong-kolter"

    def learn(self, graph: Graph, domain: PerturbationSet, arithmetic: Arithmetic) -> Knowledge:
        """Return the intervals of every node, with parallel lines."""
        if self.intervals == self.name:
            return sweep(ParallelLines(graph, domain, arithmetic), bound_neurons)
        return ParallelLines(graph, domain, arithmetic, learned_by(self.intervals, graph, domain, arithmetic).intervals)


def learned_by(method: str | BoundMethod, graph: Graph, domain: PerturbationSet, arithmetic: Arithmetic) -> Knowledge:
    """Return what a bound method knows of all nodes. Raises ``InvalidInput`` for methods without intervals."""
    chosen = resolve_method(method)
    if not isinstance(chosen, Propagation):
        raise InvalidInput(f"method {chosen.name!r} has no intervals of layers", "ibp, crown-ibp or crown")
    with torch.no_grad():
        return chosen.learn(graph, domain, arithmetic)
