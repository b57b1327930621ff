"""Naive truths: points of a set, float evaluations of a network in many orders, exact bounds of small networks."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator

import numpy as np
import torch
from scipy.optimize import linprog
from torch import Tensor, nn

import certify
from certify.graph import INPUT, Graph, trace
from certify.ops.arithmetic import Scale
from certify.ops.base import Affine
from certify.ops.pool import Average
from certify.ops.shape import Concat, Select


def points(domain: certify.PerturbationSet, generator: torch.Generator, count: int = 8) -> Iterator[Tensor]:
    """Yield points of the set: the centre, corners, faces, random ones, and the float neighbours of corners."""
    hull, shape = domain.interval(), domain.center.shape
    yield domain.center
    for _ in range(count):
        a = torch.randn(shape, dtype=torch.float64, generator=generator).to(domain.center)
        corner = domain.steepest(a)
        yield corner
        yield domain.project(torch.nextafter(corner, domain.center))
        yield domain.project(torch.nextafter(corner, torch.where(a > 0, hull.upper, hull.lower)))
        axis = torch.rand(shape, dtype=torch.float64, generator=generator) < 0.3  # a face: few coordinates at an end
        yield domain.project(torch.where(axis, corner, domain.center))
    yield from domain.sample(count, generator)


def attacked(model: nn.Module, domain: certify.PerturbationSet, generator: torch.Generator) -> Iterator[Tensor]:
    """Yield the points that push every output up and down: signed gradient steps to the set's own extremes."""
    outputs = int(model(domain.center).shape[1])
    for output, sign in itertools.product(range(outputs), (1.0, -1.0)):
        x = domain.sample(1, generator)[0] if output % 2 else domain.center
        for step in range(3):
            x = x.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(sign * model(x)[:, output].sum(), x)
            best = domain.steepest(gradient)
            x = best if step == 0 else domain.project((x.detach() + best) / 2)
            yield x


def float_outputs(model: nn.Module, x: Tensor) -> Iterator[Tensor]:
    """Yield the outputs as torch computes them: other batch sizes, thread counts, memory formats, column orders."""
    with torch.no_grad():
        yield model(x)
        yield torch.cat([model(sample) for sample in x.split(1)])
        yield model(torch.cat([x, x.flip(0), x]))[: len(x)]
        if x.ndim == 4:
            yield copy.deepcopy(model).to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last))
        threads = torch.get_num_threads()
        try:
            torch.set_num_threads(1 if threads > 1 else 2)
            yield model(x)
        finally:
            torch.set_num_threads(threads)
        if isinstance(model, nn.Sequential):
            yield _with_permuted_columns(model)(x)


def _with_permuted_columns(model: nn.Sequential) -> nn.Sequential:
    """The same network with every dense layer's sum in another order."""

    class Permuted(nn.Module):
        def __init__(self, layer: nn.Linear) -> None:
            super().__init__()
            order = torch.randperm(layer.in_features, generator=torch.Generator().manual_seed(1))
            self.order, self.weight, self.bias = order, layer.weight[:, order].contiguous(), layer.bias

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.linear(x[..., self.order].contiguous(), self.weight, self.bias)

    return nn.Sequential(*(Permuted(layer) if isinstance(layer, nn.Linear) else layer for layer in model))


