"""The bound methods: IBP, CROWN-IBP and CROWN, as values that carry their options."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Protocol, runtime_checkable

import torch
from jaxtyping import Float64
from torch import Tensor

from certify.enclosures import Interval
from certify.errors import InvalidInput
from certify.graph import INPUT, Graph, Node
from certify.propagate.backward import bound_claim, bound_neurons
from certify.propagate.state import Knowledge, propagate_intervals
from certify.registry import METHODS, lookup, register_method
from certify.rounding import Arithmetic, round_down, round_up
from certify.sets import PerturbationSet
from certify.specs import Spec


@runtime_checkable
class BoundMethod(Protocol):
    """A way to bound a claim; ``name`` is its public name."""

    @property
    def name(self) -> str:
        """The name that reports print."""
        ...

    def bound(self, graph: Graph, domain: PerturbationSet, spec: Spec, arithmetic: Arithmetic) -> Tensor:
        """Return lower bounds of the rows C y + d, float64 [batch, rows]; -inf where nothing is known."""
        ...


class Propagation:
    """What the three methods share: learn the intervals of all nodes, then bound the rows from the output."""

    relax: ClassVar[bool] = True
    twice: ClassVar[bool] = False  # whether the rows are bounded by the activations' second lines too

    def learn(self, graph: Graph, domain: PerturbationSet, arithmetic: Arithmetic) -> Knowledge:
        """Return the intervals of every node."""
        return propagate_intervals(Knowledge(graph, domain, arithmetic))

    def bound(self, graph: Graph, domain: PerturbationSet, spec: Spec, arithmetic: Arithmetic) -> Tensor:
        """Return lower bounds of the rows C y + d."""
        return finite(self.rows(self.learn(graph, domain, arithmetic), spec))

    def rows(self, knowledge: Knowledge, spec: Spec) -> Float64[Tensor, "batch rows"]:
        """Return what the intervals give; those of a relaxing method are never worse than one step of IBP."""
        margin = spec_rows(knowledge, spec, relax=False)
        if self.relax:
            margin = torch.fmax(margin, spec_rows(knowledge, spec, relax=True))
        other = knowledge.second() if self.twice else None
        if other is not None:
            margin = torch.fmax(margin, spec_rows(other, spec, relax=True))
        return margin


def finite(margin: Tensor) -> Tensor:
    """Return -inf, which says nothing, for whatever is no number."""
    return margin.nan_to_num(nan=-torch.inf, posinf=-torch.inf, neginf=-torch.inf)


@register_method("ibp")
@dataclass(frozen=True)
class IBP(Propagation):
    """Interval bound propagation; the rows and the affine nodes before the output are merged."""

    name: ClassVar[str] = "ibp"
    relax: ClassVar[bool] = False


@register_method("crown-ibp")
@dataclass(frozen=True)
class CrownIBP(Propagation):
    """Intervals by IBP, the rows of the claim by CROWN. Reference: Zhang et al. 2020, arXiv 1906.06316."""

    name: ClassVar[str] = "crown-ibp"


@register_method("crown")
@dataclass(frozen=True)
class CROWN(Propagation):
    """Intervals and rows by CROWN, intersected with IBP at every node. Reference: Zhang et al. 2018, arXiv 1811.00866.

    ``intermediate`` replaces the intervals of some nodes by given ones (for comparison with other tools); they are
    taken on trust.
    """

    name: ClassVar[str] = "crown"
    twice: ClassVar[bool] = True
    intermediate: Mapping[str, Interval] = field(default_factory=dict)

    def learn(self, graph: Graph, domain: PerturbationSet, arithmetic: Arithmetic) -> Knowledge:
        """IBP per node, then CROWN for the neurons that some relaxation depends on."""
        unknown = set(self.intermediate) - set(graph.nodes)
        if unknown:
            raise InvalidInput(f"intermediate bounds for {sorted(unknown)}", f"nodes among {list(graph.nodes)}")
        return sweep(Knowledge(graph, domain, arithmetic), bound_neurons, given=self.intermediate)


def sweep(
    knowledge: Knowledge,
    tighten: Callable[[Knowledge, Node, Tensor], Interval],
    *,
    given: Mapping[str, Interval] | None = None,
    known: Mapping[str, Interval] | None = None,
) -> Knowledge:
    """Fill the intervals from the input on: one step of IBP, then ``tighten(knowledge, node, wanted)`` where it helps.

    ``tighten`` returns bounds [n], float64, of the outputs at the mask ``wanted``. Intervals that are ``given`` replace
    all others, those ``known`` already are intersected with them.
    """
    graph, shapes = knowledge.graph, {INPUT: "box" if knowledge.domain.is_box else ""}
    for node in graph.nodes.values():
        shapes[node.name] = _exactness(node, shapes)
        if given is not None and node.name in given:
            knowledge.intervals[node.name] = given[node.name]
            continue
        interval = knowledge.forward_interval(node)
        interval = interval if known is None else interval & known[node.name]
        knowledge.intervals[node.name] = interval
        wanted = _wanted(graph, node, interval)
        if not shapes[node.name] and bool(wanted.any()):
            knowledge.intervals[node.name] = _intersect(interval, wanted, tighten(knowledge, node, wanted))
    return knowledge


def spec_rows(knowledge: Knowledge, spec: Spec, *, relax: bool) -> Float64[Tensor, "batch rows"]:
    """Return lower bounds of C y + d in float64."""
    found, d = bound_claim(knowledge, spec.C, relax=relax), spec.d.double()
    return found + d - 2.0**-50 * (d.abs() + found.abs())


def resolve_method(method: str | BoundMethod) -> BoundMethod:
    """Return the method for a registered name, or the instance itself."""
    return lookup("method", METHODS, method)() if isinstance(method, str) else method


def _exactness(node: Node, shapes: dict[str, str]) -> str:
    """What IBP knows without loss: "box" (any combination of values is reached), "tight" (each end is), or nothing."""
    if len(node.inputs) != 1 or shapes[node.inputs[0]] != "box":
        return ""
    if node.rule.elementwise:
        return "box"
    return "tight" if node.rule.affine else ""


def _wanted(graph: Graph, node: Node, interval: Interval) -> Tensor:
    """Where a tighter interval of ``node`` would help some consumer."""
    wanted = torch.zeros_like(interval.lower, dtype=torch.bool)
    for consumer in graph.consumers(node.name):
        if not consumer.rule.affine:
            wanted |= consumer.rule.undecided(interval)
    return wanted


def _intersect(interval: Interval, wanted: Tensor, found: Interval) -> Interval:
    dtype = interval.lower.dtype
    lower, upper = interval.lower.clone(), interval.upper.clone()
    lower[wanted] = torch.fmax(lower[wanted], round_down(found.lower, dtype))
    upper[wanted] = torch.fmin(upper[wanted], round_up(found.upper, dtype))
    # In real arithmetic two correct bounds may cross by a rounding error; their hull is the honest interval.
    return Interval(torch.minimum(lower, upper), torch.maximum(lower, upper))
