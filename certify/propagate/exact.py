"""What a row's bound would gain if the relaxation of one node were exact: an upper bound, by descent.

A row's bound is its value at one point: the worst input, pushed forward through the lines that the row chose (as in
optimize.py). With one node exact, <A, f(z)> takes the place of what the node's lines give at z, and the bound is the
smallest value over all such points. Any one of them is an upper bound of it: a gain found here is never too small.
"""

from __future__ import annotations

import copy

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from certify.graph import Node
from certify.ops.base import Affine, inner
from certify.propagate.backward import Groups, Rows
from certify.propagate.worst import met, on_lines, whole, worst

STEPS = 3  # of the descent; more change a trained network's gains by less than 1 %
PLACES = tuple(i / 8 for i in range(9))  # where a step looks between two points


class Pulled:
    """Rows pulled back to the end of their way, with their ``bound``; kept as they were ``before`` each relaxation."""

    def __init__(self, rows: Rows) -> None:
        self.rows, self.entry = rows, rows.knowledge.entry
        self.before: dict[str, Rows] = {}
        for name, node in reversed(rows.knowledge.graph.nodes.items()):
            if name in rows.pending and name != self.entry:
                if not node.rule.affine:
                    self.before[name] = _copy(rows)
                rows.step(node)
        self.end = rows.pending[self.entry]
        rows.settle(self.entry)
        self.bound: Float64[Tensor, "groups rows"] = _groups(rows).gather(rows.offset)

    def push(self) -> dict[str, Tensor]:
        """Return the values [groups, rows, *shape] at each row's worst point (their pulled-back parts: state.py)."""
        values = {self.entry: worst(self.rows, self.entry, self.end)}
        for node in reversed(self.rows.visited):
            inputs = met(self.rows, node, values)
            if isinstance(node.rule, Affine):
                value = node.rule.linear(*(v.flatten(0, 1) for v in inputs)).unflatten(0, inputs[0].shape[:2])
            else:
                before = self.before[node.name]
                value = on_lines(node, before.pending[node.name], before.lines(node), inputs[0])
            values[node.name] = value
        return values


def gain(pulled: Pulled, node: Node, values: dict[str, Tensor]) -> Float64[Tensor, "rows"]:
    """How far above its bound each row is at the lowest point found for it with ``node`` exact.

    Descent by Frank and Wolfe: with f replaced by its tangents at z, pull the rows back again; their worst point is
    the aim of a step from z. ``rest`` is what a row holds at a point besides <A, f(z)>.
    """
    rows, source, bound = pulled.before[node.name], node.inputs[0], pulled.bound
    A = rows.pending[node.name]
    z, rest = whole(rows, source, values[source]), bound - inner(A, values[node.name])
    for _ in range(STEPS):
        value, slope = _tangent(node, A, z)
        tangent = _copy(rows)
        del tangent.pending[node.name]
        tangent.shift(node.name, value - inner(slope, z))
        tangent.settle_rider(source, slope)
        tangent.add(source, slope)
        other = Pulled(tangent)
        step = whole(rows, source, other.push()[source]) - z
        change = other.bound - value - inner(slope, step) - rest
        found = torch.stack([_exact(node, A, z + t * step) + rest + t * change for t in PLACES])
        place = torch.tensor(PLACES, dtype=torch.float64, device=z.device)[found.argmin(0)]
        z = z + step * place.to(z.dtype).view(*place.shape, *[1] * (z.ndim - 2))
        rest = rest + place * change
    return _groups(rows).scatter(_exact(node, A, z) + rest - bound)[:, 0].clamp(min=0)


def _exact(node: Node, A: Tensor, z: Float[Tensor, "groups rows *shape"]) -> Float64[Tensor, "groups rows"]:
    """<A, f(z)>."""
    return inner(A, node.rule.forward(z.flatten(0, 1)).unflatten(0, z.shape[:2]))


def _tangent(node: Node, A: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    """<A, f(z)> and its gradient by z."""
    with torch.enable_grad():
        z = z.detach().requires_grad_()
        value = _exact(node, A, z)
        return value.detach(), torch.autograd.grad(value.sum(), z)[0]


def _copy(rows: Rows) -> Rows:
    """The same rows, to be pulled back another way."""
    twin = copy.copy(rows)
    twin.pending, twin.visited = dict(rows.pending), []
    return twin


def _groups(rows: Rows) -> Groups:
    assert rows.groups is not None  # claim_rows stands the rows of a sample side by side
    return rows.groups
