"""Activations that auto-lirpa does not know, answered by our facts: the lines are ours, the propagation is its own.

Its bounds of a network of KAFs therefore check our propagation; ``certify.testing`` checks the facts.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from certify.activations.base import Activation
from certify.enclosures import Interval
from certify.graph import trace
from certify.ops.base import Elementwise
from certify.registry import ACTIVATIONS
from certify.symbolic import registered

#: The activation modules that auto-lirpa 0.3 bounds with relaxations of its own.
KNOWN = (nn.ReLU, nn.LeakyReLU, nn.Sigmoid, nn.Tanh)

#: The operation that stands for all others in its graph; the attribute ``number`` says which facts.
OPERATION = "custom::Facts"


def with_stand_ins(model: nn.Module, example: Tensor) -> tuple[nn.Module, list[Activation]]:
    """Put a stand-in in the place of every registered activation module beyond ``KNOWN``; return the facts they name.

    Changes ``model``. Facts are those of the traced graph, one per module and input shape.
    """
    table: list[Activation] = []
    stand_ins = {module: _StandIn(table) for module in model.modules() if _unknown(module)}
    if not stand_ins:
        return model, table
    modules = dict(model.named_modules(remove_duplicate=False))
    for node in trace(model, example).nodes.values():
        module = modules.get(node.name.partition("@")[0])  # later uses of a module are act@2, act@3
        if module in stand_ins and isinstance(node.rule, Elementwise) and node.kind == type(module).__name__:
            stand_ins[module].numbers[node.shape] = len(table)
            table.append(node.rule.facts)
    for path, module in modules.items():
        if module in stand_ins and stand_ins[module].numbers:  # the base of a KAF has no node of its own
            model.set_submodule(path, stand_ins[module])
    return model, table


def bound_class(base: type, table: list[Activation]) -> type:
    """Return the class, derived from auto-lirpa's ``BoundActivation``, that bounds ``OPERATION`` with our facts."""

    class BoundFacts(base):
        def __init__(self, attr: dict[str, Any], *others: Any) -> None:
            super().__init__(attr, *others)
            self.facts = table[attr["number"]]

        def forward(self, x: Tensor) -> Tensor:
            return self.facts.forward(x)

        def interval_propagate(self, z: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
            y = self.facts.range(Interval(z[0], z[1]))
            return y.lower, y.upper

        def bound_relax(self, x: Any) -> None:
            r = self.facts.relax(Interval(x.lower, x.upper))
            self.lw, self.lb, self.uw, self.ub = r.lower_slope, r.lower_offset, r.upper_slope, r.upper_offset

    return BoundFacts


class _Applied(torch.autograd.Function):
    """f(x) as one node of the exported graph."""

    @staticmethod
    def forward(_: Any, x: Tensor, facts: Activation, __: int) -> Tensor:
        tracer: Any = torch._C
        state = tracer._get_tracing_state()
        tracer._set_tracing_state(None)  # what is recorded inside may stand in the graph only once
        try:
            return facts.forward(x)
        finally:
            tracer._set_tracing_state(state)

    @staticmethod
    def symbolic(graph: Any, x: Any, _: Activation, number: int) -> Any:
        return graph.op(OPERATION, x, number_i=number).setType(x.type())


class _StandIn(nn.Module):
    """Evaluates the facts in ``table`` that belong to the input's shape."""

    def __init__(self, table: list[Activation]) -> None:
        super().__init__()
        self.table = table
        self.numbers: dict[tuple[int, ...], int] = {}

    def forward(self, x: Tensor) -> Tensor:
        number = self.numbers[tuple(int(size) for size in x.shape[1:])]  # the exporter records sizes as tensors
        return _Applied.apply(x, self.table[number], number)


def _unknown(module: nn.Module) -> bool:
    return registered(module) in ACTIVATIONS.values() and not isinstance(module, KNOWN)
