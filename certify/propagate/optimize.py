"""alpha-CROWN: the slope of every activation's line, per row and neuron, is optimised for the row's own bound.

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
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor

from certify.enclosures import Relaxation
from certify.graph import INPUT, Node
from certify.ops.base import Affine, Elementwise
from certify.propagate.backward import Rows
from certify.propagate.state import Knowledge
from certify.rounding import unit_roundoff

MOMENTS = (0.9, 0.999)  # of Adam
DECAY = 0.98  # of the step length, per step


@dataclass
class Side:
    """One side of an activation's fan for rows of their own: ``place`` [rows, *shape] in [0, 1], with Adam's moments.

    ``slope`` and ``offset`` [K, batch, *shape] are those of the fan; None of a fan that is one line has a place.
    """

    slope: Tensor
    offset: Tensor
    place: Tensor
    first: Tensor = field(init=False)
    second: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.first, self.second = torch.zeros_like(self.place), torch.zeros_like(self.place)
        self.fixed = bool((self.slope == self.slope[:1]).all() & (self.offset == self.offset[:1]).all())

    def keep(self, rows: Tensor) -> None:
        """Drop all rows but those."""
        self.place, self.first, self.second = self.place[rows], self.first[rows], self.second[rows]

    def at(self, sample: Int[Tensor, "rows"]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return slope and offset of every row's line, and their derivatives by the place."""
        steps = len(self.slope) - 1
        if self.fixed:
            slope, offset = self.slope[0][sample], self.offset[0][sample]
            return slope, offset, torch.zeros_like(slope), torch.zeros_like(slope)
        if steps == 1:
            (s0, s1), (o0, o1), weight = self.slope[:, sample], self.offset[:, sample], self.place
        else:
            place = self.place * steps
            k = place.floor().clamp(max=steps - 1)
            weight, size, (_, batch) = place - k, self.slope[0, 0].numel(), self.slope.shape[:2]
            row = (k.long() * batch + sample.view(-1, *[1] * (k.ndim - 1))) * size
            index = row + torch.arange(size, device=k.device).view(k.shape[1:])
            (s0, s1), (o0, o1) = ((v.take(index), v.take(index + batch * size)) for v in (self.slope, self.offset))
        return torch.lerp(s0, s1, weight), torch.lerp(o0, o1, weight), (s1 - s0) * steps, (o1 - o0) * steps

    def climb(self, gradient: Tensor, step: int, length: float) -> None:
        """One step of Adam upwards, projected to [0, 1]."""
        if self.fixed:
            return
        a, b = MOMENTS
        self.first.lerp_(gradient, 1 - a)
        self.second.mul_(b).addcmul_(gradient, gradient, value=1 - b)
        scale = (self.second / (1 - b**step)).sqrt_().add_(1e-12)
        self.place.addcdiv_(self.first, scale, value=length * DECAY ** (step - 1) / (1 - a**step)).clamp_(0, 1)


@dataclass
class Tape:
    """What one pull back leaves: per activation the coefficients [rows, *shape] and both lines with derivatives."""

    entry: Tensor
    coefficients: dict[str, Tensor] = field(default_factory=dict)
    lines: dict[str, tuple[tuple[Tensor, ...], tuple[Tensor, ...]]] = field(default_factory=dict)
    others: dict[str, tuple[Tensor, Relaxation]] = field(default_factory=dict)


def optimize(
    knowledge: Knowledge,
    name: str,
    A: Float[Tensor, "rows 1 *shape"],
    sample: Int[Tensor, "rows"],
    *,
    steps: int,
    length: float,
    goal: Float64[Tensor, "rows"],
    deadline: float = math.inf,
) -> Float64[Tensor, "rows"]:
    """Return lower bounds of <A, y>, y the values of node ``name``; rows stop above their ``goal``, all at the deadline."""
    climb = _Climb(knowledge, sample)
    best = torch.full((len(A),), -torch.inf, dtype=torch.float64, device=A.device)
    active = torch.arange(len(A), device=A.device)
    for step in range(steps + 1):
        found, tape = climb.pull(name, A[active])
        best[active] = torch.fmax(best[active], found)
        rest = (best[active] <= goal[active]).nonzero()[:, 0]
        if step == steps or len(rest) == 0 or time.monotonic() > deadline:
            return best
        gradients = climb.push(tape)
        for side, gradient in gradients:
            side.climb(gradient, step + 1, length)
        if len(rest) < len(active):
            active = active[rest]
            climb.keep(rest)
    return best


