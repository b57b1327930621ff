"""The dual network: both lines of a piecewise-linear neuron are parallel, so the dual needs no optimisation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from certify.activations.base import Activation, slope_between
from certify.convex.intervals import learned
from certify.enclosures import Interval, Relaxation
from certify.graph import Graph, Node
from certify.ops.base import Elementwise
from certify.propagate.backward import bound_neurons
from certify.propagate.methods import BoundMethod, Propagation, sweep
from certify.propagate.state import Knowledge
from certify.registry import register_method
from certify.rounding import Arithmetic
from certify.sets import PerturbationSet


class Parallel(Knowledge):
    """Knowledge whose piecewise-linear activations have two lines with the slope of the chord."""

    def relaxation(self, node: Node) -> Relaxation | None:
        """Return the parallel lines of a piecewise-linear activation, the usual ones of everything else."""
        rule = node.rule
        if isinstance(rule, Elementwise) and rule.facts.piecewise:
            return parallel_lines(rule.facts, self.intervals[node.inputs[0]])
        return super().relaxation(node)


def parallel_lines(facts: Activation, z: Interval) -> Relaxation:
    """Return sound lines over z, both with the slope of the chord where a kink is inside: u / (u - l) for a ReLU.

    Where the chord has no finite slope, and on intervals without a kink, they are the activation's own.
    """
    ends = z.double()
    values = (facts.forward(end).double() for end in (z.lower, z.upper))  # any slope is sound
    first, last = values
    slope = slope_between(ends.lower, first, ends.upper, last).to(z.lower.dtype)
    own, found = facts.relax(z), facts.lines(z, (slope, slope))
    use = facts.undecided(z) & torch.isfinite(found.lower_offset) & torch.isfinite(found.upper_offset)
    return Relaxation(
        torch.where(use, found.lower_slope, own.lower_slope),
        torch.where(use, found.lower_offset, own.lower_offset),
        torch.where(use, found.upper_slope, own.upper_slope),
        torch.where(use, found.upper_offset, own.upper_offset),
    )


@register_method("wong-kolter")
@dataclass(frozen=True)
class WongKolter(Propagation):
    """Rows by the dual network, whose lines are parallel. Reference: Wong and Kolter 2018, arXiv 1711.00851.

    Smooth activations, which the paper does not treat, have CROWN's lines. The intervals come from the dual network
    too, or from another method that ``intervals`` names.
    """

    name: ClassVar[str] = "wong-kolter"
    intervals: str | BoundMethod | None = None

    def learn(self, graph: Graph, domain: PerturbationSet, arithmetic: Arithmetic) -> Knowledge:
        """Return the intervals, by dual networks per layer unless another method gives them."""
        if self.intervals is None:
            return sweep(Parallel(graph, domain, arithmetic), bound_neurons)
        return Parallel(graph, domain, arithmetic, learned(self.intervals, graph, domain, arithmetic).intervals)
