"""``lp``: the best bound that any lines of single activations allow, by linear programming.

Every activation may be anywhere between its lines (for ReLU the triangle) on its interval. The solver's objective is
never reported: for multipliers lambda >= 0 of the inequalities and nu of the equations, weak duality gives

    c z >= sum over variables of min over its range of (c + A^T lambda + E^T nu) z  -  lambda b - nu e,

which is evaluated in float64 with all rounding subtracted. Reference: Salman et al. (2019), arXiv 1902.08722; Wong and
Kolter (2018), arXiv 1711.00851, equation 4.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Float64
from torch import Tensor

from certify.convex.real import AffineForm, affine_form, in_float64, output_drift
from certify.convex.wong_kolter import learned_by
from certify.enclosures import Interval, Relaxation
from certify.errors import UnsupportedOperation
from certify.graph import INPUT, Graph
from certify.ops.base import Elementwise
from certify.propagate.methods import BoundMethod, finite
from certify.propagate.state import Knowledge
from certify.registry import register_method
from certify.rounding import Arithmetic, gamma
from certify.sets import PerturbationSet
from certify.specs import Spec

NEURONS = 2000  # at most, input not counted


@register_method("lp")
@dataclass(frozen=True)
class LinearProgram:
    """The linear programming bound over all lines that the engine has of an activation, solved by HiGHS.

    With the same ``intervals`` it is not below CROWN, up to the solver's tolerance. One program per sample and row.
    """

    name: ClassVar[str] = "lp"
    intervals: str | BoundMethod = "crown"

    def bound(self, graph: Graph, domain: PerturbationSet, spec: Spec, arithmetic: Arithmetic) -> Tensor:
        """Return lower bounds of the rows C y + d. Raises ``UnsupportedOperation`` for large networks, max-pools."""
        nodes = [node for node in graph.nodes.values() if isinstance(node.rule, Elementwise)]
        count = sum(math.prod(node.shape) for node in nodes)
        if count > NEURONS:
            raise UnsupportedOperation(
                f"{count} hidden neurons", f"at most {NEURONS}", "method='crown' or 'alpha-crown'"
            )
        knowledge = learned_by(self.intervals, graph, domain, arithmetic)
        real = in_float64(graph)
        forms = {node.name: affine_form(real, node.inputs[0]) for node in nodes}
        output = affine_form(real, graph.output)
        claim = spec.to(torch.float64, graph.device)
        found = torch.stack(
            [
                _Program(knowledge, forms, output, sample).rows(claim.C[sample], claim.d[sample])
                for sample in range(domain.batch)
            ]
        )
        drift = torch.einsum("bro,bo->br", claim.C.abs(), output_drift(knowledge)) * (1 + 2.0**-40)
        return finite(found - drift)


class _Program:
    """Variables of one sample: the input, then v and u of every activation; A z <= b and E z = e."""

    def __init__(self, knowledge: Knowledge, forms: dict[str, AffineForm], output: AffineForm, sample: int) -> None:
        self.domain, self.output = knowledge.domain.take(torch.tensor([sample])), output
        graph = knowledge.graph
        hull = self.domain.hull
        self.place: dict[str, slice] = {}
        self.low: list[np.ndarray] = []
        self.high: list[np.ndarray] = []
        self._variables(INPUT, hull.lower[0], hull.upper[0])
        self.entries: dict[str, list[tuple[np.ndarray, np.ndarray, np.ndarray]]] = {"A": [], "E": [], "error": []}
        self.b: list[np.ndarray] = []
        self.e: list[np.ndarray] = []
        self.slack: list[np.ndarray] = []
        for name, form in forms.items():
            node = graph.nodes[name]
            z, y = (knowledge.intervals[at][sample] for at in (node.inputs[0], name))
            self._variables(f"{name} in", z.lower, z.upper)
            self._variables(name, y.lower, y.upper)
            self._equations(f"{name} in", form)
            assert isinstance(node.rule, Elementwise)
            one = Interval(z.lower[None], z.upper[None])
            facts = node.rule.facts
            fan = facts.fan(one)
            self._lines(name, Relaxation(fan.lower_slope, fan.lower_offset, fan.upper_slope, fan.upper_offset))
            for lines in (facts.relax(one), facts.second_lines(one)):
                if lines is not None:
                    self._lines(name, lines)
        self._assemble()

    def _variables(self, name: str, lower: Tensor, upper: Tensor) -> None:
        start = sum(map(len, self.low))
        self.place[name] = slice(start, start + lower.numel())
        self.low.append(lower.double().flatten().numpy())
        self.high.append(upper.double().flatten().numpy())

    def _equations(self, name: str, form: AffineForm) -> None:
        """v - sum W u = b."""
        first = sum(map(len, self.e))
        own = np.arange(self.place[name].start, self.place[name].stop)
        rows = first + np.arange(len(own))
        self.entries["E"].append((rows, own, np.ones(len(own))))
        for source, weight in form.weights.items():
            for kind, values in (("E", -weight.numpy()), ("error", form.errors[source].numpy())):
                i, j = np.nonzero(values)
                self.entries[kind].append((first + i, self.place[source].start + j, values[i, j]))
        self.e.append(form.bias.numpy())
        self.slack.append(form.slack.numpy())

    def _lines(self, name: str, r: Relaxation) -> None:
        """a v + b - u <= 0 and u - a v - b <= 0, for every line of the stack."""
        v, u = (np.arange(self.place[at].start, self.place[at].stop) for at in (f"{name} in", name))
        for slope, offset, sign in ((r.lower_slope, r.lower_offset, 1.0), (r.upper_slope, r.upper_offset, -1.0)):
            pairs = zip(*(part.double().reshape(-1, len(v)).numpy() for part in (slope, offset)), strict=True)
            for a, b in pairs:
                use = np.isfinite(a) & np.isfinite(b)
                rows = sum(map(len, self.b)) + np.arange(int(use.sum()))
                self.entries["A"].append((rows, v[use], sign * a[use]))
                self.entries["A"].append((rows, u[use], np.full(len(rows), -sign)))
                self.b.append(-sign * b[use])

    def _assemble(self) -> None:
        from scipy.sparse import coo_matrix

        self.lower, self.upper = np.concatenate(self.low), np.concatenate(self.high)
        n = len(self.lower)
        sizes = {"A": sum(map(len, self.b)), "E": sum(map(len, self.e)), "error": sum(map(len, self.e))}

        def matrix(kind: str) -> Any:
            i, j, values = (np.concatenate([part[k] for part in self.entries[kind]] or [np.zeros(0)]) for k in range(3))
            return coo_matrix((values, (i.astype(int), j.astype(int))), (sizes[kind], n)).tocsr()

        self.A, self.E, self.error = matrix("A"), matrix("E"), matrix("error")
        self.offsets, self.biases, self.slacks = (
            np.concatenate(part) if part else np.zeros(0) for part in (self.b, self.e, self.slack)
        )

    def rows(self, C: Float64[Tensor, "rows outputs"], d: Float64[Tensor, "rows"]) -> Float64[Tensor, "rows"]:
        """Lower bounds of the rows."""
        return torch.tensor([self._row(c, float(offset)) for c, offset in zip(C, d, strict=True)], dtype=torch.float64)

    def _row(self, c: Tensor, offset: float) -> float:
        cost, blur = np.zeros(len(self.lower)), np.zeros(len(self.lower))
        for source, weight in self.output.weights.items():
            cost[self.place[source]] = (c @ weight).numpy()
            size = c.abs() @ (weight.abs() * gamma(weight.shape[0] + 8, torch.float64) + self.output.errors[source])
            blur[self.place[source]] = size.numpy() * (1 + 2.0**-40)
        constant = float(c @ self.output.bias) + offset
        lost = float(c.abs() @ (self.output.bias.abs() + self.output.slack)) + abs(offset)
        lost = lost * gamma(len(c) + 16, torch.float64) + float(c.abs() @ self.output.slack) * (1 + 2.0**-40)
        multipliers = self._solve(cost)
        return max(self._value(cost, blur, *pair) for pair in multipliers) + constant - lost * (1 + 2.0**-40)

    def _solve(self, cost: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
        """Multipliers to try: the solver's, and none at all."""
        from scipy.optimize import linprog

        none = np.zeros(self.A.shape[0]), np.zeros(self.E.shape[0])
        if not self.A.shape[0]:
            return [none]
        found = linprog(
            cost, self.A, self.offsets, self.E, self.biases, np.stack([self.lower, self.upper], 1), method="highs"
        )
        if found.ineqlin is None or found.ineqlin.marginals is None or found.eqlin.marginals is None:
            return [none]
        pair = -np.asarray(found.ineqlin.marginals), -np.asarray(found.eqlin.marginals)
        return [pair, none] if all(np.isfinite(part).all() for part in pair) else [none]

    def _value(self, cost: np.ndarray, blur: np.ndarray, inequality: np.ndarray, equation: np.ndarray) -> float:
        """The Lagrangian's smallest value, rounded downward; any multipliers give a bound."""
        inequality = inequality.clip(min=0)
        reduced = cost + self.A.T @ inequality + self.E.T @ equation
        size = abs(cost) + abs(self.A).T @ inequality + abs(self.E).T @ abs(equation)
        terms = gamma(self.A.shape[0] + self.E.shape[0] + 16, torch.float64)
        blur = (blur + size * terms + self.error.T @ abs(equation)) * (1 + 2.0**-40)
        reach = np.maximum(abs(self.lower), abs(self.upper))
        inputs, rest = self.place[INPUT], slice(self.place[INPUT].stop, None)
        with np.errstate(invalid="ignore"):
            ends = np.minimum(reduced[rest] * self.lower[rest], reduced[rest] * self.upper[rest])
            loss = np.where(blur > 0, blur * reach, 0.0)
        ends = np.where(reduced[rest] == 0, 0.0, ends)
        slope = torch.from_numpy(reduced[inputs].copy()).view_as(self.domain.center)
        start = float(self.domain.infimum(slope)[0])
        duals = np.concatenate([inequality * self.offsets, equation * self.biases])
        total = start + float(ends.sum()) - float(duals.sum())
        mass = abs(start) + float(abs(ends).sum()) + float(abs(duals).sum())
        lost = (
            float(loss.sum())
            + float(abs(equation) @ self.slacks)
            + mass * gamma(len(ends) + len(duals) + 16, torch.float64)
        )
        value = total - lost * (1 + 2.0**-40)
        return value if math.isfinite(value) else -math.inf
