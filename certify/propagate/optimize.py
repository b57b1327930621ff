"""Optimising the slope of every activation's line, per row and neuron, for the row's own bound.

With the intervals of the nodes fixed, a row's bound is a function of its slopes, and its gradient needs no recorded
graph: the derivative of the bound by the coefficients of a node is the value that the worst input x* gives there,
pushed forward through the chosen lines. So a step is one pull back, which keeps the coefficients at the activations,
and one push forward of one point per row. Every slope is sound, hence every step; each row keeps its best bound.

Reference: Xu et al., "Fast and complete: enabling complete verification with massively parallel incomplete
verifiers" (2021), arXiv 2011.13824.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from jaxtyping import Float64, Int
from torch import Tensor

from certify.enclosures import Relaxation
from certify.graph import INPUT, Node
from certify.ops.base import Affine, Elementwise
from certify.propagate.backward import Rows
from certify.propagate.state import Knowledge

MOMENTS = (0.5, 0.9)  # of Adam: short memories, since only a few steps are taken
DECAY = 0.9  # of the step length, per step


@dataclass
class Side:
    """One side of an activation's fan, and where in it each row's line stands, with Adam's moments.

    ``slope`` and ``offset`` [K, groups, 1, *shape] are the fan's, laid out for the rows; ``place`` in [0, 1] is
    [groups, rows, *shape]. A fan of equal lines (above a ReLU) is ``fixed``.
    """

    slope: Tensor
    offset: Tensor
    place: Tensor
    fixed: bool

    def __post_init__(self) -> None:
        self.first, self.second = torch.zeros_like(self.place), torch.zeros_like(self.place)

    def line(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return slope and offset of every row's line, and their derivatives by the place."""
        steps = len(self.slope) - 1
        if self.fixed:
            return self.slope[0], self.offset[0], self.slope[0], self.offset[0]
        if steps == 1:
            (s0, s1), (o0, o1), weight = self.slope, self.offset, self.place
        else:
            place = self.place * steps
            k = place.floor().clamp_(max=steps - 1)
            weight, stride = place - k, self.slope[0].numel()
            index = torch.arange(stride, device=k.device).view(self.slope.shape[1:]) + k.long() * stride
            s0, s1, o0, o1 = (v.take(i) for v in (self.slope, self.offset) for i in (index, index + stride))
        ds, do = s1 - s0, o1 - o0
        slope, offset = torch.addcmul(s0, weight, ds), torch.addcmul(o0, weight, do)
        return (slope, offset, ds, do) if steps == 1 else (slope, offset, ds * steps, do * steps)

    def climb(self, gradient: Tensor, step: int, length: float) -> None:
        """Take one step of Adam upwards, projected to [0, 1]."""
        a, b = MOMENTS
        self.first.lerp_(gradient, 1 - a)
        self.second.mul_(b).addcmul_(gradient, gradient, value=1 - b)
        scale = (self.second / (1 - b**step)).sqrt_().add_(1e-12)
        self.place.addcdiv_(self.first, scale, value=length * DECAY ** (step - 1) / (1 - a**step)).clamp_(0, 1)


@dataclass
class Tape:
    """What one pull back leaves for the push forward: coefficients [groups, rows, *shape] and the lines they chose."""

    rows: Rows
    coefficients: dict[str, Tensor] = field(default_factory=dict)
    lines: dict[str, tuple[tuple[Tensor, ...], ...]] = field(default_factory=dict)  # of two Sides: lower, upper


