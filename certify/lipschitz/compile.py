"""From a graph to a ``Chain``: which values are alive at every activation, and what they are of the state.

Small layers keep a multiplier per neuron; the affine maps before them are rows pulled back to the state, so no layer
becomes a matrix of pixels by pixels. Large maps live on a torus (fourier.py) with a multiplier per channel. What
neither can express ends its segment: between two places where one value alone is alive, ||du|| <= product bound ||dv||.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from jaxtyping import Float64
from torch import Tensor

from certify.enclosures import Interval
from certify.errors import UnsupportedOperation
from certify.graph import INPUT, Graph, Node
from certify.lipschitz.chain import Chain
from certify.lipschitz.fourier import Torus
from certify.lipschitz.hermitian import FEW
from certify.lipschitz.maps import Basis, Narrow, Value, matrix_of, on_value, through
from certify.lipschitz.slopes import pulled_back
from certify.lipschitz.steps import Fold, Gate, Mix, Readout, Renew, Source, Step
from certify.ops.base import Affine, Elementwise
from certify.ops.conv import Conv
from certify.ops.pool import MaxPool

NEURONS = 256  # of a layer with a multiplier for each; beyond, maps go by frequency
WORK = 2e9  # blocks times size^3 of a state that is still worth it

#: An upper bound [samples] of the l2 constant between two nodes.
Between = Callable[[str, str], Float64[Tensor, "samples"]]


def compile_chain(graph: Graph, slopes: dict[str, Interval], p: float, between: Between) -> Chain:
    """Return the steps from the input to the flattened outputs, for all samples of ``slopes``.

    Raises ``UnsupportedOperation`` where not even a segment can be bounded.
    """
    sizes: dict[str, tuple[int, ...]] = {}
    while True:
        try:
            return _Builder(graph, slopes, p, between, sizes).build()
        except Narrow as narrow:
            sizes[narrow.origin] = narrow.size


def eager_order(graph: Graph) -> list[Node]:
    """Return the nodes in topological order, affine ones as early as they can be."""
    done, waiting, order = {INPUT}, list(graph.nodes.values()), []
    while waiting:
        ready = [node for node in waiting if all(name in done for name in node.inputs)]
        node = next((node for node in ready if node.rule.affine), ready[0])
        waiting.remove(node)
        done.add(node.name)
        order.append(node)
    return order


class _Builder:
    """Walks the nodes once; ``values`` are those that are alive, in terms of the state, None where still affine."""

    def __init__(
        self, graph: Graph, slopes: dict[str, Interval], p: float, between: Between, sizes: dict[str, tuple[int, ...]]
    ) -> None:
        self.graph, self.slopes, self.p, self.between, self.sizes = graph, slopes, p, between, sizes
        self.samples = max((len(slope.lower) for slope in slopes.values()), default=1)
        self.order = eager_order(graph)
        self.done: set[str] = {INPUT}
        self.steps: list[Step] = []
        self.bridge: tuple[str, str, tuple[object, ...]] | None = None  # end, begin and the state there
        self.values: dict[str, Value | None] = {}
        self.basis = Basis(None, 0, graph.device)
        self._enter(INPUT, graph.input_shape)

    def build(self) -> Chain:
        place, cut, saved = 0, INPUT, self._save()
        while place < len(self.order):
            node = self.order[place]
            try:
                self._visit(node)
            except UnsupportedOperation:
                self._restore(saved)
                place, cut = self._bridge(place, cut)
                saved = self._save()
                continue
            place += 1
            if self._alive() == [node.name] and self.values[node.name] is not None:
                cut, saved = node.name, self._save()
        self._finish()
        return Chain(tuple(self.steps), self.samples)

    def _save(self) -> tuple[object, ...]:
        return (set(self.done), list(self.steps), dict(self.values), self.basis)

    def _restore(self, saved: tuple[object, ...]) -> None:
        self.done, self.steps, self.values, self.basis = saved  # type: ignore[assignment]

    def _alive(self) -> list[str]:
        """The values that some node still has to read; the output always."""
        readers = {name for node in self.order if node.name not in self.done for name in node.inputs}
        return [name for name in self.values if name in readers or name == self.graph.output]

    def _visit(self, node: Node) -> None:
        rule = node.rule
        if isinstance(rule, Affine):
            inputs = [self.values[name] for name in node.inputs]
            self.values[node.name] = through(rule, inputs, node.shape, self.basis)
        elif isinstance(rule, Elementwise):
            self._gate(node)
        elif isinstance(rule, MaxPool):
            self._max_pool(node, rule)
        else:
            raise _unknown(node)
        self.done.add(node.name)
        alive = self._alive()
        self.values = {name: value for name, value in self.values.items() if name in alive or value is not None}

    # Nodes that are not affine: the state moves to what is alive there.

    def _gate(self, node: Node) -> None:
        self.done.add(node.name)  # it reads its input now
        name = node.inputs[0]
        slope = self.slopes[node.name]
        shape = self.graph.shape(name)
        others = [other for other in self._alive() if other != node.name]
        torus = self._move(name, others)
        lower, upper = slope.lower, slope.upper
        if torus is not None:
            lower, upper = lower.flatten(2).amin(2).clamp(max=0), upper.flatten(2).amax(2).clamp(min=0)
        lower, upper = lower.flatten(1), upper.flatten(1)
        flat = lower == upper
        c = torch.where(flat, lower, (lower + upper) / 2)
        self.steps.append(Gate(node.name, c, torch.where(flat, 0, (upper - lower) / 2)))
        self._rename(name, node.name, Value(shape, torus))

    def _move(self, name: str, others: list[str]) -> Torus | None:
        """Make the state (value of ``name``, values of ``others``); return the torus it lives on."""
        values = [self.values[other] for other in (name, *others)]
        known = [value for value in values if value is not None and value.torus is not None]
        neurons = math.prod(self.graph.shape(name))
        small = neurons <= NEURONS and neurons**3 <= WORK and not others
        torus = known[0].torus if len(known) == len(values) and not small else None
        if torus is None:
            self._move_plain([name, *others])
            return None
        if any(value.torus != torus for value in known):
            raise UnsupportedOperation("values of several resolutions are alive", "one resolution")
        self._move_torus(torus, known)
        self._place([name, *others], torus, [value.clean for value in known])
        return torus

    def _place(self, names: list[str], torus: Torus | None, clean: list[bool]) -> None:
        """The values of the state, slot by slot."""
        start, values = 0, {}
        for name, zero in zip(names, clean, strict=True):
            values[name] = Value(self.graph.shape(name), torus, start, clean=zero)
            start += values[name].size
        self.values, self.basis = dict(values), replace(self.basis, torus=torus, width=start)
        self._check_work()

    def _check_work(self) -> None:
        blocks, width = self.basis.blocks, self.basis.width
        if blocks * width**3 > WORK:
            raise UnsupportedOperation(f"a state of {blocks} blocks of size {width}", "smaller layers")

    def _rename(self, name: str, new: str, value: Value) -> None:
        """The gate's output takes the first slot; its input stays only where it was asked for twice."""
        again = [other for other, kept in self.values.items() if other == name and kept is not None and kept.start > 0]
        values = {other: kept for other, kept in self.values.items() if other != name or other in again}
        self.values = {new: value, **values}

    def _move_torus(self, torus: Torus, values: list[Value]) -> None:
        assert self.basis.torus is not None
        stride = tuple(n // m for n, m in zip(self.basis.torus.size, torus.size, strict=True))
        slots = [value.start for value in values if value.matrix is None]
        first = [sum(value.size for value in values[:i]) for i in range(len(values))]
        if self.steps and slots == first and sum(value.size for value in values) == self.basis.width:
            return  # the state is these values already
        blocks = self.basis.blocks
        parts = [matrix_of(self.basis, value) for value in values]
        G = torch.cat([part.expand(blocks, -1, -1) for part, _ in parts], 1)
        error = torch.cat([(part.real * 0 if e is None else e).expand(blocks, -1, -1) for part, e in parts], 1)
        self._emit(G, error)
        if max(stride) > 1:
            self.steps.append(Fold(*(part.to(self.graph.device) for part in self.basis.torus.aliases(stride))))

    def _emit(self, G: Tensor, error: Tensor | None) -> None:
        """Append the linear map; the first one starts the chain."""
        if self.steps:
            self.steps.append(Mix(G, error))
        else:
            places = 0 if self.p == 2 else (1 if self.basis.torus is None else self.basis.torus.places)
            self.steps.append(Source(G, error, places, self.samples))

    def _emit_itself(self) -> Tensor:
        """Start the chain with the state as it is; return the identity."""
        eye = torch.eye(self.basis.width, dtype=self.basis.dtype, device=self.graph.device)
        eye = eye.expand(self.basis.blocks, -1, -1)
        self._emit(eye, None)
        return eye

    def _move_plain(self, names: list[str]) -> None:
        """Pull the rows of all these values back to the state."""
        if sum(math.prod(self.graph.shape(name)) for name in names) ** 3 > WORK:
            raise UnsupportedOperation("a large layer", f"at most {int(WORK ** (1 / 3))} neurons")
        parts = [self._rows(name) for name in names]
        G, error = (torch.cat([part[i] for part in parts], 1) for i in range(2))
        if self.basis.torus is None:
            self._emit(G, error)
        else:
            if not self.steps:
                self._emit_itself()
            self.steps.append(Readout(G, error, self.basis.torus.weights.to(self.graph.device)))
        self._place(names, None, [True] * len(names))

    def _rows(self, name: str) -> tuple[Tensor, Tensor]:
        """The value of ``name`` [blocks, outputs, width] in terms of the state, by rows pulled back; and the error."""
        shape = self.graph.shape(name)
        size = math.prod(shape)
        eye = torch.eye(size, dtype=torch.float64, device=self.graph.device).view(size, *shape)
        pending: dict[str, tuple[Tensor, Tensor]] = {name: (eye, torch.zeros_like(eye))}
        found: list[tuple[Tensor, Tensor]] = []
        for node in (*reversed(self.order), None):
            source = INPUT if node is None else node.name
            if source not in pending:
                continue
            rows, error = pending.pop(source)
            value = self.values.get(source)
            if value is not None and value.matrix is None:  # a slot; its grid ends where the map does
                found.append(self._on_state(value, rows, error))
                continue
            if node is None or not isinstance(node.rule, Affine):
                raise UnsupportedOperation(f"the value of {source!r} is gone", "one that is alive")
            for parent, part in zip(node.inputs, pulled_back(self.graph, node, rows, error), strict=True):
                old = pending.get(parent)
                if old is not None:
                    total = old[0] + part[0]
                    part = total, old[1] + part[1] + total.abs() * FEW
                pending[parent] = part
        G, noise = found[0]
        for more, extra in found[1:]:
            G = G + more
            noise = noise + extra + G.abs() * FEW
        return G, noise

    def _on_state(self, value: Value, rows: Tensor, error: Tensor) -> tuple[Tensor, Tensor]:
        if value.torus is None:
            padding = (value.start, self.basis.width - value.start - value.size)
            return tuple(torch.nn.functional.pad(part.flatten(1)[None], padding) for part in (rows, error))  # type: ignore[return-value]
        assert self.basis.torus is not None
        blocks, noise = value.torus.rows(rows, self.basis.torus.frequencies)
        spread = error.flatten(2).sum(2)[None] / math.sqrt(math.prod(value.torus.size)) * (1 + 2.0**-30)
        return on_value(self.basis, blocks, noise + spread, value)

    def _max_pool(self, node: Node, rule: MaxPool) -> None:
        """|max a - max b|^2 <= sum |a - b|^2 over the window, a multiplier per window (per channel if they overlap)."""
        self.done.add(node.name)
        if others := [name for name in self._alive() if name != node.name]:
            raise UnsupportedOperation(f"{others} alive beside a max-pool", "a max-pool that all values pass")
        torus = self._move(node.inputs[0], [])
        windows = rule.windows.to(self.graph.device)
        count = windows[windows >= 0].bincount(minlength=math.prod(rule.input_shape))
        channels = rule.input_shape[0]
        group = torch.arange(channels, device=windows.device)
        gain = count.max().double().sqrt() * (1 + FEW)
        if torus is None and int(count.max()) == 1 and int(count.min()) == 1:
            inside = torch.arange(len(windows), device=windows.device)[:, None].expand_as(windows)[windows >= 0]
            group = torch.empty_like(count).index_put((windows[windows >= 0],), inside)
            fresh = torch.arange(len(windows), device=windows.device)
        else:
            group = group if torus is not None else group.repeat_interleave(math.prod(rule.input_shape[1:]))
            fresh = torch.arange(channels, device=windows.device)
        self._renew(node.name, gain.expand(self.samples), group, fresh)

    def _renew(self, name: str, gain: Tensor, group: Tensor, fresh: Tensor) -> None:
        """The state becomes fresh values of ``name``; ``fresh`` are multipliers per channel, window, or one for all."""
        shape = self.graph.shape(name)
        self._enter(name, shape)
        if self.basis.torus is None and len(fresh) < self.basis.width:
            fresh = fresh.repeat_interleave(self.basis.width // len(fresh))
        elif len(fresh) < self.basis.width:
            fresh = fresh.expand(self.basis.width)
        elif len(fresh) > self.basis.width:  # windows, but the new values go by channel
            raise UnsupportedOperation(f"windows of {name!r} on a torus", "a multiplier per channel")
        self.steps.append(Renew(name, gain, group, fresh, self.basis.blocks, self.basis.torus is not None))

    def _enter(self, name: str, shape: tuple[int, ...]) -> None:
        """Begin a state that is the value of ``name``: plain if small or without a map, else on a torus."""
        spatial = len(shape) > 1 and any(isinstance(node.rule, Conv) for node in self.order)
        if not spatial or (math.prod(shape) <= NEURONS and name != INPUT):
            self.basis = Basis(None, math.prod(shape), self.graph.device)
        else:
            size = self.sizes.get(name, tuple(shape[1:]))
            self.basis = Basis(Torus(tuple(shape[1:]), size), shape[0], self.graph.device, name, size)
        self.values = {name: Value(shape, self.basis.torus)}

    def _bridge(self, failed: int, cut: str) -> tuple[int, str]:
        """Bound the part between ``cut`` and the next place where one value is alive by its product; go on behind.

        Bridges that follow each other are one.
        """
        place = self._next_cut(failed)
        node = self.order[place]
        if self.bridge is not None and self.bridge[0] == cut:
            _, cut, saved = self.bridge
            self._restore(saved)
        saved, gain = self._save(), self.between(cut, node.name)
        if not self.steps:
            self._begin_behind(node, gain)
        else:
            if not self._is_slot(cut):
                self._move(cut, [])
            width, one = self.basis.width, torch.zeros(1, dtype=torch.long, device=self.graph.device)
            self._renew(node.name, gain, one.expand(width), one)
        self.done |= {earlier.name for earlier in self.order[: place + 1]}
        self.bridge = node.name, cut, saved
        return place + 1, node.name

    def _is_slot(self, name: str) -> bool:
        """Whether the state is the value of ``name`` and nothing else."""
        value = self.values.get(name)
        return value is not None and value.matrix is None and value.size == self.basis.width

    def _begin_behind(self, node: Node, gain: Tensor) -> None:
        """Start the chain with a ball: all that is known of the first segment."""
        if self.p != 2:
            raise UnsupportedOperation(f"{node.name!r} in the first segment, for the linf norm", "method='product'")
        self._enter(node.name, node.shape)
        eye = self._emit_itself()
        self.steps.append(Mix(eye * gain[:, None, None, None]))

    def _next_cut(self, place: int) -> int:
        """The first place at or after ``place`` behind which its node alone is alive."""
        for i in range(place, len(self.order)):
            done = {INPUT, *(node.name for node in self.order[: i + 1])}
            readers = {name for node in self.order[i + 1 :] for name in node.inputs if name in done}
            if readers <= {self.order[i].name}:
                return i
        return len(self.order) - 1

    def _finish(self) -> None:
        self._move_plain([self.graph.output])


def _unknown(node: Node) -> UnsupportedOperation:
    return UnsupportedOperation(
        f"no Lipschitz recursion for {node.kind} at {node.name!r}", "affine nodes, activations and max-pools"
    )
