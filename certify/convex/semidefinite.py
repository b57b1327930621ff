"""``sdp``: the semidefinite relaxation of Raghunathan, Steinhardt and Liang, with multipliers that are re-evaluated.

With z the inputs and activations of a sample, shifted and scaled to |z_j| <= 1, what is known of them are quadratic
forms g(z) >= 0: 1 - z_j^2, the range of every pre-activation, the distances of an activation from its lines, and the
product of two distances (0 where the function is two lines, as for ReLU: u >= 0, u >= v, u (u - v) = 0). If Q is the
matrix over (1, z) of  row(z) - gamma - sum_i lambda_i g_i(z)  for lambda >= 0, and Q >= -eps I, then

    row >= gamma - eps (1 + sum_j z_j^2) >= gamma - eps (1 + count of z).

The solver (interior.py) only proposes lambda and gamma; eps is bounded by a Cholesky factorisation, rounding counted.
Reference: Raghunathan, Steinhardt, Liang (2018), arXiv 1811.01057, section 4.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from certify.activations.piecewise import PiecewiseLinear
from certify.convex.expansion import Expansion, expand
from certify.convex.interior import propose
from certify.convex.intervals import learned
from certify.enclosures import Interval
from certify.errors import UnsupportedOperation
from certify.graph import INPUT, Graph
from certify.lipschitz.hermitian import top
from certify.ops.base import Elementwise
from certify.propagate.drift import output_drift
from certify.propagate.methods import BoundMethod, finite
from certify.propagate.state import Knowledge
from certify.registry import register_method
from certify.rounding import Arithmetic, gamma
from certify.sets import PerturbationSet
from certify.specs import Spec

HIDDEN = 500  # neurons at most,
ORDER = 500  # and so many variables that are not fixed: a row takes minutes there


@register_method("sdp")
@dataclass(frozen=True)
class SemidefiniteProgram:
    """The semidefinite bound, one program per sample and row, for at most 500 hidden neurons.

    Sets other than boxes count as their bounding boxes. ``intervals`` make the ranges and the lines.
    """

    name: ClassVar[str] = "sdp"
    intervals: str | BoundMethod = "crown"

    def bound(self, graph: Graph, domain: PerturbationSet, spec: Spec, arithmetic: Arithmetic) -> Tensor:
        """Return lower bounds of the rows C y + d. Raises ``UnsupportedOperation`` for larger networks, max-pools."""
        nodes = [node for node in graph.nodes.values() if not node.rule.affine]
        for node in nodes:
            if not isinstance(node.rule, Elementwise):
                raise UnsupportedOperation(
                    f"{node.kind} at {node.name!r} in a semidefinite program",
                    "affine nodes and activations",
                    "crown or lp",
                )
        count = sum(math.prod(node.shape) for node in nodes)
        if count > HIDDEN:
            raise UnsupportedOperation(f"{count} hidden neurons", f"at most {HIDDEN}", "crown, alpha-crown or lp")
        knowledge = learned(self.intervals, graph, domain, arithmetic)
        maps = expand(graph)
        forms = {node.name: maps[node.inputs[0]] for node in nodes}
        claim = spec.to(torch.float64, graph.device)
        found = []
        for sample in range(domain.batch):
            facts = _Facts(knowledge, forms, sample)
            y, blur = facts.affine(maps[graph.output])
            found.append(
                [_solved(facts, c, y, blur, float(d)) for c, d in zip(claim.C[sample], claim.d[sample], strict=True)]
            )
        drift = torch.einsum("bro,bo->br", claim.C.abs(), output_drift(knowledge)) * (1 + 2.0**-40)
        return finite(torch.tensor(found, dtype=torch.float64) - drift)


@dataclass(eq=False)
class _Facts:
    """Affine functions of z = (1, z_1, ..): rows [n, order], each entry within a blur; and the forms g as products.

    ``forms`` are pairs (p, q) of such functions with p q >= 0 (= 0 for the ``equal`` ones); ranges come first.
    """

    knowledge: Knowledge
    given: dict[str, Expansion]
    sample: int
    values: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    order: int = 1
    products: list[tuple[Tensor, Tensor, Tensor, Tensor, Tensor]] = field(default_factory=list)

    def __post_init__(self) -> None:
        graph = self.knowledge.graph
        hull = self.knowledge.domain.hull
        self._free(INPUT, Interval(hull.lower[self.sample], hull.upper[self.sample]).double(), None)
        for name, form in self.given.items():
            node = graph.nodes[name]
            z = self.knowledge.intervals[node.inputs[0]]
            self._activation(name, node.rule, form, Interval(z.lower[self.sample], z.upper[self.sample]))  # type: ignore[arg-type]
        if self.order > ORDER:
            raise UnsupportedOperation(
                f"{self.order} inputs and undecided neurons", f"at most {ORDER}", "crown, alpha-crown or lp"
            )
        self.values = {name: (self._wide(p), self._wide(e)) for name, (p, e) in self.values.items()}
        self.products = [
            (self._wide(p), self._wide(e), self._wide(q), self._wide(f), same) for p, e, q, f, same in self.products
        ]

    def _wide(self, rows: Tensor) -> Tensor:
        return torch.nn.functional.pad(rows, (0, self.order - rows.shape[1]))

    def _free(self, name: str, box: Interval, fixed: tuple[Tensor, Tensor, Tensor] | None) -> None:
        """New variables for a node's values; where ``fixed`` (mask, rows, blur) says so, known functions instead."""
        low, high = box.lower.flatten(), box.upper.flatten()
        middle, half = (low + high) / 2, (high - low) / 2 * (1 + 2.0**-50)
        known = half == 0 if fixed is None else fixed[0]
        index = torch.where(known, 0, self.order + (~known).cumsum(0) - 1)
        self.order += int((~known).sum())
        rows = torch.zeros(len(low), self.order, dtype=torch.float64)
        rows[:, 0] = middle
        rows[torch.arange(len(low)), index] += torch.where(known, 0, half)
        blur = torch.zeros_like(rows)
        blur[:, 0] = (middle.abs() + half) * 2.0**-50
        if fixed is not None:
            for target, source in ((rows, fixed[1]), (blur, fixed[2])):
                target[known] = torch.nn.functional.pad(source, (0, self.order - source.shape[1]))[known]
        self.values[name] = rows, blur

    def affine(self, form: Expansion) -> tuple[Tensor, Tensor]:
        """An affine form in terms of z, and its blur."""
        constant = form.constant.flatten()
        rows = torch.zeros(len(constant), self.order, dtype=torch.float64)
        blur = torch.zeros_like(rows)
        rows[:, 0], blur[:, 0] = constant, form.error.flatten()
        for source, part in form.parts.items():
            weight, error = (entries.flatten(1).T for entries in part)
            p, e = (torch.nn.functional.pad(part, (0, self.order - part.shape[1])) for part in self.values[source])
            rows = rows + weight @ p
            noise = gamma(weight.shape[1] + 16, torch.float64)
            blur = blur + (weight.abs() @ (p.abs() * noise + e) + error @ (p.abs() + e)) * (1 + 2.0**-40)
        return rows, blur + rows.abs() * 2.0**-48

    def _activation(self, name: str, rule: Elementwise, form: Expansion, z: Interval) -> None:
        v, e = self.affine(form)
        facts, one = rule.facts, Interval(z.lower[None], z.upper[None])
        undecided = facts.undecided(one).flatten()
        r = facts.relax(one)
        slope, offset = (part.double().flatten() for part in (r.lower_slope, r.lower_offset))
        exact = ~undecided & (slope == r.upper_slope.double().flatten())
        gap = (r.upper_offset.double().flatten() - offset).clamp(min=0)
        line, noise = slope[:, None] * v, slope.abs()[:, None] * e
        line[:, 0] += offset + gap / 2
        noise[:, 0] += gap
        y = facts.range(one)
        self._free(name, Interval(y.lower[0], y.upper[0]).double(), (exact, line, noise + line.abs() * 2.0**-48))
        u, f = self.values[name]
        v, e = (torch.nn.functional.pad(part, (0, self.order - part.shape[1])) for part in (v, e))
        low, high = z.double().lower.flatten(), z.double().upper.flatten()
        one_row = torch.zeros_like(v)
        one_row[:, 0] = 1
        zero = torch.zeros_like(v)

        def keep(p: Tensor, e: Tensor, q: Tensor, f: Tensor, *, same: bool = False) -> None:
            live = ~exact
            if bool(live.any()):
                self.products.append((p[live], e[live], q[live], f[live], torch.full_like(live, same)[live]))

        def line_of(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
            rows = a[:, None] * v
            rows[:, 0] += b
            return rows, a.abs()[:, None] * e + rows.abs() * 2.0**-48

        inside, outside = v - low[:, None] * one_row, high[:, None] * one_row - v
        keep(inside, e + inside.abs() * 2.0**-50, outside, e + outside.abs() * 2.0**-50)
        pairs = [r] if (other := facts.second_lines(one)) is None else [r, other]
        for pair in pairs:
            below, c = line_of(pair.lower_slope.double().flatten(), pair.lower_offset.double().flatten())
            above, d = line_of(pair.upper_slope.double().flatten(), pair.upper_offset.double().flatten())
            keep(u - below, f + c, one_row, zero)
            keep(above - u, f + d, one_row, zero)
            keep(u - below, f + c, above - u, f + d)
        if isinstance(facts, PiecewiseLinear) and facts.kinks == (0.0,) and facts.value == 0:
            left, right = (
                torch.as_tensor(s, dtype=torch.float64).expand(1, *z.lower.shape).flatten() for s in facts.slopes
            )
            sign = torch.where(right >= left, 1.0, -1.0)[:, None].double()
            (a, c), (b, d) = line_of(left, 0 * left), line_of(right, 0 * right)
            keep(sign * (u - a), f + c, one_row, zero)
            keep(sign * (u - b), f + d, one_row, zero)
            keep(u - a, f + c, u - b, f + d, same=True)


def _solved(facts: _Facts, c: Tensor, y: Tensor, blur: Tensor, offset: float) -> float:
    """The bound of one row: the solver proposes, ``_certified`` decides."""
    row = c @ y
    row[0] += offset
    noise = c.abs() @ (blur + y.abs() * gamma(len(c) + 8, torch.float64))
    noise[0] += abs(offset) * 2.0**-50
    n = facts.order
    if facts.products:
        p, e, q, f, equal = (torch.cat(part) for part in zip(*facts.products, strict=True))
    else:
        p = e = q = f = torch.zeros(0, n, dtype=torch.float64)
        equal = torch.zeros(0, dtype=torch.bool)
    if not all(bool(torch.isfinite(part).all()) for part in (row, noise, p, e, q, f)):
        return -math.inf
    size = torch.linalg.vector_norm(p, dim=1) * torch.linalg.vector_norm(q, dim=1)  # forms of unit size
    unit = torch.where(size > 0, size, 1).log2().round().exp2()
    p, e = p / unit[:, None], e / unit[:, None]
    proposed = propose(row, p, q, equal)
    if proposed is None:
        return -math.inf
    ranges, multipliers, level = proposed
    return _certified(
        row, noise, (p, e, q, f), ranges.clamp(min=0), torch.where(equal, multipliers, multipliers.clamp(min=0)), level
    )


def _certified(
    row: Tensor, noise: Tensor, forms: tuple[Tensor, Tensor, Tensor, Tensor], ranges: Tensor, multipliers: Tensor,
    level: float,
) -> float:  # fmt: skip
    """gamma - eps (1 + count), the best over a few gamma; any multipliers with the right signs give a bound."""
    p, e, q, f = forms
    n = len(row)
    weighted = multipliers[:, None]
    half = (weighted * p).T @ q
    Q = -(half + half.T) / 2
    Q[0, :] += row / 2
    Q[:, 0] += row / 2
    Q.diagonal()[1:].add_(ranges)
    Q[0, 0] -= float(ranges.sum())
    sizes = multipliers.abs()[:, None]
    error = (sizes * e).T @ (q.abs() + f) + (sizes * p.abs()).T @ f
    error = error + (sizes * p.abs()).T @ q.abs() * gamma(len(p) + 16, torch.float64)
    rows = error.sum(1) + error.sum(0) + noise + (row.abs() + Q.abs().sum(1)) * 2.0**-48
    rows[0] += float(noise.sum()) + float(ranges.sum()) * gamma(n + 16, torch.float64)
    slack = float(rows.max()) * (1 + 2.0**-40)
    best = -math.inf
    shift = float(torch.linalg.matrix_norm(Q)) + abs(level)
    for k in (0.0, *(10.0**k for k in range(-9, 0))):
        value = level - k * max(1.0, abs(level))
        trial = shift * torch.eye(n, dtype=torch.float64) - Q
        trial[0, 0] += value
        above = float(top(trial[None, None])[0])
        lost = max(0.0, above - shift * (1 - 2.0**-50) + 4 * shift * 2.0**-50) + slack
        best = max(best, value - lost * n * (1 + 2.0**-40))
    return best
