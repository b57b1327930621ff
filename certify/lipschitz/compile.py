"""From a graph to a ``Chain``: which values are alive at every activation, and what they are of the state.

Small layers keep a multiplier per neuron; the affine maps before them are rows pulled back to the state, so no layer
becomes a matrix of pixels by pixels. Large maps live on a torus (fourier.py) with a multiplier per channel. What
neither can express ends its segment: between two places where one value alone is alive, ||du|| <= product bound ||dv||.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float64, Num
from torch import Tensor

from certify.enclosures import Interval
from certify.errors import UnsupportedOperation
from certify.graph import INPUT, Graph, Node
from certify.lipschitz.chain import Chain
from certify.lipschitz.fourier import Torus
from certify.lipschitz.hermitian import FEW
from certify.lipschitz.slopes import pulled_back
from certify.lipschitz.steps import Fold, Gate, Mix, Readout, Renew, Source, Step
from certify.ops.arithmetic import Scale, Sum
from certify.ops.base import Affine, Elementwise
from certify.ops.conv import Conv
from certify.ops.pool import Average, MaxPool
from certify.ops.shape import Concat, Select
from certify.rounding import gamma

NEURONS = 256  # of a layer with a multiplier for each; beyond, maps go by frequency
WORK = 2e9  # blocks times size^3 of a state that is still worth it

#: An upper bound [samples] of the l2 constant between two nodes.
Between = Callable[[str, str], Float64[Tensor, "samples"]]


@dataclass(frozen=True, eq=False)
class _Value:
    """A node's value in terms of the state: a slot of it, or ``matrix`` times it at every frequency."""

    shape: tuple[int, ...]
    torus: Torus | None = None
    start: int = 0
    matrix: Num[Tensor, "blocks m k"] | None = None
    error: Tensor | None = None
    clean: bool = True  # on a torus: zero outside the grid

    @property
    def size(self) -> int:
        """Entries of the state that the value needs: neurons, or channels."""
        return math.prod(self.shape) if self.torus is None else self.shape[0]


class _Wider(Exception):
    """The torus that begins at ``origin`` needs these sizes."""

    def __init__(self, origin: str, size: tuple[int, ...]) -> None:
        self.origin, self.size = origin, size