class Climb:
    """The slopes of a block of rows: ``pull`` bounds the rows with them, ``step`` improves them."""

    def __init__(self, knowledge: Knowledge) -> None:
        self.knowledge = knowledge
        self.sides: dict[str, tuple[Side, Side]] = {}

    def pull(self, rows: Rows) -> tuple[Float64[Tensor, "rows"], Tape]:
        """Return the bounds of the rows with the present slopes, and what ``step`` needs."""
        tape, graph, entry = Tape(rows), self.knowledge.graph, self.knowledge.entry
        for name in reversed(graph.nodes):
            if name == entry or name not in rows.pending:
                continue
            node, lines = graph.nodes[name], None
            if isinstance(node.rule, Elementwise):
                if name not in self.sides:
                    A = rows.pending[name]
                    self.sides[name] = self._sides(node, rows, lambda _, start, A=A: start.expand_as(A).clone())
                low, up = (side.line() for side in self.sides[name])
                lines, tape.lines[name] = Relaxation(*low[:2], *up[:2]), (low, up)
            if not node.rule.affine:
                tape.coefficients[name] = rows.pending[name]
            rows.step(node, lines)
        tape.coefficients[entry] = rows.pending[entry]
        rows.settle(entry)
        return rows.result().lower, tape

    def step(self, tape: Tape, count: int, length: float) -> None:
        """Push the worst input of every row forward and climb along the gradients that it meets."""
        entry, rows = self.knowledge.entry, tape.rows
        values = {entry: self._worst(rows, tape.coefficients[entry])}  # the pulled-back parts of the nodes' values
        for node in self.knowledge.graph.nodes.values():
            if (node.name not in tape.coefficients and not node.rule.affine) or node not in rows.visited:
                continue
            inputs = []
            for name in node.inputs:
                v = values[name]
                constant = self.knowledge.rider(name).constant
                if constant is not None and not (node.rule.carries or isinstance(node.rule, Elementwise)):
                    v = v + rows.of_sample(name, constant.to(v.dtype))
                inputs.append(rows.unfit(node, name, v))
            if isinstance(node.rule, Elementwise):
                values[node.name] = self._through(node.name, tape, inputs[0], count, length)
            elif isinstance(node.rule, Affine):
                push = node.rule.push_window if node.name in rows.frames else node.rule.linear
                values[node.name] = push(*(v.flatten(0, 1) for v in inputs)).unflatten(0, inputs[0].shape[:2])
            else:
                values[node.name] = _derivative(node, tape.coefficients[node.name], rows.lines(node), inputs[0])

    def keep(self, rest: Int[Tensor, "rows"], old: Rows, new: Rows) -> None:
        """Go on with the rows ``rest`` of ``old``, which are those of ``new``."""
        for name, pair in self.sides.items():
            node = self.knowledge.graph.nodes[name]

            def place(side: int, start: Tensor, name: str = name, pair: tuple[Side, Side] = pair) -> Tensor:
                return start if pair[side].fixed else new.laid(name, old.flat(name, pair[side].place)[rest])

            fresh = self._sides(node, new, place)
            for side, was in zip(fresh, pair, strict=True):
                if not side.fixed:
                    side.first, side.second = (new.laid(name, old.flat(name, m)[rest]) for m in (was.first, was.second))
            self.sides[name] = fresh

    def _sides(self, node: Node, rows: Rows, place: Callable[[int, Tensor], Tensor]) -> tuple[Side, Side]:
        """Both sides of a node's fan for these rows; ``place(side, start)`` says where the rows stand in it."""
        lines, *starts = self.knowledge.fan(node)
        found = []
        slopes, offsets = (lines.lower_slope, lines.upper_slope), (lines.lower_offset, lines.upper_offset)
        for side, (slope, offset, start) in enumerate(zip(slopes, offsets, starts, strict=True)):
            slope, offset = (
                rows.of_sample(node.name, part.transpose(0, 1)).movedim(2, 0).contiguous() for part in (slope, offset)
            )
            fixed = bool((slope == slope[:1]).all() & (offset == offset[:1]).all())
            at = rows.of_sample(node.name, start)
            found.append(Side(slope, offset, at if fixed else place(side, at), fixed))
        return found[0], found[1]

    def _through(self, name: str, tape: Tape, v: Tensor, count: int, length: float) -> Tensor:
        """Climb at one activation, and return the values of the lines that the rows chose."""
        A, (low, up) = tape.coefficients[name], tape.lines[name]
        chosen = (A >= 0).to(v.dtype)
        value = torch.addcmul(torch.lerp(up[1], low[1], chosen), torch.lerp(up[0], low[0], chosen), v)
        negative = A.clamp(max=0)
        for side, part, line in zip(self.sides[name], (A - negative, negative), (low, up), strict=True):
            if not side.fixed:
                side.climb(part * torch.addcmul(line[3], line[2], v), count, length)
        return value

    def _worst(self, rows: Rows, A: Tensor) -> Tensor:
        """The input at which the row's linear bound is attained."""
        entry, domain = self.knowledge.entry, self.knowledge.domain
        if entry != INPUT or domain.is_box:
            hull, _ = self.knowledge.hull(entry)
            lower, upper = (rows.of_sample(entry, end.to(A.dtype)) for end in (hull.lower, hull.upper))
            return torch.lerp(upper, lower, (A > 0).to(A.dtype))
        sample = rows.sample if rows.groups is None else rows.groups.sample
        every = domain.take(sample.repeat_interleave(A.shape[1]))
        return every.steepest(-A.flatten(0, 1)).unflatten(0, A.shape[:2])


def _derivative(node: Node, A: Tensor, lines: Relaxation, v: Tensor) -> Tensor:
    """d/dA of <pull_back(A), v>, for rules that are no activations (max-pooling)."""
    with torch.enable_grad():
        A = A.detach().requires_grad_()
        (pulled,), constant = node.rule.pull_back(A, lines)
        total = (pulled * v).sum() if constant is None else (pulled * v).sum() + constant.sum()
        return torch.autograd.grad(total, A)[0]


def optimize(
    knowledge: Knowledge,
    start: Callable[[Int[Tensor, "rows"]], Rows],
    count: int,
    *,
    steps: int,
    length: float,
    goal: Float64[Tensor, "rows"] | None = None,
    deadline: float = math.inf,
) -> Float64[Tensor, "rows"]:
    """Return lower bounds of ``count`` rows: each the best of ``steps`` steps after its first bound.

    ``start(index)`` returns those rows at their first node. Rows stop above their ``goal``, all at the deadline.
    """
    active, climb = torch.arange(count, device=knowledge.graph.device), Climb(knowledge)
    best = torch.full((count,), -torch.inf, dtype=torch.float64, device=active.device)
    for step in range(steps + 1):
        found, tape = climb.pull(start(active))
        best[active] = torch.fmax(best[active], found)
        if step == steps or time.monotonic() > deadline:
            break
        climb.step(tape, step + 1, length)
        if goal is not None:
            rest = (best[active] <= goal[active]).nonzero()[:, 0]
            if len(rest) == 0:
                break
            if len(rest) < len(active):
                active = active[rest]
                climb.keep(rest, tape.rows, start(active))
    return best
