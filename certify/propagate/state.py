"""What is known about a graph on a domain: intervals per node, and the relaxations and errors made from them."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from certify.enclosures import Interval, Relaxation
from certify.graph import INPUT, Graph, Node
from certify.rounding import Arithmetic, FloatAnyOrder, tiny
from certify.sets import PerturbationSet


@dataclass
class Knowledge:
    """Intervals of the nodes of ``graph`` for inputs in ``domain``, under ``arithmetic``; filled in topological order.

    With a float arithmetic every interval holds for the float network, and relaxations are made on those intervals.
    """

    graph: Graph
    domain: PerturbationSet
    arithmetic: Arithmetic
    intervals: dict[str, Interval] = field(default_factory=dict)
    _relaxations: dict[str, Relaxation | None] = field(default_factory=dict)
    _errors: dict[str, Tensor | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.intervals.setdefault(INPUT, self.domain.interval())

    @property
    def rounds(self) -> bool:
        """Whether rounding counts."""
        return isinstance(self.arithmetic, FloatAnyOrder)

    def inputs(self, node: Node) -> list[Interval]:
        """Return the intervals of a node's inputs."""
        return [self.intervals[name] for name in node.inputs]

    def forward_interval(self, node: Node) -> Interval:
        """Return the interval of a node from those of its inputs (interval bound propagation, one step)."""
        zs = self.inputs(node)
        interval = node.rule.interval(*zs)
        if self.rounds:
            error = node.rule.rounding_error(*zs)
            interval = interval if error is None else interval.widen(error).sanitized()
        return interval

    def relaxation(self, node: Node) -> Relaxation | None:
        """Return the node's relaxation on its input intervals, made once."""
        if node.name not in self._relaxations:
            self._relaxations[node.name] = node.rule.relax(*self.inputs(node))
        return self._relaxations[node.name]

    def error(self, node: Node) -> Tensor | None:
        """Return e [batch, *shape]: what a row loses at the node per unit of |A|, by the network's and our rounding."""
        if node.name not in self._errors:
            zs = self.inputs(node)
            parts = [node.rule.rounding_error(*zs)]
            if not node.rule.affine:
                parts.append(node.rule.line_error(self.relaxation(node), *zs))
            found = [part for part in parts if part is not None]
            self._errors[node.name] = sum(found[1:], found[0]) if found else None
        return self._errors[node.name]

    def underflow(self, node: Node) -> Tensor:
        """Return, per sample in float64, what products A W below the smallest normal number can cost."""
        terms = getattr(node.rule, "fan_out", 1) + 2
        total = torch.zeros(self.domain.batch, dtype=torch.float64, device=self.graph.device)
        for z in self.inputs(node):
            total = total + (z.magnitude.double().flatten(1) + 1).sum(1)
        return total * (terms * tiny(self.graph.dtype))


def propagate_intervals(knowledge: Knowledge) -> Knowledge:
    """Fill the intervals of all nodes by interval bound propagation."""
    for node in knowledge.graph.nodes.values():
        knowledge.intervals[node.name] = knowledge.forward_interval(node)
    return knowledge