class AnyOrder:
    """Evaluates a graph with every affine sum one product at a time, in a random order, with or without FMA."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.matrices = {node.name: _matrix(node.rule) for node in graph.nodes.values() if _is_sum(node.rule)}

    def __call__(self, x: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        values = {INPUT: x}
        with torch.no_grad():
            for node in self.graph.nodes.values():
                inputs = [values[name] for name in node.inputs]
                if node.name in self.matrices:
                    bias = node.rule.bias
                    flat = None if bias is None else bias.expand(node.shape).reshape(-1)
                    y = _sum_in_order(self.matrices[node.name], inputs[0].flatten(1), flat, generator)
                    values[node.name] = y.view(len(x), *node.shape)
                else:
                    values[node.name] = node.rule.forward(*inputs)
        return values


def _is_sum(rule: object) -> bool:
    return isinstance(rule, Affine) and not isinstance(rule, (Scale, Average, Select, Concat)) and rule.fan_out != 1


def _matrix(rule: Affine) -> Tensor:
    """The dense matrix [outputs, inputs]: every entry is one weight or 0."""
    (shape,) = rule.input_shapes or ((rule.fan_in,),)
    zero = torch.zeros(1, *shape, dtype=rule.weight.dtype)
    eye = torch.eye(zero.numel(), dtype=zero.dtype).view(-1, *shape)
    return rule.linear(eye).flatten(1).T


def _sum_in_order(W: Tensor, x: Tensor, bias: Tensor | None, generator: torch.Generator) -> Tensor:
    """Sum the products of every output one by one, in an order of its own; the bias comes first or last."""
    last = bool(torch.rand((), generator=generator) < 0.5)
    fused = bool(torch.rand((), generator=generator) < 0.5)
    order = torch.rand(W.shape, generator=generator).argsort(1)
    if bool(torch.rand((), generator=generator) < 0.4):  # the worst order: all positive products, then all negative
        order = (W * x[0]).argsort(1)
    W, x = W.gather(1, order), x[:, order]  # x is [batch, outputs, terms]
    total = x.new_zeros(x.shape[:2]) if last or bias is None else bias.expand(x.shape[:2]).clone()
    for k in range(W.shape[1]):
        if fused:
            total = (total.double() + W[:, k].double() * x[..., k].double()).to(x.dtype)
        else:
            total = total + W[:, k] * x[..., k]
    return total + bias if last and bias is not None else total


def module_values(model: nn.Module, x: Tensor, graph: Graph) -> dict[str, Tensor]:
    """Return what the model's own modules compute, by node name, seen through hooks that are removed again.

    Modules whose calls are not all nodes (some may be dead code) are left out.
    """
    seen: dict[str, list[Tensor]] = {path: [] for path, _ in model.named_modules() if path}
    modules = dict(model.named_modules())
    handles = [
        modules[path].register_forward_hook(lambda _, __, output, calls=calls: calls.append(output.detach().clone()))
        for path, calls in seen.items()
    ]
    try:
        with torch.no_grad():
            model(x)
    finally:
        for handle in handles:
            handle.remove()
    values = {}
    for path, calls in seen.items():
        names = [path, *(f"{path}@{use}" for use in range(2, len(calls) + 1))]
        if len(calls) == sum(name.split("@")[0] == path for name in graph.nodes):
            values.update(zip(names, calls, strict=True) if calls else ())
    return {name: value for name, value in values.items() if name in graph.nodes}


def graph_of(model: nn.Module, domain: certify.PerturbationSet) -> Graph:
    """The traced model."""
    return trace(model, domain.center)


def triangle_lp(layers: list[tuple[np.ndarray, np.ndarray]], box: tuple[np.ndarray, np.ndarray],
                cost: np.ndarray) -> float:  # fmt: skip
    """min <cost, y> of a ReLU network's planet relaxation, each neuron's interval by the same linear program.

    ``layers`` are (W, b), a ReLU after all but the last; the box is (lower, upper).
    """
    size = len(box[0])
    rows: list[np.ndarray] = []
    limits: list[float] = []
    bounds: list[tuple[float, float]] = list(zip(*box, strict=True))
    inputs = np.arange(size)  # variables that hold the current layer's inputs
    for W, b in layers[:-1]:
        outputs = np.arange(len(bounds), len(bounds) + len(W))
        ends = [(_solve(W[i], inputs, rows, limits, bounds) + b[i], -_solve(-W[i], inputs, rows, limits, bounds) + b[i])
                for i in range(len(W))]  # fmt: skip
        rows = [np.concatenate([row, np.zeros(len(W))]) for row in rows]
        bounds = bounds + [(0.0, max(high, 0.0)) for _, high in ends]
        for i, (low, high) in enumerate(ends):
            z = np.zeros(len(bounds))
            z[inputs] = W[i]
            y = np.zeros(len(bounds))
            y[outputs[i]] = 1
            if low >= 0:
                pieces = [(z - y, -b[i]), (y - z, b[i])]
            elif high <= 0:
                pieces = [(y, 0.0)]
            else:
                slope = high / (high - low)
                pieces = [(z - y, -b[i]), (y - slope * z, slope * (b[i] - low))]
            for row, limit in pieces:
                rows.append(row)
                limits.append(limit)
        inputs = outputs
    W, b = layers[-1]
    return _solve(cost @ W, inputs, rows, limits, bounds) + float(cost @ b)


def _solve(cost: np.ndarray, where: np.ndarray, rows: list[np.ndarray], limits: list[float],
           bounds: list[tuple[float, float]]) -> float:  # fmt: skip
    full = np.zeros(len(bounds))
    full[where] = cost
    found = linprog(full, A_ub=np.array(rows) if rows else None, b_ub=limits or None, bounds=bounds, method="highs")
    assert found.success, found.message
    return float(found.fun)


def exact_minimum(W1: np.ndarray, b1: np.ndarray, cost: np.ndarray, box: tuple[np.ndarray, np.ndarray]) -> float:
    """min <cost, relu(W1 x + b1)> over a box, by one linear program per activation pattern."""
    best = np.inf
    for pattern in itertools.product((0, 1), repeat=len(W1)):
        active = np.array(pattern, dtype=bool)
        A = np.concatenate([-W1[active], W1[~active]])
        limits = np.concatenate([b1[active], -b1[~active]])
        found = linprog((cost * active) @ W1, A_ub=A, b_ub=limits, bounds=list(zip(*box, strict=True)))
        if found.success:
            best = min(best, float(found.fun + (cost * active) @ b1))
    return best
