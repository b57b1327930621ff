"""CROWN: linear rows pulled back from a node to the input.

A row is (sample, coefficients). Rows come flat and ragged. As long as they live on windows of convolutional maps
(certify/frames.py) they stay so; on whole maps the rows of one sample stand side by side, [samples, rows, *map], and
share its lines without copies. While a row has met affine nodes only, one coefficient tensor serves its lower and its
upper bound; at the first relaxation it splits into A and -A, both bounded below.

With a float arithmetic the invariant is, for every float execution of the network,

    row >= sum_pending <A, v> + offset,        v the pulled-back part of a node's value (see state.py).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor

from certify.enclosures import Interval, Relaxation
from certify.frames import Frame
from certify.graph import INPUT, Graph, Node
from certify.memory import block_bytes
from certify.ops.base import Elementwise, inner, inner_error
from certify.propagate.state import Knowledge
from certify.rounding import step_down, step_up
from certify.sets import box_infimum


@dataclass(frozen=True, eq=False)
class Groups:
    """Rows of one sample side by side: row i stands at [group[i], slot[i]] of [groups, width]."""

    sample: Int[Tensor, "groups"]
    group: Int[Tensor, "rows"]
    slot: Int[Tensor, "rows"]
    width: int

    @classmethod
    def of(cls, sample: Int[Tensor, "rows"]) -> Groups:
        """Group rows whose samples are sorted in runs."""
        distinct, group, counts = sample.unique_consecutive(return_inverse=True, return_counts=True)
        first = counts.cumsum(0) - counts
        slot = torch.arange(len(sample), device=sample.device) - first[group]
        return cls(distinct, group, slot, int(counts.max()))

    def gather(self, A: Tensor) -> Tensor:
        """[rows, k, ...] -> [groups, width * k, ...]; empty places are zero."""
        whole = A.new_zeros(len(self.sample), self.width, *A.shape[1:])
        whole[self.group, self.slot] = A
        return whole.flatten(1, 2)

    def scatter(self, constant: Tensor) -> Tensor:
        """[groups, width * k] -> [rows, k]."""
        return constant.unflatten(1, (self.width, -1))[self.group, self.slot]


@dataclass
class Rows:
    """Rows on their way to the input, [rows, k]: k = 1, or 2 once every row is split into itself and its negative."""

    knowledge: Knowledge
    sample: Int[Tensor, "rows"]
    both: bool  # whether upper bounds are wanted too
    frames: dict[str, Frame] = field(default_factory=dict)  # of the maps on which rows keep to windows
    position: Int[Tensor, "rows dims"] | None = None  # where in the first map each row starts
    groups: Groups | None = None  # on whole maps; None: every row has lines of its own
    split: bool = False
    pending: dict[str, Tensor] = field(default_factory=dict)
    visited: list[Node] = field(default_factory=list)

    def __post_init__(self) -> None:
        zero = torch.zeros(len(self.sample), 1, dtype=torch.float64, device=self.sample.device)
        self.offset, self.loss, self.size = zero, zero, zero  # size: the absolute values that went into the offset

    def start(self, name: str, A: Float[Tensor, "rows 1 *shape"]) -> None:
        """Start with coefficients over the values of a node."""
        self.add(name, A if self.groups is None or name in self.frames else self.groups.gather(A))
        self.settle_rider(name, self.pending[name])

    def add(self, name: str, A: Tensor) -> None:
        """Add coefficients over the pulled-back part of ``name``; a fork's parts add up."""
        self.pending[name] = self.pending[name] + A if name in self.pending else A

    def of_sample(self, name: str, values: Tensor) -> Tensor:
        """Return values [batch or 1, ...] of a node, as the coefficients over it need them: [groups or 1, 1, ...]."""
        if name in self.frames:
            assert self.position is not None
            return self.frames[name].cut(values, self.sample, self.position)[:, None]
        if len(values) > 1:
            values = values[self.sample if self.groups is None else self.groups.sample]
        return values[:, None]

    def shift(self, name: str, constant: Tensor) -> None:
        """Add constants, laid out as the coefficients over ``name`` are, to the offsets."""
        constant = self._flat(name, constant)
        self.offset, self.size = self.offset + constant, self.size + constant.abs()

    def lose(self, name: str, amount: Tensor) -> None:
        """Give up ``amount`` >= 0 of every row, whatever its sign."""
        self.loss = self.loss + self._flat(name, amount)

    def settle_rider(self, name: str, A: Tensor) -> None:
        """Turn coefficients over the values of ``name`` into some over their pulled-back parts."""
        rider = self.knowledge.rider(name)
        if rider.constant is not None:
            self.shift(name, inner(A, self.of_sample(name, rider.constant.to(A.dtype))))
        if rider.error is not None:
            factor = 1 + 4 * inner_error(rider.error[0].numel(), A.dtype)
            self.lose(name, inner(A.abs(), self.of_sample(name, rider.error)) * factor)

    def step(self, node: Node, lines: Relaxation | None = None) -> None:
        """Move the coefficients over ``node`` to its inputs, through its own lines or the given ones."""
        rule, windowed = node.rule, node.name in self.frames
        if not rule.affine:
            self._split()
            lines = self._lines(node) if lines is None else lines
        A = self.pending.pop(node.name)
        pulled, constant = rule.pull_window(A, lines) if windowed else rule.pull_back(A, lines)
        if constant is not None:
            self.shift(node.name, constant)
        for name, part in zip(node.inputs, pulled, strict=True):
            part = self._fit(node, name, part) if windowed else part
            if not (rule.carries or isinstance(rule, Elementwise)):
                self.settle_rider(name, part)
            self.add(name, part)
        self.visited.append(node)

    def settle(self, name: str) -> None:
        """Concretise the coefficients over ``name`` on its interval (the input: on the domain itself)."""
        self._split()
        A, domain = self.pending.pop(name), self.knowledge.domain
        if name != INPUT or domain.is_box:
            hull, whole = self.knowledge.hull(name)
            if whole is not None:  # a sample that exploded has no bound, the others keep theirs
                self.offset = torch.where(whole[self.sample, None], self.offset, -torch.inf)
            ends = (self.of_sample(name, end)[:, 0] for end in (hull.lower, hull.upper))
            self.shift(name, box_infimum(A, Interval(*ends)))
            return
        if name in self.frames:
            assert self.position is not None
            A = self.frames[name].spread(A, self.position, self.knowledge.graph.shape(name)[1:])
            self.frames = {}
            A = A if self.groups is None else self.groups.gather(A)
        own = domain.take(self.sample if self.groups is None else self.groups.sample)
        self.shift(name, own.infimum_rows(A))

    def result(self) -> Interval:
        """Return bounds per row, float64 (the upper one is infinite unless ``both``); sums are rounded outward."""
        loss = self.loss * (1 + 2.0**-40) + 2.0**-48 * self.size
        if self.knowledge.rounds and self.visited:
            flushed = torch.stack([self.knowledge.underflow(node) for node in self.visited]).sum(0)
            loss = loss + flushed[self.sample, None]
        bound = step_down(self.offset - loss, 4)
        return Interval(bound[:, 0], -bound[:, 1] if self.both else torch.full_like(bound[:, 0], torch.inf))

    def _split(self) -> None:
        if self.split or not self.both:
            return
        self.pending = {name: torch.stack([A, -A], 2).flatten(1, 2) for name, A in self.pending.items()}
        self.offset = torch.cat([self.offset, -self.offset], 1)
        self.loss, self.size = self.loss.repeat(1, 2), self.size.repeat(1, 2)
        self.split = True

    def _flat(self, name: str, constant: Tensor) -> Tensor:
        """Lay out as [rows, k] what comes as the coefficients over ``name`` stand."""
        return constant if self.groups is None or name in self.frames else self.groups.scatter(constant)

    def _lines(self, node: Node) -> Relaxation:
        r = self.knowledge.lines(node)
        parts = (r.lower_slope, r.lower_offset, r.upper_slope, r.upper_offset)
        if node.name in self.frames:
            return Relaxation(*self.of_sample(node.name, torch.stack(parts, 1)).unbind(2))
        return Relaxation(*(self.of_sample(node.name, part) for part in parts))

    def _fit(self, node: Node, name: str, A: Tensor) -> Tensor:
        """Bring coefficients from the windows that ``node`` reaches in ``name`` to those kept there, or to maps."""
        reached, shape = node.rule.reach(self.frames[node.name]), self.knowledge.graph.shape(name)
        assert reached is not None
        assert self.position is not None
        if name not in self.frames:
            whole = reached.spread(A, self.position, shape[1:])
            return whole if self.groups is None else self.groups.gather(whole)
        A = self.frames[name].pad_from(A, reached)
        source = self.knowledge.graph.nodes.get(name)
        if source is not None and source.rule.affine and reached != self.frames[node.name]:
            inside = A.new_ones(1, 1, *shape[1:])  # nothing may leak in from beyond the edge
            A = A * self.frames[name].cut(inside, self.sample, self.position)[:, None]
        return A