def compile_chain(graph: Graph, slopes: dict[str, Interval], p: float, between: Between) -> Chain:
    """Return the steps from the input to the flattened outputs, for all samples of ``slopes``.

    Raises ``UnsupportedOperation`` where not even a segment can be bounded.
    """
    sizes: dict[str, tuple[int, ...]] = {}
    while True:
        try:
            return _Builder(graph, slopes, p, between, sizes).build()
        except _Wider as wider:
            sizes[wider.origin] = wider.size


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
        self.origin, self.base = INPUT, graph.input_shape  # where the torus of the state begins, and its sizes there
        self.values: dict[str, _Value | None] = {}
        self.torus: Torus | None = None
        self.width = 0
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
        return (set(self.done), list(self.steps), self.origin, self.base, dict(self.values), self.torus, self.width)

    def _restore(self, saved: tuple[object, ...]) -> None:
        self.done, self.steps, self.origin, self.base, self.values, self.torus, self.width = saved  # type: ignore[assignment]

    def _alive(self) -> list[str]:
        """The values that some node still has to read; the output always."""
        readers = {name for node in self.order if node.name not in self.done for name in node.inputs}
        return [name for name in self.values if name in readers or name == self.graph.output]

    def _visit(self, node: Node) -> None:
        rule = node.rule
        if isinstance(rule, Affine):
            self.values[node.name] = self._affine(node, rule)
        elif isinstance(rule, Elementwise):
            self._gate(node)
        elif isinstance(rule, MaxPool):
            self._max_pool(node, rule)
        else:
            raise _unknown(node)
        self.done.add(node.name)
        alive = self._alive()
        self.values = {name: value for name, value in self.values.items() if name in alive or value is not None}

    # Affine maps on a torus; elsewhere they wait until rows are pulled back through them.

    def _affine(self, node: Node, rule: Affine) -> _Value | None:
        inputs = [self.values[name] for name in node.inputs]
        known = [value for value in inputs if value is not None and value.torus is not None]
        if len(known) < len(inputs) or len({value.torus for value in known}) > 1:
            return None
        value = known[0]
        if isinstance(rule, Conv):
            return self._convolved(
                value, node.shape, rule.weight, rule.stride, rule.padding, rule.dilation, rule.groups
            )
        if isinstance(rule, Average) and rule.window is not None:
            kernel, stride, padding = rule.window
            one = torch.full((value.size, 1, *kernel), 1 / math.prod(kernel), dtype=torch.float64)
            return self._convolved(value, node.shape, one, stride, padding, (1,) * len(kernel), value.size)
        if isinstance(rule, Scale):
            return self._scaled(value, rule.scale)
        if isinstance(rule, Sum):
            return self._added(known, node.shape, rule.sign)
        if isinstance(rule, Concat) and rule.dim == 1:
            return self._joined(known, node.shape)
        if isinstance(rule, Select) and rule.index is None and node.shape == value.shape:
            return value
        if isinstance(rule, Select):
            return self._moved(value, rule)
        return None

    def _convolved(
        self, value: _Value, shape: tuple[int, ...], weight: Tensor, stride: tuple[int, ...],
        padding: tuple[int, ...], dilation: tuple[int, ...], groups: int,
    ) -> _Value | None:  # fmt: skip
        torus = value.torus
        assert torus is not None
        assert self.torus is not None
        kernel = weight.shape[2:]
        if len(kernel) != len(torus.grid):
            return None
        geometry = list(zip(torus.grid, torus.size, shape[1:], kernel, stride, padding, dilation, strict=True))
        after = [s * (m - 1) - p + d * (k - 1) - (n - 1) for n, _, m, k, s, p, d in geometry]
        if not value.clean and (max(after) > 0 or max(padding) > 0):
            return None
        needed = [max(n + max(p, a, 0), s * m) for (n, _, m, _, s, p, _), a in zip(geometry, after, strict=True)]
        if any(have < want or have % s for (_, have, _, _, s, _, _), want in zip(geometry, needed, strict=True)):
            self._widen(torus, needed, stride)
        blocks, error = torus.transfer(_dense_groups(weight, groups), self.torus.frequencies, padding, dilation)
        root = math.sqrt(math.prod(stride))
        coarse = Torus(tuple(shape[1:]), tuple(n // s for n, s in zip(torus.size, stride, strict=True)))
        matrix, noise = self._times(blocks / root, error / root * (1 + FEW) + blocks.abs() * FEW, value)
        return _Value(shape, coarse, 0, matrix, noise, clean=False)

    def _widen(self, torus: Torus, needed: list[int], stride: tuple[int, ...]) -> None:
        """Begin again with a torus that is wide enough here and divisible by all strides up to here."""
        size = []
        for base, have, want, s in zip(self.base, torus.size, needed, stride, strict=True):
            unit = base // have * s
            size.append(-(-max(base, want * base // have) // unit) * unit)
        raise _Wider(self.origin, tuple(size))

    def _times(self, blocks: Tensor, error: Tensor, value: _Value) -> tuple[Tensor, Tensor]:
        """(blocks +- error) times the value, with its error."""
        if value.matrix is None:
            before = (0, 0) if value.start == 0 and value.size == self.width else (
                value.start, self.width - value.start - value.size)  # fmt: skip
            return torch.nn.functional.pad(blocks, before), torch.nn.functional.pad(error, before)
        magnitude = value.matrix.abs()
        noise = blocks.abs() @ magnitude * gamma(8 * blocks.shape[2] + 16, torch.float64)
        if value.error is None:
            return blocks @ value.matrix, noise + error @ magnitude
        return blocks @ value.matrix, noise + error @ (magnitude + value.error) + blocks.abs() @ value.error

    def _scaled(self, value: _Value, scale: Tensor) -> _Value | None:
        channels = value.shape[0]
        if scale.ndim == len(value.shape) and scale[0].numel() == 1:
            factor = scale.flatten().expand(channels)
        elif scale.numel() == 1:
            factor = scale.reshape(1).expand(channels)
        else:
            return None
        matrix, error = self._matrix(value)
        scaled = matrix * factor[:, None]
        noise = scaled.abs() * FEW
        noise = noise if error is None else noise + error * factor.abs()[:, None] * (1 + FEW)
        return _Value(value.shape, value.torus, 0, scaled, noise, value.clean)

    def _added(self, values: list[_Value], shape: tuple[int, ...], sign: float) -> _Value:
        (first, e), (second, f) = (self._matrix(value) for value in values)
        matrix = first + sign * second
        noise = matrix.abs() * FEW
        for error in (e, f):
            noise = noise if error is None else noise + error
        return _Value(shape, values[0].torus, 0, matrix, noise, all(value.clean for value in values))

    def _joined(self, values: list[_Value], shape: tuple[int, ...]) -> _Value:
        parts = [self._matrix(value) for value in values]
        blocks = max(len(part) for part, _ in parts)
        matrix = torch.cat([part.expand(blocks, -1, -1) for part, _ in parts], 1)
        noise = torch.cat(
            [
                (torch.zeros_like(part.real) if error is None else error.expand_as(part)).expand(blocks, -1, -1)
                for part, error in parts
            ],
            1,
        )
        return _Value(shape, values[0].torus, 0, matrix, noise, all(value.clean for value in values))

    def _moved(self, value: _Value, rule: Select) -> _Value | None:
        """Channels picked or added, places picked with a stride: a convolution with 1 x 1 kernels."""
        picked = _as_pick(rule)
        if picked is None:
            return None
        source, stride = picked
        weight = torch.zeros(len(source), value.size, dtype=torch.float64)
        used = source >= 0
        weight[used.nonzero()[:, 0], source[used]] = 1
        ones = (1,) * len(stride)
        kernel = weight.view(*weight.shape, *ones)
        return self._convolved(value, rule.output_shape, kernel, stride, (0,) * len(stride), ones, 1)

    def _matrix(self, value: _Value) -> tuple[Tensor, Tensor | None]:
        """The value's matrix on the state [blocks or 1, size, width] with its error."""
        if value.matrix is not None:
            return value.matrix, value.error
        eye = torch.eye(self.width, dtype=torch.float64, device=self.graph.device)
        return eye[None, value.start : value.start + value.size].to(torch.complex128), None

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
        self._rename(name, node.name, _Value(shape, torus))

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
            values[name] = _Value(self.graph.shape(name), torus, start, clean=zero)
            start += values[name].size
        self.values, self.torus, self.width = dict(values), torus, start
        self._check_work()

    def _check_work(self) -> None:
        blocks = 1 if self.torus is None else len(self.torus.frequencies)
        if blocks * self.width**3 > WORK:
            raise UnsupportedOperation(f"a state of {blocks} blocks of size {self.width}", "smaller layers")

    def _rename(self, name: str, new: str, value: _Value) -> None:
        """The gate's output takes the first slot; its input stays only where it was asked for twice."""
        again = [other for other, kept in self.values.items() if other == name and kept is not None and kept.start > 0]
        values = {other: kept for other, kept in self.values.items() if other != name or other in again}
        self.values = {new: value, **values}

    def _move_torus(self, torus: Torus, values: list[_Value]) -> None:
        assert self.torus is not None
        stride = tuple(n // m for n, m in zip(self.torus.size, torus.size, strict=True))
        slots = [value.start for value in values if value.matrix is None]
        first = [sum(value.size for value in values[:i]) for i in range(len(values))]
        if self.steps and slots == first and sum(value.size for value in values) == self.width:
            return  # the state is these values already
        blocks = len(self.torus.frequencies)
        parts = [self._matrix(value) for value in values]
        G = torch.cat([part.expand(blocks, -1, -1) for part, _ in parts], 1)
        error = torch.cat([(part.real * 0 if e is None else e).expand(blocks, -1, -1) for part, e in parts], 1)
        self._emit(G, error)
        if max(stride) > 1:
            self.steps.append(Fold(*self.torus.aliases(stride)))

    def _emit(self, G: Tensor, error: Tensor | None) -> None:
        """Append the linear map; the first one starts the chain."""
        if self.steps:
            self.steps.append(Mix(G, error))
        else:
            places = 0 if self.p == 2 else (1 if self.torus is None else self.torus.places)
            self.steps.append(Source(G, error, places, self.samples))

    def _move_plain(self, names: list[str]) -> None:
        """Pull the rows of all these values back to the state."""
        if sum(math.prod(self.graph.shape(name)) for name in names) ** 3 > WORK:
            raise UnsupportedOperation("a large layer", f"at most {int(WORK ** (1 / 3))} neurons")
        parts = [self._rows(name) for name in names]
        G, error = (torch.cat([part[i] for part in parts], 1) for i in range(2))
        if self.torus is None:
            self._emit(G, error)
        else:
            if not self.steps:
                blocks = len(self.torus.frequencies)
                eye = torch.eye(self.width, dtype=torch.complex128, device=self.graph.device)
                self._emit(eye.expand(blocks, -1, -1), None)
            self.steps.append(Readout(G, error, self.torus.weights))
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

    def _on_state(self, value: _Value, rows: Tensor, error: Tensor) -> tuple[Tensor, Tensor]:
        if value.torus is None:
            padding = (value.start, self.width - value.start - value.size)
            return tuple(torch.nn.functional.pad(part.flatten(1)[None], padding) for part in (rows, error))  # type: ignore[return-value]
        assert self.torus is not None
        blocks, noise = value.torus.rows(rows, self.torus.frequencies)
        spread = error.flatten(2).sum(2)[None] / math.sqrt(math.prod(value.torus.size)) * (1 + 2.0**-30)
        return self._times(blocks, noise + spread, value)

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
        gain = math.sqrt(float(count.max())) * (1 + FEW)
        if torus is None and int(count.max()) == 1 and int(count.min()) == 1:
            inside = torch.arange(len(windows), device=windows.device)[:, None].expand_as(windows)[windows >= 0]
            group = torch.empty_like(count).index_put((windows[windows >= 0],), inside)
            fresh = torch.arange(len(windows), device=windows.device)
        else:
            group = group if torus is not None else group.repeat_interleave(math.prod(rule.input_shape[1:]))
            fresh = torch.arange(channels, device=windows.device)
        self._renew(node.name, torch.full((self.samples,), gain, dtype=torch.float64), group, fresh)

    def _renew(self, name: str, gain: Tensor, group: Tensor, fresh: Tensor) -> None:
        """The state becomes fresh values of ``name``; ``fresh`` are multipliers per channel, window, or one for all."""
        shape = self.graph.shape(name)
        self._enter(name, shape)
        if self.torus is None and len(fresh) < self.width:
            fresh = fresh.repeat_interleave(self.width // len(fresh))
        elif len(fresh) < self.width:
            fresh = fresh.expand(self.width)
        elif len(fresh) > self.width:  # windows, but the new values go by channel
            raise UnsupportedOperation(f"windows of {name!r} on a torus", "a multiplier per channel")
        blocks = 1 if self.torus is None else len(self.torus.frequencies)
        self.steps.append(Renew(name, gain, group, fresh, blocks, self.torus is not None))

    def _enter(self, name: str, shape: tuple[int, ...]) -> None:
        """Begin a state that is the value of ``name``: plain if small or without a map, else on a torus."""
        spatial = len(shape) > 1 and any(isinstance(node.rule, Conv) for node in self.order)
        if not spatial or (math.prod(shape) <= NEURONS and name != INPUT):
            self.torus, self.width = None, math.prod(shape)
        else:
            self.torus, self.width = Torus(tuple(shape[1:]), self.sizes.get(name, tuple(shape[1:]))), shape[0]
            self.origin, self.base = name, self.torus.size
        self.values = {name: _Value(shape, self.torus)}

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
            width, one = self.width, torch.zeros(1, dtype=torch.long, device=self.graph.device)
            self._renew(node.name, gain, one.expand(width), one)
        self.done |= {earlier.name for earlier in self.order[: place + 1]}
        self.bridge = node.name, cut, saved
        return place + 1, node.name

    def _is_slot(self, name: str) -> bool:
        """Whether the state is the value of ``name`` and nothing else."""
        value = self.values.get(name)
        return value is not None and value.matrix is None and value.size == self.width

    def _begin_behind(self, node: Node, gain: Tensor) -> None:
        """Start the chain with a ball: all that is known of the first segment."""
        if self.p != 2:
            raise UnsupportedOperation(f"{node.name!r} in the first segment, for the linf norm", "method='product'")
        self._enter(node.name, node.shape)
        dtype = torch.float64 if self.torus is None else torch.complex128
        blocks = 1 if self.torus is None else len(self.torus.frequencies)
        eye = torch.eye(self.width, dtype=dtype, device=self.graph.device).expand(blocks, -1, -1)
        self._emit(eye, None)
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


def _dense_groups(weight: Tensor, groups: int) -> Tensor:
    """The kernel [out, in, *kernel] of a grouped convolution as that of a plain one."""
    if groups == 1:
        return weight
    out, each = weight.shape[0] // groups, weight.shape[1]
    full = weight.new_zeros(weight.shape[0], each * groups, *weight.shape[2:])
    for g in range(groups):
        full[g * out : (g + 1) * out, g * each : (g + 1) * each] = weight[g * out : (g + 1) * out]
    return full


def _as_pick(rule: Select) -> tuple[Tensor, tuple[int, ...]] | None:
    """(source channel per output channel, -1 for none; stride) if that is all that the rule does, else None."""
    (before,), after = rule.input_shapes, rule.output_shape
    if rule.index is None or rule.fill != 0 or len(before) != len(after) or len(before) < 2:
        return None
    index, places = rule.index.view(after[0], -1), math.prod(before[1:])
    stride = tuple(-(-n // m) for n, m in zip(before[1:], after[1:], strict=True))
    grid = torch.zeros(1, dtype=torch.long, device=index.device)
    for n, m, s in zip(before[1:], after[1:], stride, strict=True):
        if s * (m - 1) >= n:
            return None
        grid = (grid[:, None] * n + torch.arange(m, device=index.device) * s).flatten()
    source = torch.where(index[:, 0] < 0, -1, index[:, 0] // places)
    expected = torch.where(source[:, None] < 0, -1, source[:, None] * places + grid)
    return (source, stride) if torch.equal(index, expected) else None


def _unknown(node: Node) -> UnsupportedOperation:
    return UnsupportedOperation(
        f"no Lipschitz recursion for {node.kind} at {node.name!r}", "affine nodes, activations and max-pools"
    )
