"""Which node is to blame, and which of its neurons: widths, gaps, shares of the looseness, gains from an exact node."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64
from torch import Tensor, nn

from certify.bounding import check_spec, prepare
from certify.enclosures import Interval
from certify.errors import InvalidInput
from certify.graph import Node
from certify.memory import LIVE
from certify.ops.base import inner
from certify.propagate.backward import Rows, blocks, claim_rows, most_rows
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
    with torch.no_grad():
        knowledge, spec = known(model, domain, method, spec, arithmetic)
        gaps = _gaps(knowledge)
        costs = _costs(knowledge, spec, gaps)
        nodes = knowledge.graph.nodes
        return {name: _blame(knowledge, node, gaps.get(name), costs[name]) for name, node in nodes.items()}


@dataclass(frozen=True, eq=False)
class NeuronBlame:
    """What each neuron of one node does to the bounds, averaged over the samples; all tensors have its shape.

    ``inputs`` and ``outputs`` are mean ends of the bounds (``inputs`` is None where the shapes differ); ``gap`` and
    ``undecided`` as in ``NodeBlame``, whose ``share`` is the sum of the shares here. ``weight`` is the sum of the
    |coefficients| with which the rows of the claim take the neuron's value, on average over the samples.
    """

    name: str
    kind: str
    inputs: Interval | None
    outputs: Interval
    gap: Float[Tensor, "*shape"]
    undecided: Float[Tensor, "*shape"]
    share: Float64[Tensor, "*shape"]
    weight: Float64[Tensor, "*shape"]


@ieee()
def blame_neurons(
    model: nn.Module,
    domain: PerturbationSet,
    method: str | BoundMethod = "crown",
    *,
    spec: Spec | None = None,
    arithmetic: str = "float",
) -> dict[str, NeuronBlame]:
    """Return, per node, what its every neuron costs the bounds of the claim's rows; arguments are those of ``explain``.

    In one pull back of the rows: gains are left to ``explain``.
    """
    with torch.no_grad():
        knowledge, spec = known(model, domain, method, spec, arithmetic)
        nodes, gaps = knowledge.graph.nodes, _gaps(knowledge)
        weights, slips = ({n: _zeros(knowledge, node) for n, node in nodes.items()} for _ in range(2))
        for rows, _ in claim_blocks(knowledge, spec):
            for name in (node.name for node in pull_through(rows)):
                A = rows.pending[name].abs()
                weights[name] += A.double().sum((0, 1))
                if name in gaps and name != knowledge.entry:
                    slips[name] += (A * rows.of_sample(name, gaps[name])).double().sum((0, 1))
        total = max(sum(float(slip.sum()) for slip in slips.values()), torch.finfo(torch.float64).tiny)
        return {
            name: _neurons(knowledge, node, gaps.get(name), slips[name] / total, weights[name] / spec.batch)
            for name, node in nodes.items()
        }


def known(
    model: nn.Module, domain: PerturbationSet, method: str | BoundMethod, spec: Spec | None, arithmetic: str
) -> tuple[Knowledge, Spec]:
    """Return the intervals that ``method`` makes, for rows of real arithmetic, and the claim (or the outputs)."""
    chosen = resolve_method(method)
    if not isinstance(chosen, Propagation):
        raise InvalidInput(f"method {chosen.name!r} cannot be explained", "ibp, crown-ibp, crown or alpha-crown")
    graph = prepare(model, domain)
    if spec is None:
        eye = torch.eye(torch.Size(graph.shape(graph.output)).numel(), dtype=graph.dtype, device=graph.device)
        spec = Spec(eye.expand(domain.batch, -1, -1), eye.new_zeros(domain.batch, len(eye)))
    spec = check_spec(graph, domain, spec)
    learned = chosen.learn(graph, domain, resolve_arithmetic(arithmetic, graph.dtype))
    return Knowledge(graph, domain, Real(), learned.intervals), spec


def claim_blocks(knowledge: Knowledge, spec: Spec, copies: int = 1) -> Iterator[tuple[Rows, Tensor]]:
    """Yield the claim's rows in blocks, with their places among all [batch * rows]."""
    batch, count, _ = spec.C.shape
    sample = torch.arange(batch, device=knowledge.graph.device).repeat_interleave(count)
    for block in blocks(sample, most_rows(knowledge.graph, {}, copies=copies)):
        yield claim_rows(knowledge, spec.C.flatten(0, 1)[block], sample[block]), block


def pull_through(rows: Rows) -> Iterator[Node]:
    """Pull rows back to the input; yields every node they pass while their coefficients over it are still there."""
    for name, node in reversed(rows.knowledge.graph.nodes.items()):
        if name in rows.pending:
            yield node
            rows.step(node)


def _costs(knowledge: Knowledge, spec: Spec, gaps: dict[str, Tensor]) -> dict[str, tuple[float, float]]:
    """Share and gain per node."""
    graph, count = knowledge.graph, spec.C.shape[:2].numel()
    slips, gains = (dict.fromkeys(graph.nodes, 0.0) for _ in range(2))
    kept = 4 * len(graph.nodes)  # coefficients and values of two pull backs at once
    for rows_of_block, _ in claim_blocks(knowledge, spec, copies=1 + kept // LIVE):
        pulled = Pulled(rows_of_block)
        values = pulled.push()
        for name, rows in pulled.before.items():
            node = graph.nodes[name]
            slips[name] += float(inner(rows.pending[name].abs(), rows.of_sample(name, gaps[name])).sum())
            if bool(node.rule.undecided(knowledge.inputs(node)[0]).any()):
                gains[name] += float(gain(pulled, node, values).nan_to_num(0, 0, 0).sum()) / count
    total = sum(slips.values())
    return {name: (slips[name] / total if total > 0 else 0.0, gains[name]) for name in graph.nodes}


def _gaps(knowledge: Knowledge) -> dict[str, Tensor]:
    """The gaps of all relaxed nodes."""
    nodes = knowledge.graph.nodes.values()
    return {node.name: _gap(knowledge, node) for node in nodes if not node.rule.affine}


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


def _neurons(knowledge: Knowledge, node: Node, gap: Tensor | None, share: Tensor, weight: Tensor) -> NeuronBlame:
    """The means over the samples of what is known of one node."""
    inputs, outputs = knowledge.inputs(node)[0], knowledge.intervals[node.name]
    undecided, alike = node.rule.undecided(inputs), inputs.lower.shape == outputs.lower.shape
    zero = torch.zeros_like(outputs.lower[0])
    return NeuronBlame(
        node.name,
        node.kind,
        inputs=_averaged(inputs) if alike and not node.rule.affine else None,
        outputs=_averaged(outputs),
        gap=zero if gap is None else gap.mean(0),
        undecided=undecided.to(zero.dtype).mean(0) if alike and gap is not None else zero,
        share=share,
        weight=weight,
    )


def _zeros(knowledge: Knowledge, node: Node) -> Float64[Tensor, "*shape"]:
    return torch.zeros(node.shape, dtype=torch.float64, device=knowledge.graph.device)


def _averaged(z: Interval) -> Interval:
    """The mean ends over the samples."""
    return Interval(z.lower.mean(0), z.upper.mean(0))
