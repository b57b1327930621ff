"""How far a float execution can drift from real arithmetic: for methods that bound the real network."""

from __future__ import annotations

import torch
from jaxtyping import Float64
from torch import Tensor

from certify.errors import UnsupportedOperation
from certify.graph import INPUT, Node
from certify.ops.base import Elementwise
from certify.ops.pool import MaxPool
from certify.propagate.state import Knowledge
from certify.rounding import gamma, round_up, step_up, tiny


def output_drift(knowledge: Knowledge) -> Float64[Tensor, "batch outputs"]:
    """Return a bound of |float output - real output| at the same input, for all inputs of the domain.

    0 for real arithmetic. The intervals must hold for both networks, as those of every ``Propagation`` do.
    Raises ``UnsupportedOperation`` for rules that are neither affine, elementwise nor max-pooling.
    """
    graph, domain = knowledge.graph, knowledge.domain
    if not knowledge.rounds:
        outputs = torch.Size(graph.shape(graph.output)).numel()
        return torch.zeros(domain.batch, outputs, dtype=torch.float64, device=graph.device)
    return _drifts(knowledge, anew=False)[graph.output].flatten(1)


def local_drifts(knowledge: Knowledge) -> dict[str, Float64[Tensor, "batch *shape"]]:
    """Return, per node, how far rounding moves its float value from what the float values it stems from say.

    An affine node stems from the input and from the nodes before it that are not affine, through real affine maps;
    any other node from its inputs. So nothing is carried through activations. All 0 for real arithmetic.
    """
    if knowledge.rounds:
        return _drifts(knowledge, anew=True)
    shapes = {INPUT: knowledge.graph.input_shape} | {node.name: node.shape for node in knowledge.graph.nodes.values()}
    like = torch.zeros((), dtype=torch.float64, device=knowledge.graph.device)
    return {name: like.expand(knowledge.domain.batch, *shape) for name, shape in shapes.items()}


def _drifts(knowledge: Knowledge, *, anew: bool) -> dict[str, Tensor]:
    """Add every node's own error to what it makes of its inputs' drifts; ``anew``: those of affine nodes only."""
    graph, domain = knowledge.graph, knowledge.domain
    drift = {INPUT: torch.zeros_like(domain.center, dtype=torch.float64)}
    curved = {node.name for node in graph.nodes.values() if not node.rule.affine}
    for node in graph.nodes.values():
        before = [torch.zeros_like(drift[name]) if anew and (name in curved or node.name in curved) else drift[name]
                  for name in node.inputs]  # fmt: skip
        moved = _moved(knowledge, node, before)
        own = knowledge.error(node)
        total = moved if own is None else step_up(moved + own.reshape(-1, *node.shape).double(), 2)
        # Both values lie in the node's interval.
        width = step_up(knowledge.intervals[node.name].double().width, 2).nan_to_num(nan=torch.inf)
        drift[node.name] = torch.minimum(total.nan_to_num(nan=torch.inf, posinf=torch.inf), width)
    return drift


def _moved(knowledge: Knowledge, node: Node, drifts: list[Tensor]) -> Tensor:
    """What the node makes of the drifts of its inputs, as if it did not round itself."""
    rule, dtype = node.rule, knowledge.graph.dtype
    if isinstance(rule, Elementwise):
        steepest = rule.facts.slope_range(knowledge.intervals[node.inputs[0]]).magnitude.double()
        return torch.where(drifts[0] == 0, 0, step_up(steepest * drifts[0], 2))
    if isinstance(rule, MaxPool):
        return rule.run(drifts[0])
    if not rule.affine:
        raise UnsupportedOperation(
            f"{node.kind} at {node.name!r}", "affine nodes, activations and max-pooling", 'method="crown"'
        )
    terms = int(getattr(rule, "fan_in", 1))
    found = rule.absolute(*(round_up(drift, dtype) for drift in drifts)).double()
    return step_up(found * (1 + 2 * gamma(terms + 8, dtype)) + (terms + 1) * tiny(dtype), 3)