class _Climb:
    """The slopes of a block of rows, one pull back and one push forward."""

    def __init__(self, knowledge: Knowledge, sample: Tensor) -> None:
        self.knowledge, self.sample = knowledge, sample
        self.sides: dict[str, tuple[Side, Side]] = {}

    def keep(self, rows: Tensor) -> None:
        self.sample = self.sample[rows]
        for pair in self.sides.values():
            for side in pair:
                side.keep(rows)

    def pull(self, name: str, A: Tensor) -> tuple[Tensor, dict]:
        k = self.knowledge
        rows = Rows(k, self.sample, both=False)
        rows.start(name, A)
        tape: dict = {}
        for node_name in reversed(k.graph.nodes):
            if node_name == k.entry or node_name not in rows.pending:
                continue
            node = k.graph.nodes[node_name]
            lines = None
            if isinstance(node.rule, Elementwise):
                low, up = (side.at(self.sample) for side in self._sides(node))
                lines = Relaxation(*(part[:, None] for part in (low[0], low[1], up[0], up[1])))
                tape[node_name] = rows.pending[node_name][:, 0], low, up
            elif not node.rule.affine:
                lines = rows._lines(node)
                tape[node_name] = rows.pending[node_name], lines
            rows.step(node, lines)
        tape[k.entry] = rows.pending[k.entry][:, 0]
        rows.settle(k.entry)
        return rows.result().lower, tape

    def push(self, tape: dict) -> list[tuple[Side, Tensor]]:
        k, values = self.knowledge, {}
        values[k.entry] = self._worst(tape[k.entry])
        gradients = []
        for node in k.graph.nodes.values():
            if not all(source in values for source in node.inputs):
                continue
            inputs = [values[source] for source in node.inputs]
            if isinstance(node.rule, Elementwise):
                if node.name not in tape: continue
                A, low, up = tape[node.name]
                v = inputs[0]
                negative = A.clamp(max=0)
                positive = A - negative
                low_side, up_side = self.sides[node.name]
                if not low_side.fixed:
                    gradients.append((low_side, positive * torch.addcmul(low[3], low[2], v)))
                if not up_side.fixed:
                    gradients.append((up_side, negative * torch.addcmul(up[3], up[2], v)))
                mask = (A >= 0).to(v.dtype)
                values[node.name] = torch.addcmul(torch.lerp(up[1], low[1], mask), torch.lerp(up[0], low[0], mask), v)
            elif node.rule.affine:
                rule = node.rule
                if not rule.carries:
                    inputs = [self._full(source) + v if self._full(source) is not None else v for source, v in zip(node.inputs, inputs)]
                values[node.name] = rule.linear(*inputs)
            else:
                if node.name not in tape: continue
                A, lines = tape[node.name]
                c = self._full(node.inputs[0])
                v = inputs[0] if c is None else inputs[0] + c
                with torch.enable_grad():
                    A = A.detach().requires_grad_()
                    (pulled,), constant = node.rule.pull_back(A, lines)
                    total = (pulled[:, 0] * v).sum() + constant.sum()
                    values[node.name] = torch.autograd.grad(total, A)[0][:, 0]
        return gradients

    def _full(self, source):
        c = self.knowledge.rider(source).constant
        return None if c is None else (c if len(c) == 1 else c[self.sample]).to(self.knowledge.graph.dtype)

    def _worst(self, A):
        k = self.knowledge
        if k.entry != INPUT or k.domain.is_box:
            hull, _ = k.hull(k.entry)
            lower, upper = (e[self.sample].to(A.dtype) for e in (hull.lower, hull.upper))
            return torch.lerp(upper, lower, (A > 0).to(A.dtype))
        return k.domain.take(self.sample).steepest(-A)

    def _sides(self, node: Node) -> tuple[Side, Side]:
        if node.name not in self.sides:
            k = self.knowledge
            fan = node.rule.facts.fan(*k.inputs(node))
            r = k.absorb(node, Relaxation(fan.lower_slope, fan.lower_offset, fan.upper_slope, fan.upper_offset))
            self.sides[node.name] = (
                Side(r.lower_slope, r.lower_offset, fan.lower_start[self.sample].clone()),
                Side(r.upper_slope, r.upper_offset, fan.upper_start[self.sample].clone()))
        return self.sides[node.name]
