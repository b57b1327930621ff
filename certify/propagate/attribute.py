"""Which node is to blame: widths, relaxation gaps, shares of the output's looseness, and gains from an exact node."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from certify.bounding import check_spec, prepare
from certify.errors import InvalidInput
from certify.graph import Node
from certify.memory import LIVE
from certify.ops.base import inner
from certify.propagate.backward import blocks, claim_rows, most_rows
from certify.propagate.exact import Pulled, gain
from certify.propagate.methods import BoundMethod, Propagation, resolve_method
from certify.propagate.state import Knowledge
from certify.rounding import Real, ieee, resolve_arithmetic
from certify.sets import PerturbationSet
from certify.specs import Spec


@dataclass(frozen=True)
class NodeBlame:
    """What one node does to the bounds, averaged over the samples.

    ``width_in`` and ``width_out`` are mean interval widths; ``gap`` is the mean distance of its two lines (0 for
    affine nodes); ``undecided`` is the share of its inputs where the relaxation is not exact; ``share`` is its part,
    in [0, 1], of the looseness that relaxations add to the rows of the claim; ``gain`` >= 0, in units of the rows, is
    what their lower bounds would rise by, at most and on average, if this node's relaxation were exact.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    width_in: float
    width_out: float
    gap: float
    undecided: float
    share: float
    gain: float


@ieee()
def explain(
    model: nn.Module,
    domain: PerturbationSet,
    method: str | BoundMethod = "crown",
    *,
    spec: Spec | None = None,
    arithmetic: str = "float",
) -> dict[str, NodeBlame]:
    """Return, per node, what it costs the CROWN bounds of the claim's rows (of the outputs, without a claim).

    ``method`` makes the intervals. A relaxation with gap g under a coefficient A lets a row slip by up to |A| g; a
    node's share is its part of the sum of |A| g over nodes, rows and samples. Shares add up to 1 (or are all 0 where
    every relaxation is exact). They say where slack is, not how much of it the rows' worst points use.

    Gains say that: bound + gain >= the row's bound with y = f(z) at this node, while all others keep their lines and
    all intervals stay (in truth the deeper ones would get tighter too). A short descent finds them (exact.py), and
    over small networks they rank the nodes as branching on each node does, with a Spearman correlation above 0.9.
    Rows without a finite bound count as 0.

    ``arithmetic`` decides on the intervals alone. On these, lines and rows are those of real arithmetic: no exact
    relaxation gives back what rounding costs, and for a KAF with large alpha that is more than a relaxation does.
    """
    chosen = resolve_method(method)
    if not isinstance(chosen, Propagation):
        raise InvalidInput(f"method {chosen.name!r} cannot be explained", "ibp, crown-ibp, crown or alpha-crown")
    graph = prepare(model, domain)
    if spec is None:
        eye = torch.eye(torch.Size(graph.shape(graph.output)).numel(), dtype=graph.dtype, device=graph.device)
        spec = Spec(eye.expand(domain.batch, -1, -1), eye.new_zeros(domain.batch, len(eye)))
    spec = check_spec(graph, domain, spec)
    with torch.no_grad():
        learned = chosen.learn(graph, domain, resolve_arithmetic(arithmetic, graph.dtype))
        knowledge = Knowledge(graph, domain, Real(), learned.intervals)
        gaps = {node.name: _gap(knowledge, node) for node in graph.nodes.values() if not node.rule.affine}
        costs = _costs(knowledge, spec, gaps)
    return {name: _blame(knowledge, node, gaps.get(name), costs[name]) for name, node in graph.nodes.items()}


def _costs(knowledge: Knowledge, spec: Spec, gaps: dict[str, Tensor]) -> dict[str, tuple[float, float]]:
    """Share and gain per node."""
    graph, (batch, count, _) = knowledge.graph, spec.C.shape
    slips, gains = (dict.fromkeys(graph.nodes, 0.0) for _ in range(2))
    sample = torch.arange(batch, device=graph.device).repeat_interleave(count)
    kept = 4 * len(graph.nodes)  # coefficients and values of two pull backs at once
    for block in blocks(sample, most_rows(graph, {}, copies=1 + kept // LIVE)):
        pulled = Pulled(claim_rows(knowledge, spec.C.flatten(0, 1)[block], sample[block]))
        values = pulled.push()
        for name, rows in pulled.before.items():
            node = graph.nodes[name]
            slips[name] += float(inner(rows.pending[name].abs(), rows.of_sample(name, gaps[name])).sum())
            if bool(node.rule.undecided(knowledge.inputs(node)[0]).any()):
                gains[name] += float(gain(pulled, node, values).nan_to_num(0, 0, 0).sum()) / len(sample)
    total = sum(slips.values())
    return {name: (slips[name] / total if total > 0 else 0.0, gains[name]) for name in graph.nodes}


def _gap(knowledge: Knowledge, node: Node) -> Tensor:
    """Mean distance of the two lines of a relaxed node, over its input box, per output."""
    z, relaxation = knowledge.inputs(node)[0], knowledge.relaxation(node)
    assert relaxation is not None
    if relaxation.lower_slope.shape == z.lower.shape:
        return relaxation.gap(z).clamp(min=0)
    return knowledge.intervals[node.name].width  # max-pool: its lines live on windows


def _blame(knowledge: Knowledge, node: Node, gap: Tensor | None, cost: tuple[float, float]) -> NodeBlame:
    inputs = knowledge.inputs(node)
    return NodeBlame(
        node.name,
        node.kind,
        node.shape,
        width_in=sum(float(z.width.double().mean()) for z in inputs) / len(inputs),
        width_out=float(knowledge.intervals[node.name].width.double().mean()),
        gap=0.0 if gap is None else float(gap.double().mean()),
        undecided=0.0 if gap is None else float(node.rule.undecided(inputs[0]).double().mean()),
        share=cost[0],
        gain=cost[1],
    )
