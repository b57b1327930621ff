"""Upper bounds from bounds of all slope matrices of the network over the domain.

For x, y in the domain, row(x) - row(y) = <J, x - y>, J the product of the affine maps with a diagonal of slopes per
activation, each in its slope range, and a convex choice per max-pool window: J is bounded, not the points where it is
a derivative. Its coefficients over the nodes come backward from the rows, as gradients do.

"interval-jacobian" multiplies intervals. "crown-jacobian" then takes the backward pass for the network: a convex
function of J (sum |J_i|, or sum J_i^2) is below its chords over those intervals, a linear function of J; pushed forward
through the network, it meets products t g of a slope t in [m, M] and a coefficient g in [l, u], whose extremes over t
are convex or concave in g and so between two chords. What is left at the output is a number.
Reference: Shi, Wang, Zhang, Kolter, Hsieh, "Efficiently computing local Lipschitz constants of neural networks via
bound propagation" (2022), arXiv 2210.07394.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float64, Int
from torch import Tensor

from certify.enclosures import Interval
from certify.errors import UnsupportedOperation
from certify.graph import INPUT, Graph, Node
from certify.lipschitz.estimate import Question
from certify.lipschitz.slopes import absolute_transpose, contenders, learned, slope_ranges
from certify.lipschitz.spectral import singular_bound
from certify.memory import block_bytes
from certify.ops.base import Affine, Elementwise
from certify.ops.pool import MaxPool
from certify.propagate.methods import BoundMethod
from certify.registry import register_estimator
from certify.results import LipschitzEstimate
from certify.rounding import gamma, step_down, step_up, tiny

U = torch.finfo(torch.float64).eps  # twice the unit roundoff: two roundings


@register_estimator("interval-jacobian")
@dataclass(frozen=True)
class IntervalJacobian:
    """L <= the norm of the largest |J| that products of intervals allow; exact where all slopes are known.

    ``intervals`` (a bound method) makes the slope ranges; without a domain they are those on the whole line.
    """

    intervals: str | BoundMethod = "crown"

    def estimate(self, question: Question) -> LipschitzEstimate:
        """Return the bound, side "upper"."""
        return _estimate(question, self.intervals, "interval-jacobian", relax=False)


@register_estimator("crown-jacobian")
@dataclass(frozen=True)
class CrownJacobian:
    """L <= the norm of J by linear relaxation of the backward pass, or by intervals where that is less, row by row."""

    intervals: str | BoundMethod = "crown"

    def estimate(self, question: Question) -> LipschitzEstimate:
        """Return the bound, side "upper"."""
        return _estimate(question, self.intervals, "crown-jacobian", relax=True)


def _estimate(question: Question, method: str | BoundMethod, name: str, *, relax: bool) -> LipschitzEstimate:
    graph, p, spec = question.graph, question.p, question.spec
    with torch.no_grad():
        knowledge = learned(graph, question.domain, method)
        slopes, choices = slope_ranges(graph, knowledge), contenders(graph, knowledge)
        batch = 1 if question.domain is None else question.domain.batch
        size = math.prod(graph.shape(graph.output))
        eye = torch.eye(size, dtype=torch.float64, device=graph.device)
        C = eye.expand(batch, -1, -1) if spec is None else spec.C
        sample = torch.arange(len(C), device=graph.device).repeat_interleave(C.shape[1])
        norms, jacobians = [], []
        for block in _blocks(graph, len(sample)):
            A = C.flatten(0, 1)[block].view(-1, *graph.shape(graph.output))
            rows = _Backward(graph, slopes, choices, A, sample[block] if batch > 1 else 0 * sample[block])
            norms.append(rows.norms(p, relax=relax))
            if spec is None and p == 2:
                jacobians.append(rows.coefficients[INPUT])
        found = torch.cat(norms).view(C.shape[:2])
        if spec is not None:
            return LipschitzEstimate(float(found.max()), "upper", name, p, {}, tuple(map(tuple, found.tolist())))
        if p != 2:
            return LipschitzEstimate(float(found.max()), "upper", name, p)
        ends = (torch.cat([getattr(J, end) for J in jacobians]).flatten(1) for end in ("lower", "upper"))
        J = Interval(*(end.view(*C.shape[:2], -1) for end in ends))
        value = max(min(_spectral(J[i]), _length(found[i])) for i in range(batch))
        return LipschitzEstimate(value, "upper", name, p)


def _blocks(graph: Graph, rows: int) -> Iterator[slice]:
    """As many rows at a time as memory allows: intervals over all nodes are kept, and a few tensors to work with."""
    numbers = 4 * sum(math.prod(graph.shape(name)) for name in (INPUT, *graph.nodes))
    most = max(1, block_bytes(graph.device) // (numbers * 8))
    return (slice(start, start + most) for start in range(0, rows, most))


def _spectral(J: Interval) -> float:
    """A bound of ||J||_2 for all J between two matrices: that of the largest |J|, or of middle and radius."""
    if not bool(torch.isfinite(J.magnitude).all()):
        return math.inf
    middle = (J.lower + J.upper) / 2
    radius = step_up(torch.maximum(J.upper - middle, middle - J.lower))
    both = singular_bound(middle[None]) + singular_bound(radius[None])
    return min(singular_bound(J.magnitude[None]), math.nextafter(both, math.inf))


def _length(rows: Float64[Tensor, "rows"]) -> float:
    """A bound of the root of the sum of squares."""
    return float(torch.linalg.vector_norm(rows)) * (1 + gamma(len(rows) + 8, torch.float64))


class _Backward:
    """Rows <A, y> on their way to the input; ``coefficients`` are intervals [rows, *shape] over every node."""

    def __init__(
        self,
        graph: Graph,
        slopes: dict[str, Interval],
        choices: dict[str, Tensor],
        A: Float64[Tensor, "rows *shape"],
        sample: Int[Tensor, "rows"],
    ) -> None:
        self.graph, self.sample = graph, sample
        self.slopes, self.choices = slopes, choices
        self.coefficients = {graph.output: Interval(A, A)}
        for name, node in reversed(graph.nodes.items()):
            for parent, part in zip(node.inputs, self._pull(node, self.coefficients[name]), strict=True):
                other = self.coefficients.get(parent)
                self.coefficients[parent] = part if other is None else _plus(part, other)

    def norms(self, p: float, *, relax: bool) -> Float64[Tensor, "rows"]:
        """Bounds of the dual norm of every row."""
        J = self.coefficients[INPUT]
        size = J.magnitude.flatten(1)
        found = torch.linalg.vector_norm(size, ord=2 if p == 2 else 1, dim=1)
        found = found * (1 + gamma(size.shape[1] + 8, torch.float64)) + tiny(torch.float64)
        if not relax:
            return found
        power = (lambda x: x.square()) if p == 2 else torch.abs
        slope, offset = _chord(J, power(J.lower), power(J.upper))
        total = self._largest(slope) + offset.flatten(1).sum(1)
        total = _unbounded(total + offset.abs().flatten(1).sum(1) * self._sums(offset)).clamp(min=0)
        return torch.minimum(found, step_up(total.sqrt(), 2) if p == 2 else total)

    def _pull(self, node: Node, g: Interval) -> tuple[Interval, ...]:
        """Coefficients over the inputs of a node, from those over its output."""
        rule, shapes = node.rule, [self.graph.shape(parent) for parent in node.inputs]
        if isinstance(rule, Elementwise):
            return (_times(g, self.slopes[node.name][self.sample]),)
        if isinstance(rule, MaxPool):
            return (self._scatter(node, rule, g),)
        if not isinstance(rule, Affine):
            raise UnsupportedOperation(
                f"no bounds of slopes for {node.kind} at {node.name!r}",
                "affine operations, activations and max-pooling",
                'method="product", or rewrite it with those',
            )
        known = torch.isfinite(g.lower) & torch.isfinite(g.upper)
        middle = torch.where(known, g.lower / 2 + g.upper / 2, 0)
        radius = torch.where(known, step_up(torch.maximum(g.upper - middle, middle - g.lower)), torch.inf)
        n = gamma(math.prod(node.shape) + 16, torch.float64)  # the sums of both, and what the weights have rounded
        radius = (radius + middle.abs() * n) * (1 + 2 * n) + tiny(torch.float64)
        parts = zip(rule.transpose(middle), absolute_transpose(rule, radius, shapes), strict=True)
        return tuple(Interval(step_down(c - r), step_up(c + r)).sanitized() for c, r in parts)

    def _scatter(self, node: Node, rule: MaxPool, g: Interval) -> Interval:
        """Every contender of a window may have all of its coefficient or nothing; the only one has it."""
        alive = self.choices[node.name][self.sample]
        sure = alive.sum(2, keepdim=True) == 1
        shape, ends = self.graph.shape(node.inputs[0]), []
        index = rule.windows.to(alive.device).flatten()
        size = math.prod(shape)
        for end, sign in ((g.lower, -1.0), (g.upper, 1.0)):
            part = end.flatten(1)[:, :, None]
            part = torch.where(alive, torch.where(sure, part, (part * sign).clamp(min=0) * sign), 0).flatten(1)
            whole = part.new_zeros(len(part), size + 1)
            place = index.remainder(size + 1)  # padding goes to a place of its own
            total, mass = (whole.index_add(1, place, x)[:, :-1].view(-1, *shape) for x in (part, part.abs()))
            ends.append(total + sign * gamma(rule.windows.numel() + 8, torch.float64) * mass)
        return Interval(step_down(ends[0]), step_up(ends[1])).sanitized()

    def _largest(self, slope: Float64[Tensor, "rows *shape"]) -> Float64[Tensor, "rows"]:
        """A bound of <slope, J>: weights pushed forward, chords in place of products with slopes.

        What a weight rounds costs as much as the coefficient that it meets may be.
        """
        weights, nodes = {INPUT: slope}, self.graph.nodes
        total = lost = slope.new_zeros(len(slope))
        for name, node in nodes.items():
            g, v = self.coefficients[name], [weights[parent] for parent in node.inputs]
            if isinstance(node.rule, Affine):
                weight = node.rule.linear(*v)
                n = gamma(sum(x[0].numel() for x in v) + 16, torch.float64)
                error = node.rule.absolute(*(x.abs() for x in v)) * (n * (1 + 2 * n)) + tiny(torch.float64)
                lost = lost + _unbounded(g.magnitude * error).flatten(1).sum(1)
            else:
                low, high = self._factors(node, v[0])
                weight, offset = _upper_line(low.view_as(g.lower), high.view_as(g.lower), g)
                total = total + offset.flatten(1).sum(1)
                lost = lost + offset.abs().flatten(1).sum(1) * self._sums(offset)
            # A weight that exploded must not be lost in a product with 0.
            total = torch.where(torch.isfinite(weight).flatten(1).all(1), total, torch.inf)
            weights[name] = weight
        end = self.coefficients[self.graph.output].lower * weights[self.graph.output]
        lost = lost + end.abs().flatten(1).sum(1) * self._sums(end)
        return _unbounded(total + end.flatten(1).sum(1) + lost * (1 + 1e-6))

    def _sums(self, parts: Tensor) -> float:
        """What summing the elements of a row, and then the sums of all nodes, rounds per unit of them."""
        return gamma(parts[0].numel() + 2 * len(self.graph.nodes) + 16, torch.float64)

    def _factors(self, node: Node, v: Tensor) -> tuple[Tensor, Tensor]:
        """What a unit of the coefficient over ``node`` is worth behind it, under the weights v: from least to most."""
        if isinstance(node.rule, Elementwise):
            worth = _times(Interval(v, v), self.slopes[node.name][self.sample])
            return worth.lower, worth.upper
        assert isinstance(node.rule, MaxPool)
        alive, windows = self.choices[node.name][self.sample], node.rule.windows.to(v.device)
        values = v.flatten(1)[:, windows]
        return (
            values.masked_fill(~alive, torch.inf).amin(2),
            values.masked_fill(~alive, -torch.inf).amax(2),
        )


def _unbounded(x: Tensor) -> Tensor:
    """NaN knows nothing: as an upper bound it is infinite."""
    return torch.where(x.isnan(), torch.inf, x)


def _plus(a: Interval, b: Interval) -> Interval:
    return Interval(step_down(a.lower + b.lower), step_up(a.upper + b.upper)).sanitized()


def _times(a: Interval, b: Interval) -> Interval:
    """All products; 0 times an end that is only unbounded is 0."""
    ends = torch.stack([x * y for x in (a.lower, a.upper) for y in (b.lower, b.upper)])
    ends = torch.where(ends.isnan(), 0, ends)
    return Interval(step_down(ends.amin(0)), step_up(ends.amax(0)))


def _chord(z: Interval, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """The line above a convex function with these values at the ends of z: slope, and an offset sound for it."""
    run = z.upper - z.lower
    slope = ((right - left) / torch.where(run > 0, run, 1)).nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
    offset = torch.maximum(left - slope * z.lower, right - slope * z.upper)
    size = torch.maximum(left.abs() + (slope * z.lower).abs(), right.abs() + (slope * z.upper).abs())
    return slope, _unbounded(offset + 2 * U * size + tiny(torch.float64))


def _upper_line(low: Tensor, high: Tensor, g: Interval) -> tuple[Tensor, Tensor]:
    """The line above max(low g, high g) over g in [l, u]; where g has one sign, that is one of the two."""
    left, right = (torch.maximum(low * end, high * end) for end in (g.lower, g.upper))
    left, right = left + U * left.abs(), right + U * right.abs()
    slope, offset = _chord(g, left, right)
    single = torch.where(g.lower >= 0, high, low)
    settled = (g.lower >= 0) | (g.upper <= 0)
    return torch.where(settled, single, slope), torch.where(settled, 0, offset)
