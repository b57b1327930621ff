"""The linear program over all lines of all activations: the tightest bound that convex regions per neuron give.

Variables are the input x, the outputs y of every node that is not affine, and the values v that these nodes read:

    v = M (x, y) + c,    slope v + offset <= y <= slope v + offset  for all known lines,    v and y in their intervals.

With a float arithmetic the variables are the float network's values: every equation holds up to the rounding between
the two, which a row pays in proportion to its multiplier, and every line is loosened by the activation's own rounding.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import numpy as np
import torch
from jaxtyping import Float64
from scipy import sparse
from torch import Tensor

from certify.convex.expansion import Expansion, expand
from certify.convex.intervals import learned
from certify.convex.program import Program
from certify.convex.wong_kolter import parallel_lines
from certify.enclosures import Interval, Relaxation
from certify.errors import UnsupportedOperation
from certify.graph import INPUT, Graph, Node
from certify.ops.base import Elementwise
from certify.ops.pool import MaxPool
from certify.propagate.drift import local_drifts
from certify.propagate.methods import CROWN, BoundMethod, finite
from certify.propagate.state import Knowledge
from certify.registry import register_method
from certify.rounding import Arithmetic, gamma, step_down
from certify.sets import PerturbationSet
from certify.specs import Spec

MOST = 2000  # hidden neurons


@register_method("lp")
@dataclass(frozen=True)
class LP:
    """One linear program per row over the region between all lines of every activation; never worse than CROWN.

    The intervals come from the method ``intervals``. What is reported is not what the solver claims, but what its
    multipliers prove. For networks of at most 2,000 hidden neurons.
    Reference: Salman et al. 2019, arXiv 1902.08722.
    """

    name: ClassVar[str] = "lp"
    intervals: str | BoundMethod = "crown"

    def bound(self, graph: Graph, domain: PerturbationSet, spec: Spec, arithmetic: Arithmetic) -> Tensor:
        """Return lower bounds of the rows C y + d."""
        relaxed = Relaxed(graph)
        knowledge = learned(self.intervals, graph, domain, arithmetic)
        return finite(torch.fmax(program_rows(relaxed, knowledge, spec), CROWN().rows(knowledge, spec)))


def program_rows(relaxed: Relaxed, knowledge: Knowledge, spec: Spec) -> Float64[Tensor, "batch rows"]:
    """Return what the linear programs alone give."""
    found = torch.full(spec.d.shape, -torch.inf, dtype=torch.float64)
    for i, program in enumerate(relaxed.programs(knowledge)):
        if program is not None:
            for j in range(spec.d.shape[1]):
                found[i, j] = relaxed.minimum(program, spec.C[i, j].double().cpu(), float(spec.d[i, j]))
    C, output = spec.C.double().cpu().abs(), relaxed.graph.nodes[relaxed.graph.output]
    # An output that is no affine node is a variable, and its lines have paid already.
    drift = local_drifts(knowledge)[output.name].flatten(1).cpu() if output.rule.affine else C.new_zeros(1, C.shape[2])
    owed = torch.where(C > 0, C * drift[:, None], 0).sum(2) * (1 + 2 * gamma(C.shape[2] + 4, torch.float64))
    return finite(step_down(found - owed)).to(knowledge.graph.device)


class Relaxed:
    """What the programs of all samples share: the variables and the affine maps between them."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.curved = [node for node in graph.nodes.values() if not node.rule.affine]
        for node in self.curved:
            if not isinstance(node.rule, (Elementwise, MaxPool)):
                raise UnsupportedOperation(
                    f"{node.kind} at {node.name!r} in a linear program", "activations and max-pooling", "crown"
                )
        hidden = sum(torch.Size(node.shape).numel() for node in self.curved)
        if hidden > MOST:
            raise UnsupportedOperation(
                f"{hidden:,} hidden neurons in a linear program", f"at most {MOST:,}", "crown or alpha-crown"
            )
        self.maps = expand(graph)
        self.place: dict[str, int] = {}  # of the first variable of a node's value
        self.read: dict[str, int] = {}  # of the first variable of what a node that is not affine reads
        self.size = 0  # of all variables
        for name in (INPUT, *(node.name for node in self.curved)):
            self.place[name] = self._take(graph.shape(name))
        for node in self.curved:
            self.read[node.name] = self._take(graph.shape(node.inputs[0]))

    @property
    def _sums(self) -> float:
        """The relative error of sums over the variables, and of a few operations after them, twice."""
        return 2 * gamma(self.size + 32, torch.float64)

    def _take(self, shape: tuple[int, ...]) -> int:
        first, self.size = self.size, self.size + torch.Size(shape).numel()
        return first

    @cached_property
    def equations(self) -> tuple[sparse.csr_matrix, np.ndarray]:
        """(A, b) of v - M (x, y) = c, for all v in their order."""
        blocks: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        constants: list[np.ndarray] = []
        row = 0
        for node in self.curved:
            read = self.maps[node.inputs[0]]
            constant = read.constant.flatten().numpy()
            here = np.arange(len(constant))
            blocks.append((row + here, self.read[node.name] + here, np.ones(len(constant))))
            for source, (M, _) in read.parts.items():
                j, k = (index.numpy() for index in M.flatten(1).nonzero(as_tuple=True))
                blocks.append((row + k, self.place[source] + j, -M.flatten(1).numpy()[j, k]))
            constants.append(constant)
            row += len(constant)
        if not blocks:
            return sparse.csr_matrix((0, self.size)), np.zeros(0)
        i, j, values = (np.concatenate(parts) for parts in zip(*blocks, strict=True))
        return sparse.csr_matrix((values, (i, j)), shape=(row, self.size)), np.concatenate(constants)

    def programs(self, knowledge: Knowledge) -> Iterator[Program | None]:
        """Yield every sample's program; None where some interval is not finite."""
        drifts = {name: drift.flatten(1).cpu().numpy() for name, drift in local_drifts(knowledge).items()}
        lines = {node.name: known_lines(knowledge, node).loosened(drifts[node.name]) for node in self.curved}
        for i in range(knowledge.domain.batch):
            lower, upper = np.empty(self.size), np.empty(self.size)
            for first, interval in self._intervals(knowledge):
                low, up = (end[i].double().flatten().cpu().numpy() for end in (interval.lower, interval.upper))
                where = slice(first, first + len(low))
                # In real arithmetic two correct ends may cross by a rounding error.
                lower[where], upper[where] = np.minimum(low, up), np.maximum(low, up)
            if not (np.isfinite(lower).all() and np.isfinite(upper).all()):
                yield None
                continue
            domain = knowledge.domain.take(torch.tensor([i], device=self.graph.device))
            A_eq, b_eq = self.equations
            A_ub, b_ub = self._inequalities(lines, i)
            slack = self._slack(np.maximum(np.abs(lower), np.abs(upper)), {n: d[i] for n, d in drifts.items()})
            yield Program(domain, lower, upper, A_ub, b_ub, A_eq, b_eq, slack)

    def minimum(self, program: Program, C: Float64[Tensor, "outputs"], d: float) -> float:
        """Return a lower bound of the real network's C y + d over one sample's program."""
        output, magnitude = self.maps[self.graph.output], program.magnitude
        cost, g = np.zeros(self.size), gamma(len(C) + 8, torch.float64)
        owed, terms = 0.0, abs(d)
        for source, (M, E) in output.parts.items():
            where = slice(self.place[source], self.place[source] + len(M))
            cost[where] = (M.flatten(1) @ C).numpy()
            error = (g * M.flatten(1).abs() + E.flatten(1)) @ C.abs() + 2.0**-1000
            owed += float(error.numpy() @ magnitude[where])
        constant = float(output.constant.flatten() @ C)
        terms += float(output.constant.flatten().abs() @ C.abs())
        owed += float(output.error.flatten() @ C.abs()) + g * terms
        lowest = program.minimum(cost)
        return lowest + (constant + d) - (owed * (1 + self._sums) + 2.0**-48 * (terms + abs(lowest)) + 2.0**-1000)

    def _intervals(self, knowledge: Knowledge) -> Iterator[tuple[int, Interval]]:
        yield 0, knowledge.domain.hull
        for node in self.curved:
            yield self.place[node.name], knowledge.intervals[node.name]
            yield self.read[node.name], knowledge.intervals[node.inputs[0]]

    def _slack(self, magnitude: np.ndarray, drifts: dict[str, np.ndarray]) -> np.ndarray:
        """How far each equation may be off: the errors of its matrix and constant, and the network's rounding."""
        found = []
        for node in self.curved:
            (name,) = node.inputs
            # What reads the input or a variable reads it as it is.
            rounding = drifts[name] if name in self.graph.nodes and self.graph.nodes[name].rule.affine else 0.0
            found.append((self._owed(self.maps[name], magnitude) + rounding) * (1 + self._sums))
        return np.concatenate(found) if found else np.zeros(0)

    def _owed(self, read: Expansion, magnitude: np.ndarray) -> np.ndarray:
        owed = read.error.flatten().numpy().copy()
        for source, (_, E) in read.parts.items():
            owed += magnitude[self.place[source] :][: len(E)] @ E.flatten(1).numpy()
        return owed * (1 + self._sums) + 2.0**-1000

    def _inequalities(self, lines: dict[str, Lines], sample: int) -> tuple[sparse.csr_matrix, np.ndarray]:
        """(A, b) of all lines: slope v - y <= -offset below, y - slope v <= offset above."""
        rows: list[np.ndarray] = []
        columns: list[np.ndarray] = []
        values: list[np.ndarray] = []
        limits: list[np.ndarray] = []
        total = 0
        for node in self.curved:
            known = lines[node.name]
            for slopes, offsets, sign in ((known.lower, known.below, 1.0), (known.upper, known.above, -1.0)):
                neuron, taps, slope, offset = _distinct(known, slopes[:, sample], offsets[:, sample])
                count = len(neuron)
                here = total + np.arange(count)
                rows += [np.repeat(here, taps.shape[1]), here]
                columns += [(self.read[node.name] + taps).ravel(), self.place[node.name] + neuron]
                values += [(sign * slope).ravel(), np.full(count, -sign)]
                limits.append(-sign * offset)
                total += count
        if not rows:
            return sparse.csr_matrix((0, self.size)), np.zeros(0)
        i, j, a = (np.concatenate(parts) for parts in (rows, columns, values))
        A = sparse.csr_matrix((a, (i, j)), shape=(total, self.size))
        A.eliminate_zeros()
        return A, np.concatenate(limits)


