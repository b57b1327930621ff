"""The product bound on a graph, with the slopes of activations inside the operator norms.

L(node, s) bounds the Lipschitz constant of x -> diag(s) node(x), s >= 0. The weights s travel down: through an
activation with slopes m they become s m, through movements and max-pools they gather at the inputs, and the next
dense layer takes them into its norm, ||diag(s) W|| instead of max(s) ||W||. At a sum the bounds of the parents add,
at a concatenation their squares do (for p = inf the larger one counts).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from jaxtyping import Float64
from torch import Tensor

from certify.errors import UnsupportedOperation
from certify.graph import INPUT, Graph, Node
from certify.lipschitz.estimate import Question
from certify.lipschitz.slopes import absolute_transpose, batch_of, learned, slope_ranges
from certify.lipschitz.spectral import operator_norm
from certify.ops.arithmetic import Scale, Sum
from certify.ops.base import Affine, Elementwise
from certify.ops.pool import MaxPool
from certify.ops.shape import Concat, Select
from certify.propagate.methods import BoundMethod
from certify.registry import register_estimator
from certify.results import LipschitzEstimate
from certify.rounding import gamma
from certify.sets import PerturbationSet
from certify.specs import Spec


@register_estimator("product")
@dataclass(frozen=True)
class ProductBound:
    """An upper bound of the Lipschitz constant: certified norms of the layers, multiplied along the graph.

    With a domain the slopes are those on the intervals that ``intervals`` (a bound method) proves for the inputs of
    the activations. ``layers`` of the answer are the constants of the single nodes.
    """

    intervals: str | BoundMethod = "crown"

    def estimate(self, question: Question) -> LipschitzEstimate:
        """Return the bound, side "upper"."""
        graph, p, spec = question.graph, question.p, question.spec
        with torch.no_grad():
            sets = _steepest(graph, question.domain, self.intervals)
            walks = [Walk(graph, slopes, p) for slopes in sets]
            rows = () if spec is None else _all_rows(walks, spec)
            value = max(walk.whole(graph.output) for walk in walks) if spec is None else max(map(max, rows))
            names = [name for name, node in graph.nodes.items() if len(node.inputs) == 1]
            layers = {name: max(walk.local(graph.nodes[name]) for walk in walks) for name in names}
        return LipschitzEstimate(value, "upper", "product", p, layers, rows)


def _steepest(
    graph: Graph, domain: PerturbationSet | None, method: str | BoundMethod
) -> list[dict[str, Float64[Tensor, "*shape"]]]:
    """max |f'| of every activation's neurons, per sample of the domain (one if there is none)."""
    ranges = slope_ranges(graph, learned(graph, domain, method))
    return [{name: slope.magnitude[i] for name, slope in ranges.items()} for i in range(batch_of(domain))]


def _all_rows(walks: list[Walk], spec: Spec) -> tuple[tuple[float, ...], ...]:
    """The constants of the rows of all samples; equal rows are bounded once."""
    found = []
    for sample in range(spec.batch):
        walk = walks[sample if len(walks) > 1 else 0]
        found.append(tuple(walk.row(row) for row in spec.C[sample]))
    return tuple(found)


@dataclass(eq=False)
class Walk:
    """One evaluation of the recursion, with its memory; every method returns an upper bound, rounding included.

    Constants are those of the maps from ``source``.
    """

    graph: Graph
    slopes: dict[str, Tensor]
    p: float
    source: str = INPUT
    _whole: dict[str, float] = field(default_factory=dict)
    _local: dict[str, float] = field(default_factory=dict)
    _rows: dict[tuple[float, ...], float] = field(default_factory=dict)

    def whole(self, name: str) -> float:
        """L(node, 1)."""
        if name not in self._whole:
            self._whole[name] = self._pass(name, self._ones(name)) * (1 + gamma(1024, torch.float64))
        return self._whole[name]

    def weighted(self, name: str, scale: Tensor) -> float:
        """L(node, scale); equal weights are one factor."""
        top = float(scale.max())
        if top == 0:
            return 0.0
        if bool((scale == top).all()):
            return top * self.whole(name)
        return self._pass(name, scale) * (1 + gamma(1024, torch.float64))

    def local(self, node: Node) -> float:
        """The Lipschitz constant of the node alone."""
        if node.name not in self._local:
            ones = self._ones(node.name)
            moved = self._moved(node, ones)
            alone = self._norm(node, ones) if moved is None else float(moved.max())
            self._local[node.name] = alone * (1 + gamma(1024, torch.float64))
        return self._local[node.name]

    def row(self, coefficients: Float64[Tensor, "outputs"]) -> float:
        """The constant of x -> <coefficients, output>: affine layers join the row, then the dual norm takes over."""
        key = tuple(coefficients.tolist())
        if key not in self._rows:
            A = coefficients.view(1, *self.graph.shape(self.graph.output))
            self._rows[key] = self._functional(self.graph.output, A, A.abs(), 0)
        return self._rows[key]

    def _pass(self, name: str, scale: Tensor) -> float:
        """One step of the recursion: weights move on, or a norm takes them."""
        if name == self.source:
            return float(scale.max())
        node = self.graph.nodes[name]
        rule = node.rule
        if isinstance(rule, Sum):
            return sum(self.weighted(parent, scale) for parent in node.inputs)
        if isinstance(rule, Concat):
            parts = zip(node.inputs, rule.transpose(scale[None]), strict=True)
            found = [self.weighted(parent, part[0]) for parent, part in parts]
            return math.hypot(*found) if self.p == 2 else max(found)
        moved = self._moved(node, scale)
        if moved is not None:
            return self.weighted(node.inputs[0], moved)
        if len(node.inputs) != 1:
            raise UnsupportedOperation(
                f"no product bound for {node.kind} of {len(node.inputs)} inputs at {name!r}",
                "+, - or concatenation",
                "rewrite it with those",
            )
        uniform = bool((scale == 1).all())
        return (self.local(node) if uniform else self._norm(node, scale)) * self.whole(node.inputs[0])

    def _moved(self, node: Node, scale: Tensor) -> Tensor | None:
        """The weights at the node's input if the node acts element by element, else None."""
        rule = node.rule
        if isinstance(rule, Elementwise):
            return torch.where(scale > 0, scale * self.slopes[node.name], 0)
        if isinstance(rule, Scale):
            return scale * rule.scale.abs()
        shape = self.graph.shape(node.inputs[0]) if len(node.inputs) == 1 else ()
        if isinstance(rule, Select):
            if rule.index is None:
                return scale.reshape(shape)
            return self._gathered(scale, rule.index[:, None], shape)
        if isinstance(rule, MaxPool):  # |max a - max b| <= max |a - b| over the window
            return self._gathered(scale, rule.windows.to(scale.device), shape)
        return None

    def _gathered(self, scale: Tensor, index: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Weights of elements that are read several times: root of the sum of squares, or the largest."""
        size = torch.Size(shape).numel()
        target = torch.where(index < 0, size, index).flatten()  # padding goes to a place of its own
        source = scale.flatten()[:, None].expand(-1, index.shape[1]).flatten()
        place = scale.new_zeros(size + 1)
        if self.p == 2:
            place = place.index_add(0, target, source.square()).sqrt()
        else:
            place = place.scatter_reduce(0, target, source, "amax")
        return place[:-1].view(shape)

    def _norm(self, node: Node, scale: Tensor) -> float:
        return operator_norm(node.rule, scale, self.graph.shape(node.inputs[0]), self.p)

    def _ones(self, name: str) -> Tensor:
        return torch.ones(self.graph.shape(name), dtype=torch.float64, device=self.graph.device)

    def _functional(self, name: str, A: Tensor, magnitude: Tensor, terms: int) -> float:
        """|<A, node(x) - node(x')>| <= this ||x - x'||; the true A is within gamma_terms magnitude of the given one."""
        if name != self.source and isinstance(rule := self.graph.nodes[name].rule, Affine):
            node = self.graph.nodes[name]
            shapes = [self.graph.shape(parent) for parent in node.inputs]
            pulled = rule.transpose(A)
            sizes = absolute_transpose(rule, magnitude, shapes)
            terms += torch.Size(node.shape).numel() + 8
            parts = zip(node.inputs, pulled, sizes, strict=True)
            return sum(self._functional(parent, a, size, terms) for parent, a, size in parts)
        if name in self.slopes:
            dead = self.slopes[name] == 0
            A, magnitude = A.masked_fill(dead, 0), magnitude.masked_fill(dead, 0)
        dual = 2 if self.p == 2 else 1
        length = float(torch.linalg.vector_norm(A, ord=dual)) * (1 + gamma(A.numel() + 8, torch.float64))
        error = gamma(terms, torch.float64) * float(torch.linalg.vector_norm(magnitude, ord=dual)) * 1.01
        return (length + error) * (1.0 if name == self.source else self.whole(name))
