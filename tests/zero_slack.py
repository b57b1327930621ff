"""Bounds against float executions with no slack at all: what soundness tests and the soundness benchmark share."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from references import AnyOrder, attacked, float_outputs, graph_of, module_values, points
from torch import Tensor, nn

import certify
from certify.propagate.methods import resolve_method
from certify.rounding import FloatAnyOrder

ALPHA = certify.AlphaCROWN(steps=3, inner_steps=2, goal=math.inf)
METHODS: tuple[str | certify.AlphaCROWN, ...] = ("ibp", "crown-ibp", "crown", ALPHA)


@dataclass
class Tally:
    """Counts comparisons of one number with one end of its interval."""

    checks: int = 0
    violations: int = 0
    examples: list[str] = field(default_factory=list)

    def compare(self, what: str, value: Tensor, interval: certify.Interval) -> None:
        """Count lower <= value <= upper, exactly, in the precision of both; a NaN end or value is a violation."""
        bad = ~(value >= interval.lower) | ~(value <= interval.upper)
        self.checks += 2 * value.numel()
        self.violations += int(bad.sum())
        if bool(bad.any()):
            excess = torch.maximum(interval.lower.double() - value.double(), value.double() - interval.upper.double())
            self.examples.append(f"{what}: {int(bad.sum())} violated, worst by {float(excess.max()):.3g}")


def check_bounds(
    model: nn.Module,
    domain: certify.PerturbationSet,
    methods: tuple[str | certify.AlphaCROWN, ...] = METHODS,
    *,
    seed: int = 0,
    count: int = 3,
    orders: int = 2,
    compiled: bool = False,
) -> Tally:
    """Compare every node, output and margin of a network with executions in many orders at many points.

    With ``compiled`` the network is also run through ``torch.compile``.
    """
    compilation = torch.compile(model, dynamic=False) if compiled else None
    tally, generator = Tally(), torch.Generator().manual_seed(seed)
    graph = graph_of(model, domain)
    outputs = torch.Size(graph.shape(graph.output)).numel()
    labels = torch.arange(domain.batch) % outputs
    spec = certify.class_margins(labels, outputs, domain.center.dtype)
    layers = {method: certify.layer_bounds(model, domain, method) for method in methods}
    contract = FloatAnyOrder(domain.center.dtype)
    with torch.no_grad():
        lower = {method: resolve_method(method).bound(graph, domain, spec, contract) for method in methods}
    margins = {method: certify.Interval(ends, torch.full_like(ends, torch.inf)) for method, ends in lower.items()}
    shuffled = AnyOrder(graph)
    candidates = [*points(domain, generator, count), *attacked(model, domain, generator)]
    for x in candidates:
        assert bool(domain.contains(x).all())
        executions = [shuffled(x, generator) for _ in range(orders)] + [module_values(model, x, graph)]
        results = [*float_outputs(model, x), *(values[graph.output] for values in executions[:orders])]
        if compilation is not None:
            with torch.no_grad():
                results.append(compilation(x))
        for method in methods:
            for values in executions:
                for name in values.keys() & layers[method].keys():
                    tally.compare(f"{method} at {name}", values[name], layers[method][name])
            for y in results:
                tally.compare(f"{method} outputs", y, layers[method][graph.output])
                tally.compare(f"{method} rows", spec.rows(y), margins[method])
    return tally
