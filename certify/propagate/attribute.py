"""Which node is to blame: widths, relaxation gaps and shares of the output's looseness."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from certify.bounding import check_spec, prepare
from certify.errors import InvalidInput
from certify.ops.base import inner
from certify.propagate.backward import Groups, Rows
from certify.propagate.methods import BoundMethod, Propagation, resolve_method
from certify.propagate.state import Knowledge
from certify.rounding import ieee, resolve_arithmetic
from certify.sets import PerturbationSet
from certify.specs import Spec


@dataclass(frozen=True)
class NodeBlame:
    """What one node does to the bounds, averaged over the samples.

    ``width_in`` and ``width_out`` are mean interval widths; ``gap`` is the mean distance of its two lines (0 for
    affine nodes); ``undecided`` is the share of its inputs where the relaxation is not exact; ``share`` is its part,
    in [0, 1], of the looseness that relaxations add to the rows of the claim.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    width_in: float
    width_out: float
    gap: float
    undecided: float
    share: float


@ieee()
def explain(
    model: nn.Module,
    domain: PerturbationSet,
    method: str | BoundMethod = "crown",
    *,
    spec: Spec | None = None,
    arithmetic: str = "float",
) -> dict[str, NodeBlame]:
    """Return, per node, what it costs the bounds of the claim's rows (of the outputs, without a claim).

    A relaxation with gap g under a coefficient A lets a row slip by up to |A| g; a node's share is its part of the
    sum of |A| g over nodes, rows and samples, for the lower bounds of the rows. Shares add up to 1 (or are all 0
    where every relaxation is exact).
    """
    chosen = resolve_method(method)
    if not isinstance(chosen, Propagation):
        raise InvalidInput(f"method {chosen.name!r} cannot be explained", "ibp, crown-ibp or crown")
    graph = prepare(model, domain)
    if spec is None:
        eye = torch.eye(torch.Size(graph.shape(graph.output)).numel(), dtype=graph.dtype, device=graph.device)
        spec = Spec(eye.expand(domain.batch, -1, -1), eye.new_zeros(domain.batch, len(eye)))
    spec = check_spec(graph, domain, spec)
    with torch.no_grad():
        knowledge = chosen.learn(graph, domain, resolve_arithmetic(arithmetic, graph.dtype))
        slips = _slips(knowledge, spec)
    total = sum(slips.values())
    return {name: _blame(knowledge, name, slips.get(name, 0.0) / total if total > 0 else 0.0) for name in graph.nodes}


def _slips(knowledge: Knowledge, spec: Spec) -> dict[str, float]:
    """Sum of |A| gap over the rows, per relaxed node."""
    graph = knowledge.graph
    batch, count, _ = spec.C.shape
    sample = torch.arange(batch, device=graph.device).repeat_interleave(count)
    rows = Rows(knowledge, sample, both=False, groups=Groups.of(sample))
    rows.start(graph.output, spec.C.reshape(batch * count, 1, *graph.shape(graph.output)))
    slips: dict[str, float] = {}
    for name in reversed(graph.nodes):
        if name not in rows.pending:
            continue
        node = graph.nodes[name]
        if not node.rule.affine:
            coefficients = rows.pending[name].abs()
            slips[name] = float(inner(coefficients, rows.of_sample(name, _gap(knowledge, name))).clamp(min=0).sum())
        rows.step(node)
    return slips


def _gap(knowledge: Knowledge, name: str) -> Tensor:
    """Mean distance of the two lines of a relaxed node, over its input box, per output."""
    node = knowledge.graph.nodes[name]
    z, relaxation = knowledge.inputs(node)[0], knowledge.relaxation(node)
    assert relaxation is not None
    if relaxation.lower_slope.shape == z.lower.shape:
        return relaxation.gap(z).clamp(min=0)
    return knowledge.intervals[name].width  # max-pool: its lines live on windows


def _blame(knowledge: Knowledge, name: str, share: float) -> NodeBlame:
    node = knowledge.graph.nodes[name]
    z = knowledge.intervals[node.inputs[0]]
    relaxed = not node.rule.affine
    undecided = node.rule.undecided(z).double().mean() if relaxed else 0.0
    gap = _gap(knowledge, name).double().mean() if relaxed else 0.0
    width_in = sum(float(zi.width.double().mean()) for zi in knowledge.inputs(node)) / len(node.inputs)
    width_out = float(knowledge.intervals[name].width.double().mean())
    return NodeBlame(name, node.kind, node.shape, width_in, width_out, float(gap), float(undecided), share)
