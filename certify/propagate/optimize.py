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
from functools import partial

import torch
from jaxtyping import Float64, Int
from torch import Tensor

from certify.enclosures import Relaxation
from certify.graph import Node
from certify.ops.base import Affine, Elementwise
from certify.propagate.backward import Rows
from certify.propagate.state import Knowledge
from certify.propagate.worst import met, on_lines, worst

MOMENTS = (0.5, 0.9)  # of Adam: short memories, since only a few steps are taken
DECAY = 0.9  # of the step length, per step


@dataclass
class Places:
    """Where the lines of rows stand in a fan: ``at`` [groups, rows, *shape] in [0, 1], with Adam's moments."""

    at: Tensor

    def __post_init__(self) -> None:
        self.first, self.second = torch.zeros_like(self.at), torch.zeros_like(self.at)

    def climb(self, gradient: Tensor, step: int, length: float) -> None:
        """Take one step of Adam upwards, projected to [0, 1]."""
        a, b = MOMENTS
        self.first.lerp_(gradient, 1 - a)
        self.second.mul_(b).addcmul_(gradient, gradient, value=1 - b)
        scale = (self.second / (1 - b**step)).sqrt_().add_(1e-12)
        self.at.addcdiv_(self.first, scale, value=length * DECAY ** (step - 1) / (1 - a**step)).clamp_(0, 1)

    def moved(self, move: Callable[[Tensor], Tensor]) -> Places:
        """Return the places and moments of other rows."""
        other = Places(move(self.at))
        other.first, other.second = move(self.first), move(self.second)
        return other


@dataclass
class Choice:
    """The lines that rows chose at an activation by the signs of their coefficients ``A``, with derivatives."""

    A: Tensor
    lower: Tensor  # 1 where A takes a lower line, else 0
    slope: Tensor
    offset: Tensor
    slope_change: Tensor  # by the place
    offset_change: Tensor


class Slopes:
    """The fan of one activation, laid out for a block of rows, and the place of each row's lines in it.

    The lines are ``slope`` and ``offset`` [2 K, groups, 1, *shape]: K lower ones, then K upper ones.
    A side of equal lines, as above a ReLU, has no places.
    """

    def __init__(self, rows: Rows, node: Node) -> None:
        fan, lower, upper = rows.knowledge.fan(node)
        parts = (fan.lower_slope, fan.upper_slope), (fan.lower_offset, fan.upper_offset)
        self.slope, self.offset = (
            rows.of_sample(node.name, torch.cat(pair).transpose(0, 1)).movedim(2, 0).contiguous() for pair in parts
        )
        self.steps = len(fan.lower_slope) - 1
        sides = self.slope.chunk(2), self.offset.chunk(2)
        A = rows.pending[node.name]
        self.places = [
            None if bool((slope == slope[:1]).all() & (offset == offset[:1]).all())
            else Places(rows.of_sample(node.name, start).expand_as(A).clone())
            for slope, offset, start in zip(*sides, (lower, upper), strict=True)
        ]  # fmt: skip

    def choose(self, A: Tensor) -> Choice:
        """Return the lower lines for positive coefficients and the upper lines for negative ones."""
        positive = (A >= 0).to(A.dtype)
        if self.steps == 1:
            pairs = (self._between(side) for side in (1, 0))
            return Choice(A, positive, *(torch.lerp(up, low, positive) for up, low in zip(*pairs, strict=True)))
        lower, upper = (0.0 if places is None else places.at for places in self.places)
        place = (upper + positive * (lower - upper)) * self.steps
        k = place.floor().clamp_(max=self.steps - 1)
        weight, stride = place - k, self.slope[0].numel()
        k = k + (self.steps + 1) * (1 - positive)
        index = torch.arange(stride, device=A.device).view(self.slope.shape[1:]) + k.long() * stride
        s0, s1, o0, o1 = (values.take(i) for values in (self.slope, self.offset) for i in (index, index + stride))
        ds, do = s1 - s0, o1 - o0
        slope, offset = torch.addcmul(s0, weight, ds), torch.addcmul(o0, weight, do)
        return Choice(A, positive, slope, offset, ds * self.steps, do * self.steps)

    def _between(self, side: int) -> tuple[Tensor, ...]:
        """Slope and offset between the two lines of one side, and how they change."""
        places, (s0, s1), (o0, o1) = self.places[side], self.slope[2 * side :][:2], self.offset[2 * side :][:2]
        if places is None:
            return s0, o0, torch.zeros_like(s0), torch.zeros_like(o0)
        return torch.addcmul(s0, places.at, s1 - s0), torch.addcmul(o0, places.at, o1 - o0), s1 - s0, o1 - o0

    def climb(self, choice: Choice, v: Tensor, step: int, length: float) -> None:
        """Climb where the activation's input has the value ``v`` at the rows' worst points."""
        gradient = choice.A * torch.addcmul(choice.offset_change, choice.slope_change, v)
        lower, upper = self.places
        if lower is not None:
            lower.climb(gradient if upper is None else gradient * choice.lower, step, length)
        if upper is not None:
            upper.climb(gradient if lower is None else gradient * (1 - choice.lower), step, length)


