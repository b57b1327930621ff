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
from jaxtyping import Bool, Float, Int
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
        """[groups, width * k, ...] -> [rows, k, ...]."""
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
        self.add(name, self.laid(name, A))
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
        constant = self.flat(name, constant)
        self.offset, self.size = self.offset + constant, self.size + constant.abs()

    def lose(self, name: str, amount: Tensor) -> None:
        """Give up ``amount`` >= 0 of every row, whatever its sign."""
        self.loss = self.loss + self.flat(name, amount)

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
            lines = self.lines(node) if lines is None else lines
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

    def flat(self, name: str, values: Tensor) -> Tensor:
        """Lay out as [rows, k, ...] what comes as the coefficients over ``name`` stand."""
        return values if self.groups is None or name in self.frames else self.groups.scatter(values)

    def laid(self, name: str, values: Tensor) -> Tensor:
        """Lay out [rows, k, ...] as the coefficients over ``name`` stand."""
        return values if self.groups is None or name in self.frames else self.groups.gather(values)

    def lines(self, node: Node) -> Relaxation:
        """Return a node's lines as the coefficients over it need them."""
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
            return self.laid(name, reached.spread(A, self.position, shape[1:]))
        return self._inside(node, name, self.frames[name].pad_from(A, reached))

    def unfit(self, node: Node, name: str, v: Tensor) -> Tensor:
        """The adjoint of what ``step`` does between the windows of ``node`` and the coefficients over ``name``."""
        if node.name not in self.frames:
            return v
        reached = node.rule.reach(self.frames[node.name])
        assert reached is not None
        assert self.position is not None
        if name not in self.frames:
            every = torch.arange(len(self.sample), device=v.device)
            return reached.cut(self.flat(name, v)[:, 0], every, self.position)[:, None]
        return self.frames[name].crop_to(self._inside(node, name, v), reached)

    def _inside(self, node: Node, name: str, A: Tensor) -> Tensor:
        """Let nothing leak into an affine map from beyond its edge; lines and boxes are zero there anyway."""
        source = self.knowledge.graph.nodes.get(name)
        if (
            source is None
            or not source.rule.affine
            or node.rule.reach(self.frames[node.name]) == self.frames[node.name]
        ):
            return A
        assert self.position is not None
        inside = A.new_ones(1, 1, *self.knowledge.graph.shape(name)[1:])
        return A * self.frames[name].cut(inside, self.sample, self.position)[:, None]


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


def claim_rows(knowledge: Knowledge, A: Float[Tensor, "rows outputs"], sample: Int[Tensor, "rows"]) -> Rows:
    """Return rows <A, y> over the outputs y of the graph, for lower bounds."""
    graph = knowledge.graph
    rows = Rows(knowledge, sample, both=False, groups=Groups.of(sample))
    rows.start(graph.output, A.to(graph.dtype).view(len(A), 1, *graph.shape(graph.output)))
    return rows


def bound_claim(knowledge: Knowledge, C: Float[Tensor, "batch rows outputs"], *, relax: bool = True) -> Tensor:
    """Return lower bounds [batch, rows], float64, of C y for y the outputs of the graph."""
    sample = torch.arange(len(C), device=C.device).repeat_interleave(C.shape[1])
    bound = torch.empty(len(sample), dtype=torch.float64, device=C.device)
    for block in blocks(sample, most_rows(knowledge.graph, {})):
        bound[block] = bound_rows(claim_rows(knowledge, C.flatten(0, 1)[block], sample[block]), relax=relax).lower
    return bound.view(C.shape[:2])