@dataclass(frozen=True, eq=False)
class Lines:
    """Lines below and above each neuron of a node: sum_k lower[., k] v[taps[., k]] + below <= y, and so above.

    ``lower`` and ``upper`` are [lines, batch, neurons, k], ``below`` and ``above`` [lines, batch, neurons]; ``taps``
    [neurons, k] are positions in what the node reads. Lines that are not finite say nothing.
    """

    taps: np.ndarray
    lower: np.ndarray
    below: np.ndarray
    upper: np.ndarray
    above: np.ndarray

    def loosened(self, error: np.ndarray) -> Lines:
        """Return the lines that hold for values within ``error`` [batch, neurons] of those these hold for."""
        if not error.any():
            return self
        below, above = np.nextafter(self.below - error, -np.inf), np.nextafter(self.above + error, np.inf)
        return Lines(self.taps, self.lower, below, self.upper, above)


def known_lines(knowledge: Knowledge, node: Node) -> Lines:
    """Return all that is known of an activation or a max-pooling over its input's interval, for real arithmetic."""
    (z,) = knowledge.inputs(node)
    if isinstance(node.rule, MaxPool):
        return _pool_lines(node.rule, z)
    assert isinstance(node.rule, Elementwise)
    facts, batch = node.rule.facts, len(z.lower)
    pairs: list[Relaxation] = [facts.relax(z)]
    other = facts.second_lines(z)
    pairs += [] if other is None else [other]
    pairs += [parallel_lines(facts, z)] if facts.piecewise else []
    fan = facts.fan(z)
    pairs += [
        Relaxation(*parts)
        for parts in zip(fan.lower_slope, fan.lower_offset, fan.upper_slope, fan.upper_offset, strict=True)
    ]

    def stacked(parts: Iterable[Tensor]) -> np.ndarray:
        return torch.stack([part.double().reshape(batch, -1) for part in parts]).cpu().numpy()

    neurons = z.lower[0].numel()
    return Lines(
        np.arange(neurons)[:, None],
        stacked(r.lower_slope for r in pairs)[..., None],
        stacked(r.lower_offset for r in pairs),
        stacked(r.upper_slope for r in pairs)[..., None],
        stacked(r.upper_offset for r in pairs),
    )


