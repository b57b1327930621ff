"""Bounds of outputs and layers: ``bounds`` and ``layer_bounds``."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor, nn

from certify.enclosures import Interval
from certify.errors import InvalidInput
from certify.graph import Graph, trace
from certify.propagate.alpha import AlphaCROWN
from certify.propagate.methods import BoundMethod, Propagation, resolve_method
from certify.rounding import ieee, resolve_arithmetic, round_down, round_up
from certify.sets import PerturbationSet
from certify.specs import Spec


@ieee()
def bounds(
    model: nn.Module,
    domain: PerturbationSet,
    method: str | BoundMethod = "crown",
    *,
    arithmetic: str = "float",
) -> Interval:
    """Return lower <= model(x) <= upper for every x of the domain, each [batch, *outputs].

    ``method`` is a registered name ("ibp", "crown-ibp", "crown", ...) or an instance with options. ``arithmetic`` is
    "float" (the contract of certify/rounding.py, for the model's dtype) or "real".
    Raises ``InvalidModel``, ``UnsupportedOperation`` or ``InvalidInput``.
    """
    chosen = resolve_method(method)
    if isinstance(chosen, AlphaCROWN):
        chosen = replace(chosen, goal=math.inf)  # values are wanted, not signs
    graph = prepare(model, domain)
    shape = graph.shape(graph.output)
    outputs = torch.Size(shape).numel()
    eye = torch.eye(outputs, dtype=graph.dtype, device=graph.device)
    C = torch.cat([eye, -eye]).expand(domain.batch, -1, -1)
    with torch.no_grad():
        found = chosen.bound(
            graph, domain, Spec(C, C.new_zeros(C.shape[:2])), resolve_arithmetic(arithmetic, graph.dtype)
        )
    lower, upper = round_down(found[:, :outputs], graph.dtype), round_up(-found[:, outputs:], graph.dtype)
    return Interval(lower.view(domain.batch, *shape), upper.view(domain.batch, *shape))


@ieee()
def layer_bounds(
    model: nn.Module,
    domain: PerturbationSet,
    method: str | BoundMethod = "crown",
    *,
    arithmetic: str = "float",
) -> dict[str, Interval]:
    """Return the bounds of every node's output, {node name: Interval [batch, *shape]}, in topological order.

    Nodes that feed an activation carry the method's own bounds, the others what follows from their inputs; the
    output node carries ``bounds(...)``. Methods that only answer claims have none and raise ``InvalidInput``.
    """
    chosen = resolve_method(method)
    if not isinstance(chosen, Propagation):
        raise InvalidInput(f"method {chosen.name!r} has no layer bounds", "ibp, crown-ibp, crown or alpha-crown")
    graph = prepare(model, domain)
    with torch.no_grad():
        knowledge = chosen.learn(graph, domain, resolve_arithmetic(arithmetic, graph.dtype))
    found = {name: knowledge.intervals[name] for name in graph.nodes}
    found[graph.output] = found[graph.output] & bounds(model, domain, chosen, arithmetic=arithmetic)
    return found


def prepare(model: nn.Module, domain: PerturbationSet, *, live: bool = False) -> Graph:
    """Trace the model for the domain's shape, dtype and device."""
    if not isinstance(domain, PerturbationSet):
        raise InvalidInput(f"a {type(domain).__name__} as domain", "certify.LpBall or certify.Box")
    return trace(model, domain.center.detach(), live=live)


def check_spec(graph: Graph, domain: PerturbationSet, spec: Spec) -> Spec:
    """Return the claim in the graph's dtype; raises ``InvalidInput`` where it does not fit the model and domain."""
    outputs = torch.Size(graph.shape(graph.output)).numel()
    if not isinstance(spec, Spec):
        raise InvalidInput(f"a {type(spec).__name__} as spec", "certify.Spec", "certify.class_margins(labels, classes)")
    if spec.batch != domain.batch or spec.C.shape[2] != outputs:
        raise InvalidInput(
            f"a claim on {spec.batch} samples and {spec.C.shape[2]} outputs",
            f"{domain.batch} samples and {outputs} outputs, as the domain and the model have",
            f"certify.class_margins(labels, classes={outputs})",
        )
    return _exact_cast(spec, graph)


def _exact_cast(spec: Spec, graph: Graph) -> Spec:
    cast = spec.to(graph.dtype, graph.device)
    for old, new in ((spec.C, cast.C), (spec.d, cast.d)):
        if not torch.equal(old.double(), new.double().to(old.device)):
            raise InvalidInput(
                f"a claim in {old.dtype} that {graph.dtype} cannot hold exactly", f"C and d in {graph.dtype}"
            )
    return cast


def outputs_at(model: nn.Module, x: Tensor) -> Tensor:
    """Return the model's outputs without gradients; callers hold ``ieee()``."""
    with torch.no_grad():
        return model(x)
