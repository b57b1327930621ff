"""CROWN: linear rows pulled back from a node to the input.

A row is (sample, coefficients). All rows of a call are independent, so they come flat and ragged: ``index`` says to
which sample each belongs. While a row has met affine nodes only, one coefficient tensor serves its lower and its
upper bound; at the first relaxation it splits into A and -A, both bounded below.

With a float arithmetic the invariant is, for every float execution of the network,

    row >= sum_pending <A, y> + offset - loss,

each node adding <|A|, e> to ``loss`` (see certify/rounding.py).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from jaxtyping import Float64, Int
from torch import Tensor

from certify.enclosures import Interval, Relaxation
from certify.graph import INPUT, Node
from certify.ops.base import Affine, inner, inner_error
from certify.propagate.state import Knowledge
from certify.rounding import step_down, step_up, unit_roundoff
from certify.sets import Box

ROW_BYTES = 256 << 20  # memory for the coefficients of one block of rows
OWN_BLOCK = 24  # rows per sample from which samples get blocks of their own, which share vectors without copies
LIVE = 6  # copies of the coefficients that are alive at once


@dataclass
class Rows:
    """Rows on their way to the input. ``split``: the second half holds the negated rows."""

    knowledge: Knowledge
    index: Tensor  # [rows], sorted within each half
    offset: Tensor  # float64 [rows]
    loss: Tensor  # float64 [rows], >= 0
    pending: dict[str, Tensor] = field(default_factory=dict)
    split: bool = False

    @classmethod
    def at(cls, knowledge: Knowledge, name: str, A: Tensor, index: Tensor) -> Rows:
        """Start with coefficients ``A`` [rows, *shape] over the values of node ``name``."""
        zero = torch.zeros(len(A), dtype=torch.float64, device=A.device)
        return cls(knowledge, index, zero, zero.clone(), {name: A})

    @classmethod
    def of_neurons(cls, knowledge: Knowledge, node: Node, neuron: Tensor, index: Tensor) -> Rows:
        """Start with single outputs of ``node`` (flat positions ``neuron``), already pulled back over it if it can."""
        rule = node.rule
        pulled = rule.rows(neuron, node.shape) if isinstance(rule, Affine) else None
        if pulled is None or not isinstance(rule, Affine):
            A = torch.zeros(len(neuron), *node.shape, dtype=knowledge.graph.dtype, device=neuron.device)
            A.flatten(1)[torch.arange(len(A), device=A.device), neuron] = 1
            return cls.at(knowledge, node.name, A, index)
        rows = cls.at(knowledge, node.inputs[0], pulled[0], index)
        if rule.bias is not None:
            rows.offset = rule.bias.expand(node.shape).reshape(-1)[neuron].double()
        if knowledge.rounds:
            error = knowledge.error(node)
            if error is not None:
                rows.loss = error.flatten(1)[index, neuron].double()
        return rows

    def gather(self, values: Tensor) -> Tensor:
        """Return per-sample values per row; one sample's rows share them without a copy."""
        first = int(self.index[0])
        if bool((self.index == first).all()):
            return values[first : first + 1]
        return values[self.index]

    def lose(self, A: Tensor, error: Tensor) -> None:
        """Add <|A|, error>; the factor covers the rounding of its own products."""
        self.loss = self.loss + inner(A.abs(), self.gather(error)) * (1 + 2 * inner_error(error[0].numel(), A.dtype))

    def shift(self, constant: Tensor) -> None:
        """Add to the offsets; large terms may cancel later, so each sum's own rounding is lost here."""
        self.offset = self.offset + constant
        self.loss = self.loss + 2.0**-53 * self.offset.abs()

    def halve(self) -> None:
        """Split every row into itself and its negative."""
        self.pending = {name: torch.cat([A, -A]) for name, A in self.pending.items()}
        self.offset = torch.cat([self.offset, -self.offset])
        self.loss, self.index = self.loss.repeat(2), self.index.repeat(2)
        self.split = True

    def add(self, name: str, A: Tensor) -> None:
        """Add coefficients over the values of ``name``; a fork's parts add up."""
        if name in self.pending:
            A = self.pending[name] + A
            if self.knowledge.rounds:
                u = unit_roundoff(A.dtype)
                self.lose(A, self.knowledge.intervals[name].magnitude * u)
        self.pending[name] = A

    def step(self, node: Node) -> None:
        """Move the coefficients over ``node`` to its inputs."""
        if not node.rule.affine and not self.split:
            self.halve()
        A = self.pending.pop(node.name)
        relaxation = self.knowledge.relaxation(node) if not node.rule.affine else None
        if self.knowledge.rounds:
            error = self.knowledge.error(node)
            if error is not None:
                self.lose(A, error)
            self.loss = self.loss + self.knowledge.underflow(node)[self.index] * (1 + A.abs().flatten(1).amax(1))
        pulled, constant = node.rule.pull_back(A, None if relaxation is None else self._rows_of(relaxation))
        if constant is not None:
            self.shift(constant)
        for name, part in zip(node.inputs, pulled, strict=True):
            self.add(name, part)

    def settle(self, name: str) -> None:
        """Concretise the coefficients over ``name`` on its interval (the input: on the domain itself)."""
        if not self.split:
            self.halve()
        A = self.pending.pop(name)
        if name == INPUT:
            domain = self.knowledge.domain
        else:
            interval = self.knowledge.intervals[name]
            known = torch.isfinite(interval.lower) & torch.isfinite(interval.upper)
            whole = known.flatten(1).all(1)  # a sample that exploded has no bound, the others keep theirs
            self.offset = torch.where(whole[self.index], self.offset, -torch.inf)
            domain = Box(torch.where(known, interval.lower, 0), torch.where(known, interval.upper, 0))
        first = int(self.index[0])
        single = bool((self.index == first).all())
        own = domain.take(self.index[:1] if single else self.index)
        self.shift(own.infimum(A))

    def result(self) -> tuple[Tensor, Tensor]:
        """Return lower and upper bounds per row, float64; sums of a few terms are stepped outward."""
        bound = step_down(self.offset - self.loss * (1 + 2.0**-40), 4)
        bound = bound - 2.0**-48 * (self.offset.abs() + self.loss)
        lower, upper = bound.chunk(2)
        return lower, -upper

    def _rows_of(self, relaxation: Relaxation) -> Relaxation:
        r = relaxation
        return Relaxation(*(self.gather(x) for x in (r.lower_slope, r.lower_offset, r.upper_slope, r.upper_offset)))