@dataclass(frozen=True, eq=False)
class Neurons:
    """Outputs of one node: flat positions ``neuron`` in the maps of the samples ``sample``, sorted by sample."""

    knowledge: Knowledge
    node: Node
    sample: Int[Tensor, "rows"]
    neuron: Int[Tensor, "rows"]
    frames: dict[str, Frame]

    @classmethod
    def of(cls, knowledge: Knowledge, node: Node, wanted: Bool[Tensor, "batch *shape"]) -> Neurons:
        """Those where the mask ``wanted`` is set."""
        frames = plan_windows(knowledge.graph, node.name)
        if not knowledge.domain.is_box:
            frames.pop(INPUT, None)
        sample, neuron = wanted.flatten(1).nonzero(as_tuple=True)
        return cls(knowledge, node, sample, neuron, frames)

    def rows(self, index: Int[Tensor, "some"], sign: Tensor | None = None) -> Rows:
        """Return the rows of some neurons, for both bounds, or for the lower bound of ``sign`` times each."""
        sample, neuron, shape = self.sample[index], self.neuron[index], self.node.shape
        rows = Rows(self.knowledge, sample, both=sign is None, frames=self.frames, groups=Groups.of(sample))
        if self.node.name in self.frames:
            channels, *space = shape
            rows.position = torch.stack(torch.unravel_index(neuron % math.prod(space), tuple(space)), 1)
            neuron, shape = neuron // math.prod(space), (channels, *[1] * len(space))
        A = torch.zeros(len(index), 1, *shape, dtype=self.knowledge.graph.dtype, device=index.device)
        A.flatten(1)[torch.arange(len(index), device=index.device), neuron] = 1 if sign is None else sign.to(A.dtype)
        rows.start(self.node.name, A)
        return rows

    def ends(self, block: Int[Tensor, "neurons"], index: Int[Tensor, "some"]) -> Rows:
        """Return rows for lower bounds: row 2 i is neuron i of the block, row 2 i + 1 its negative."""
        return self.rows(block[index // 2], 1.0 - 2.0 * (index % 2))

    def blocks(self, most: int) -> Iterator[Tensor]:
        """Yield the neurons in blocks."""
        return blocks(self.sample, most, grouped=self.knowledge.entry not in self.frames)


def bound_neurons(knowledge: Knowledge, node: Node, wanted: Bool[Tensor, "batch *shape"]) -> Interval:
    """Return CROWN bounds [n], float64, of the outputs of ``node`` where the mask ``wanted`` is set."""
    neurons = Neurons.of(knowledge, node, wanted)
    lower, upper = torch.empty(2, len(neurons.sample), dtype=torch.float64, device=neurons.sample.device)
    for block in neurons.blocks(most_rows(knowledge.graph, neurons.frames) // 2):
        found = bound_rows(neurons.rows(block))
        lower[block], upper[block] = found.lower, found.upper
    return Interval(step_down(lower), step_up(upper))


def most_rows(graph: Graph, frames: dict[str, Frame], copies: int = 1) -> int:
    """How many rows a block may have: by the widest whole map, or the widest window with the lines cut for it.

    ``copies`` is how many more tensors of all maps are kept per row than a single pull back needs.
    """
    whole = [math.prod(graph.shape(name)) for name in (INPUT, *graph.nodes) if name not in frames]
    cut = [graph.shape(name)[0] * math.prod(frame.size) * 3 for name, frame in frames.items()]
    widest = max(cut if INPUT in frames else [*whole, *cut])
    return max(1, block_bytes(graph.device) // (copies * widest * graph.dtype.itemsize))


def blocks(sample: Int[Tensor, "rows"], most: int, *, grouped: bool = True) -> Iterator[Tensor]:
    """Yield the rows in blocks of about ``most``; grouped ones hold samples with about as many rows each."""
    if not grouped:
        yield from torch.arange(len(sample), device=sample.device).split(max(1, most))
        return
    counts = sample.bincount()[sample]
    order = counts.sort(descending=True, stable=True).indices  # rows of one sample stay together
    runs = sample[order].unique_consecutive(return_counts=True)[1].tolist()
    while runs:
        taken = max(1, most // runs[0])  # samples that fit, padded to the first one's rows
        block, order = order.split([sum(runs[:taken]), sum(runs[taken:])])
        runs = runs[taken:]
        yield from block.split(max(most, 1))