def plan_windows(graph: Graph, start: str) -> dict[str, Frame]:
    """Return the frames of the maps, from ``start`` back, on which windows are worth keeping."""
    shape = graph.shape(start)
    frames = {start: Frame.start(len(shape) - 1)} if len(shape) > 1 else {}
    whole: set[str] = set()
    for name in reversed(graph.nodes):
        node = graph.nodes[name]
        reached = node.rule.reach(frames[name]) if name in frames else None
        if reached is None:
            if name in frames or name in whole:
                frames.pop(name, None)
                whole.update(node.inputs)
                for source in node.inputs:
                    frames.pop(source, None)
            continue
        for source in node.inputs:
            joint = frames[source] | reached if source in frames else reached
            space = graph.shape(source)[1:]
            if source in whole or joint is None or 2 * math.prod(joint.size) > math.prod(space):
                whole.add(source)
                frames.pop(source, None)
            else:
                frames[source] = joint
    return frames


def bound_rows(rows: Rows, *, relax: bool = True) -> Interval:
    """Return lower <= row <= upper for every row.

    With ``relax`` the rows go to the input through relaxations (CROWN); without, they go through affine nodes only
    and are settled on the intervals of the first other nodes (one affine step after interval propagation).
    """
    entry = rows.knowledge.entry
    for name in reversed(rows.knowledge.graph.nodes):
        if name in rows.pending:
            node = rows.knowledge.graph.nodes[name]
            if name == entry or not (relax or node.rule.affine):
                rows.settle(name)
            else:
                rows.step(node)
    if INPUT in rows.pending:
        rows.settle(INPUT)
    return rows.result()