def _pool_lines(rule: MaxPool, z: Interval) -> Lines:
    """The maximum lies above every input of its window, and below the rule's upper line; padding says nothing."""
    upper = rule.relax(z)
    slope, offset = (part.double().cpu().numpy() for part in (upper.upper_slope, upper.upper_offset))
    windows = rule.windows.cpu().numpy()
    batch, (neurons, k) = len(slope), windows.shape
    above = np.where(((windows < 0) & (slope != 0)).any(-1), np.inf, offset)
    lower = np.broadcast_to(np.eye(k)[:, None, None], (k, batch, neurons, k))
    below = np.broadcast_to(np.where(windows < 0, -np.inf, 0.0).T[:, None], (k, batch, neurons))
    return Lines(np.maximum(windows, 0), lower, below, slope[None], above[None])


def _distinct(known: Lines, slopes: np.ndarray, offsets: np.ndarray) -> tuple[np.ndarray, ...]:
    """Return (neuron, taps, slope, offset) of one sample's finite lines, each once."""
    useful = np.isfinite(offsets) & np.isfinite(slopes).all(-1)
    line, neuron = useful.nonzero()
    found = np.concatenate([neuron[:, None], offsets[line, neuron][:, None], slopes[line, neuron]], 1)
    found = np.unique(found, axis=0)
    neuron = found[:, 0].astype(np.int64)
    return neuron, known.taps[neuron], found[:, 2:], found[:, 1]