def bound_rows(rows: Rows, *, relax: bool = True) -> tuple[Float64[Tensor, "rows"], Float64[Tensor, "rows"]]:
    """Return lower <= row <= upper for every row.

    With ``relax`` the rows go to the input through relaxations (CROWN); without, they go through affine nodes only
    and are settled on the intervals of the first other nodes (one affine step after interval propagation).
    """
    for name in reversed(rows.knowledge.graph.nodes):
        if name in rows.pending:
            node = rows.knowledge.graph.nodes[name]
            if relax or node.rule.affine:
                rows.step(node)
            else:
                rows.settle(name)
    if INPUT in rows.pending:
        rows.settle(INPUT)
    return rows.result()


def bound_coefficients(
    knowledge: Knowledge, name: str, A: Tensor, index: Int[Tensor, "rows"], *, relax: bool = True
) -> Interval:
    """Return bounds of <A, y> [rows] for y the values of ``name``, in blocks that fit ROW_BYTES."""
    parts = [
        bound_rows(Rows.at(knowledge, name, A[block], index[block]), relax=relax) for block in _blocks(knowledge, index)
    ]
    lower, upper = (torch.cat(column) for column in zip(*parts, strict=True))
    return Interval(lower, upper)


def bound_neurons(knowledge: Knowledge, node: Node, wanted: Tensor) -> Interval:
    """Return CROWN bounds [n], float64, of the outputs of ``node`` where the mask ``wanted`` [batch, *shape] is set."""
    sample, *place = wanted.nonzero(as_tuple=True)
    neuron = torch.zeros_like(sample)
    for axis, size in zip(place, node.shape, strict=True):
        neuron = neuron * size + axis
    parts = [
        bound_rows(Rows.of_neurons(knowledge, node, neuron[block], sample[block]))
        for block in _blocks(knowledge, sample)
    ]
    lower, upper = (torch.cat(column) for column in zip(*parts, strict=True))
    return Interval(step_down(lower), step_up(upper))


def _blocks(knowledge: Knowledge, index: Tensor) -> list[slice]:
    """Blocks of rows that fit the memory; whole samples where these are large, so that their rows share data."""
    graph = knowledge.graph
    widest = max(torch.Size(graph.shape(name)).numel() for name in (INPUT, *graph.nodes))
    most = max(1, ROW_BYTES // (LIVE * 2 * widest * graph.dtype.itemsize))
    ends = torch.cat([(index[1:] != index[:-1]).nonzero()[:, 0] + 1, index.new_tensor([len(index)])]).tolist()
    if len(index) < OWN_BLOCK * len(ends):  # many samples with few rows each
        return [slice(i, min(i + most, len(index))) for i in range(0, len(index), most)]
    blocks, start = [], 0
    for end in ends:
        blocks += [slice(i, min(i + most, end)) for i in range(start, end, most)]
        start = end
    return blocks