def bound_claim(knowledge: Knowledge, C: Float[Tensor, "batch rows outputs"], *, relax: bool = True) -> Tensor:
    """Return lower bounds [batch, rows], float64, of C y for y the outputs of the graph."""
    graph, (batch, count, _) = knowledge.graph, C.shape
    sample = torch.arange(batch, device=C.device).repeat_interleave(count)
    A = C.to(graph.dtype).reshape(batch * count, 1, *graph.shape(graph.output))
    bound = torch.empty(len(sample), dtype=torch.float64, device=C.device)
    for block in _blocks(sample, _most(graph, {}, 1)):
        rows = Rows(knowledge, sample[block], both=False, groups=Groups.of(sample[block]))
        rows.start(graph.output, A[block])
        bound[block] = bound_rows(rows, relax=relax).lower
    return bound.view(batch, count)


def bound_neurons(knowledge: Knowledge, node: Node, wanted: Tensor) -> Interval:
    """Return CROWN bounds [n], float64, of the outputs of ``node`` where the mask ``wanted`` [batch, *shape] is set."""
    sample, neuron = wanted.flatten(1).nonzero(as_tuple=True)
    frames = plan_windows(knowledge.graph, node.name)
    lower, upper = torch.empty(2, len(sample), dtype=torch.float64, device=sample.device)
    for block in _blocks(sample, _most(knowledge.graph, frames, 2), grouped=INPUT not in frames):
        found = bound_rows(_neuron_rows(knowledge, node, frames, sample[block], neuron[block]))
        lower[block], upper[block] = found.lower, found.upper
    return Interval(step_down(lower), step_up(upper))


def _neuron_rows(knowledge: Knowledge, node: Node, frames: dict[str, Frame], sample: Tensor, neuron: Tensor) -> Rows:
    """Rows that start at single outputs (flat positions ``neuron``) of a node."""
    rows = Rows(knowledge, sample, both=True, frames=frames, groups=Groups.of(sample))
    count, dtype = torch.arange(len(sample), device=sample.device), knowledge.graph.dtype
    if node.name not in frames:
        A = torch.zeros(len(sample), 1, *node.shape, dtype=dtype, device=sample.device)
        A.flatten(1)[count, neuron] = 1
    else:
        channels, *space = node.shape
        rows.position = torch.stack(torch.unravel_index(neuron % math.prod(space), tuple(space)), 1)
        A = torch.zeros(len(sample), 1, channels, *[1] * len(space), dtype=dtype, device=sample.device)
        A.flatten(1)[count, neuron // math.prod(space)] = 1
    rows.start(node.name, A)
    return rows


def _most(graph: Graph, frames: dict[str, Frame], sides: int) -> int:
    """How many rows a block may have: by the widest whole map, or the widest window with the lines cut for it."""
    whole = [math.prod(graph.shape(name)) for name in (INPUT, *graph.nodes) if name not in frames]
    cut = [graph.shape(name)[0] * math.prod(frame.size) * 3 for name, frame in frames.items()]
    widest = max(cut if INPUT in frames else [*whole, *cut])
    return max(1, block_bytes(graph.device) // (sides * widest * graph.dtype.itemsize))


def _blocks(sample: Int[Tensor, "rows"], most: int, *, grouped: bool = True) -> Iterator[Tensor]:
    """Yield the rows in blocks of about ``most``; grouped ones hold samples with about as many rows each."""
    if not grouped:
        yield from torch.arange(len(sample), device=sample.device).split(most)
        return
    counts = sample.bincount()[sample]
    order = counts.sort(descending=True, stable=True).indices  # rows of one sample stay together
    runs = sample[order].unique_consecutive(return_counts=True)[1].tolist()
    while runs:
        taken = max(1, most // runs[0])  # samples that fit, padded to the first one's rows
        block, order = order.split([sum(runs[:taken]), sum(runs[taken:])])
        runs = runs[taken:]
        yield from block.split(max(most, 1))
