"""What is known about a graph on a domain: intervals per node, and the lines, constants and errors made from them.

Rows are pulled back through exact affine maps without their constants and rounding errors. Those ride along instead:
the float network's value of a node is

    y = (what its pulled-back coefficients expand to) + constant + delta,    |delta| <= error,

and the ``Rider`` (constant, error) is settled at the next activation, whose lines absorb it: the float contract then
costs a shift of offsets per node, not a pass over the coefficients of every row.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from certify.enclosures import Interval, Relaxation
from certify.graph import INPUT, Graph, Node
from certify.ops.base import Elementwise, inner_error
from certify.rounding import Arithmetic, FloatAnyOrder, gamma, round_down, round_up, tiny, unit_roundoff
from certify.sets import PerturbationSet


@dataclass(frozen=True, eq=False)
class Rider:
    """What a node's value holds besides its pulled-back part, each [batch or 1, *shape]; None is zero."""

    constant: Tensor | None = None  # float64
    error: Tensor | None = None


@dataclass
class Knowledge:
    """Intervals of the nodes of ``graph`` for inputs in ``domain``, under ``arithmetic``; filled in topological order.

    With a float arithmetic every interval holds for the float network, and relaxations are made on those intervals.
    """

    graph: Graph
    domain: PerturbationSet
    arithmetic: Arithmetic
    intervals: dict[str, Interval] = field(default_factory=dict)
    _errors: dict[str, Tensor | None] = field(default_factory=dict)
    _riders: dict[str, Rider] = field(default_factory=dict)
    _lines: dict[str, Relaxation] = field(default_factory=dict)
    _fans: dict[str, tuple[Relaxation, Tensor, Tensor]] = field(default_factory=dict)
    _hulls: dict[str, tuple[Interval, Tensor | None]] = field(default_factory=dict)
    _underflows: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.intervals.setdefault(INPUT, self.domain.interval())

    @property
    def rounds(self) -> bool:
        """Whether rounding counts."""
        return isinstance(self.arithmetic, FloatAnyOrder)

    @cached_property
    def entry(self) -> str:
        """The node at which rows may end as well as at the input: elementwise maps of a box are boxes, exactly."""
        name = INPUT
        while self.domain.is_box:
            consumers = self.graph.consumers(name)
            if len(consumers) != 1 or len(consumers[0].inputs) != 1 or not consumers[0].rule.elementwise:
                break
            name = consumers[0].name
        return name

    def hull(self, name: str) -> tuple[Interval, Tensor | None]:
        """Return the box of a node's values in float64, and which samples have one (None: all)."""
        if name == INPUT:
            return self.domain.hull, None
        if name not in self._hulls:
            interval = self.intervals[name].double()
            known = torch.isfinite(interval.lower) & torch.isfinite(interval.upper)
            finite = Interval(torch.where(known, interval.lower, 0), torch.where(known, interval.upper, 0))
            self._hulls[name] = finite, None if bool(known.all()) else known.flatten(1).all(1)
        return self._hulls[name]

    def inputs(self, node: Node) -> list[Interval]:
        """Return the intervals of a node's inputs."""
        return [self.intervals[name] for name in node.inputs]

    def forward_interval(self, node: Node) -> Interval:
        """Return the interval of a node from those of its inputs (interval bound propagation, one step)."""
        interval = node.rule.interval(*self.inputs(node))
        error = self.error(node)
        return interval if error is None else interval.widen(error).sanitized()

    def error(self, node: Node) -> Tensor | None:
        """Return e [batch, *shape]: what rounding at the node costs a row per unit of |A| (``Rule.rounding_error``)."""
        if not self.rounds:
            return None
        if node.name not in self._errors:
            self._errors[node.name] = node.rule.rounding_error(*self.inputs(node))
        return self._errors[node.name]

    def relaxation(self, node: Node) -> Relaxation | None:
        """Return the node's lines over its input intervals, for real arithmetic."""
        return node.rule.relax(*self.inputs(node))

    def lines(self, node: Node) -> Relaxation:
        """Return the node's lines, made once, with all that rounds, and what rides along its input, absorbed."""
        if node.name not in self._lines:
            relaxation = self.relaxation(node)
            assert relaxation is not None
            self._lines[node.name] = self.absorb(node, relaxation)
        return self._lines[node.name]

    def second(self) -> Knowledge | None:
        """Return the same intervals with the activations' second choices of lines; None where there are none."""
        twin = Knowledge(self.graph, self.domain, self.arithmetic, self.intervals)
        for node in self.graph.nodes.values():
            other = node.rule.facts.second_lines(*self.inputs(node)) if isinstance(node.rule, Elementwise) else None
            if other is not None:
                twin._lines[node.name] = twin.absorb(node, other)
        return twin if twin._lines else None

    def fan(self, node: Node) -> tuple[Relaxation, Tensor, Tensor]:
        """Return the fan of an activation's lines [K, batch, *shape], with all absorbed, and where its best lines are.

        The interpolation between two lines rounds by a few units of the larger one.
        """
        if node.name not in self._fans:
            assert isinstance(node.rule, Elementwise)
            fan = node.rule.facts.fan(*self.inputs(node))
            r = self.absorb(node, Relaxation(fan.lower_slope, fan.lower_offset, fan.upper_slope, fan.upper_offset))
            if self.rounds:
                reach, u, dtype = self._reach(node), gamma(8, self.graph.dtype), self.graph.dtype
                low, up = (
                    (slope.abs().amax(0) * reach + offset.abs().amax(0)) * u
                    for slope, offset in ((r.lower_slope, r.lower_offset), (r.upper_slope, r.upper_offset))
                )
                lower, upper = round_down(r.lower_offset - low, dtype), round_up(r.upper_offset + up, dtype)
                r = Relaxation(r.lower_slope, lower, r.upper_slope, upper)
            self._fans[node.name] = r, fan.lower_start, fan.upper_start
        return self._fans[node.name]

    def absorb(self, node: Node, r: Relaxation) -> Relaxation:
        """Shift lines of ``node`` (with any leading dimensions) from values to pulled-back parts of values.

        For the lower line a y + b with y = v + c + delta, |delta| <= o:  a v + (b + a c - |a| o - error), and the
        engine rounds the product A a, once per unit of |a v|, and the sum over the offsets.
        """
        rider = self.rider(node.inputs[0]) if isinstance(node.rule, Elementwise) else Rider()
        error = self._total_error(node)
        if rider.constant is None and error is None and not self.rounds:
            return r
        ends = []
        for slope, offset, sign in ((r.lower_slope, r.lower_offset, 1.0), (r.upper_slope, r.upper_offset, -1.0)):
            b = offset.double()
            if rider.constant is not None:
                b = b + slope * rider.constant
            if self.rounds:
                b = b - sign * self._cost(node, rider, error, slope, b)
            ends.append(round_down(b, offset.dtype) if sign > 0 else round_up(b, offset.dtype))
        return Relaxation(r.lower_slope, ends[0], r.upper_slope, ends[1])

    def _cost(self, node: Node, rider: Rider, error: Tensor | None, slope: Tensor, b: Tensor) -> Tensor:
        dtype = slope.dtype
        cost = b.abs() * (2 * inner_error(torch.Size(node.shape).numel(), dtype)) + 2 * tiny(dtype)
        if error is not None:  # max-pooling has its lines flat
            error = error if isinstance(node.rule, Elementwise) else error.reshape(b.shape)
            cost = cost + error * (1 + gamma(8, dtype))
        if isinstance(node.rule, Elementwise):
            owed = self._reach(node) * gamma(4, dtype)
            if rider.error is not None:
                owed = owed + rider.error * (1 + 2 * gamma(8, dtype))
            cost = cost + slope.abs() * owed
        return cost

    def _reach(self, node: Node) -> Tensor:
        """Return a bound, float64, of the pulled-back part of an activation's input."""
        rider, reach = self.rider(node.inputs[0]), self.intervals[node.inputs[0]].magnitude.double()
        for part in (rider.constant, rider.error):
            reach = reach if part is None else reach + part.abs()
        return reach

    def rider(self, name: str) -> Rider:
        """Return what rides along the value of a node (or of the input)."""
        if name not in self._riders:
            self._riders[name] = self._ride(name)
        return self._riders[name]

    def _ride(self, name: str) -> Rider:
        node = self.graph.nodes.get(name)
        if node is None or name == self.entry:
            return Rider(error=self._fork_error(name))  # rows end here
        if not node.rule.affine:
            return Rider()  # its lines have absorbed everything
        error = self._total_error(node)
        if not node.rule.carries:
            zeros = [torch.zeros(1, *self.graph.shape(source)).to(self.domain.center) for source in node.inputs]
            return self._rounded(node.rule.forward(*zeros).double(), error)
        riders = [self.rider(source) for source in node.inputs]
        batch = max((len(part) for r in riders for part in (r.constant, r.error) if part is not None), default=1)

        def padded(part: Tensor | None, source: str, dtype: torch.dtype) -> Tensor:
            whole = torch.zeros(batch, *self.graph.shape(source), dtype=dtype, device=self.graph.device)
            return whole if part is None else whole + part

        sources = list(zip(riders, node.inputs, strict=True))
        constant = node.rule.forward(*(padded(r.constant, name, torch.float64) for r, name in sources))
        if any(r.error is not None for r in riders):
            carried = node.rule.absolute(*(padded(r.error, name, self.graph.dtype) for r, name in sources))
            carried = carried * (1 + gamma(16, self.graph.dtype))
            error = carried if error is None else error + carried
        return self._rounded(constant, error)

    def _rounded(self, constant: Tensor, error: Tensor | None) -> Rider:
        """A rider whose error holds what the engine's inner products with its constant round."""
        if not bool((constant != 0).any()):
            return Rider(error=error)
        if self.rounds:
            extra = constant.abs().to(self.graph.dtype) * (2 * inner_error(constant[0].numel(), self.graph.dtype))
            error = extra if error is None else error + extra
        return Rider(constant, error)

    def _total_error(self, node: Node) -> Tensor | None:
        """The node's own error and that of adding the coefficients of its consumers."""
        parts = [part for part in (self.error(node), self._fork_error(node.name)) if part is not None]
        return sum(parts[1:], parts[0]) if parts else None

    def _fork_error(self, name: str) -> Tensor | None:
        """u |y| per sum of two coefficient tensors: what adding the parts of a fork rounds."""
        parts = sum(node.inputs.count(name) for node in self.graph.consumers(name))
        if not self.rounds or parts < 2 or name not in self.intervals:
            return None
        return self.intervals[name].magnitude * (gamma(parts, self.graph.dtype) + unit_roundoff(self.graph.dtype))

    def underflow(self, node: Node) -> Tensor:
        """Return, per sample in float64, what products of the engine below the smallest normal number can cost.

        Each product A W, and each sum of them, errs by less than that number, whatever A is, and meets an input.
        """
        if node.name not in self._underflows:
            terms = 4 * (getattr(node.rule, "fan_out", 1) + 2)
            sizes = [(z.magnitude.double().flatten(1) + 1).sum(1) for z in self.inputs(node)]
            self._underflows[node.name] = torch.stack(sizes).sum(0) * (terms * tiny(self.graph.dtype))
        return self._underflows[node.name]


def propagate_intervals(knowledge: Knowledge) -> Knowledge:
    """Fill the intervals of all nodes by interval bound propagation."""
    for node in knowledge.graph.nodes.values():
        knowledge.intervals[node.name] = knowledge.forward_interval(node)
    return knowledge