@dataclass
class Tape:
    """What one pull back leaves for the push forward: the rows, their choices, and coefficients at other places."""

    rows: Rows
    choices: dict[str, Choice] = field(default_factory=dict)
    coefficients: dict[str, Tensor] = field(default_factory=dict)


class Climb:
    """The slopes of a block of rows: ``pull`` bounds the rows with them, ``step`` improves them."""

    def __init__(self, knowledge: Knowledge) -> None:
        self.knowledge = knowledge
        self.slopes: dict[str, Slopes] = {}
        self.kept: dict[str, list[Places | None]] = {}

    def pull(self, rows: Rows) -> tuple[Float64[Tensor, "rows"], Tape]:
        """Return the bounds of the rows with the present slopes, and what ``step`` needs."""
        tape, graph, entry = Tape(rows), self.knowledge.graph, self.knowledge.entry
        for name in reversed(graph.nodes):
            if name == entry or name not in rows.pending:
                continue
            node, A, lines = graph.nodes[name], rows.pending[name], None
            if isinstance(node.rule, Elementwise):
                chosen = tape.choices[name] = self._slopes(node, rows).choose(A)
                lines = Relaxation(chosen.slope, chosen.offset, chosen.slope, chosen.offset)
            elif not node.rule.affine:
                tape.coefficients[name] = A
            rows.step(node, lines)
        tape.coefficients[entry] = rows.pending[entry]
        rows.settle(entry)
        return rows.result().lower, tape

    def step(self, tape: Tape, count: int, length: float) -> None:
        """Push the worst input of every row forward and climb along the gradients that it meets."""
        entry, rows = self.knowledge.entry, tape.rows
        values = {entry: worst(rows, entry, tape.coefficients[entry])}  # the pulled-back parts of the nodes' values
        for node in reversed(rows.visited):
            inputs = [rows.unfit(node, *pair) for pair in zip(node.inputs, met(rows, node, values), strict=True)]
            if node.name in tape.choices:
                choice = tape.choices[node.name]
                self.slopes[node.name].climb(choice, inputs[0], count, length)
                values[node.name] = torch.addcmul(choice.offset, choice.slope, inputs[0])
            elif isinstance(node.rule, Affine):
                push = node.rule.push_window if node.name in rows.frames else node.rule.linear
                values[node.name] = push(*(v.flatten(0, 1) for v in inputs)).unflatten(0, inputs[0].shape[:2])
            else:
                values[node.name] = on_lines(node, tape.coefficients[node.name], rows.lines(node), inputs[0])

    def keep(self, rest: Int[Tensor, "rows"], old: Rows) -> None:
        """Go on with the rows ``rest`` of ``old``: the next ``pull`` lays their places out anew."""
        for name, slopes in self.slopes.items():
            flat = partial(_rows_of, old, name, rest)
            self.kept[name] = [p if p is None else p.moved(flat) for p in slopes.places]
        self.slopes = {}

    def _slopes(self, node: Node, rows: Rows) -> Slopes:
        name = node.name
        if name not in self.slopes:
            self.slopes[name] = Slopes(rows, node)
            if name in self.kept:
                kept = self.kept.pop(name)
                self.slopes[name].places = [p if p is None else p.moved(partial(rows.laid, name)) for p in kept]
        return self.slopes[name]


def _rows_of(old: Rows, name: str, rest: Tensor, part: Tensor) -> Tensor:
    return old.flat(name, part)[rest]


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
                climb.keep(rest, tape.rows)
    return best
