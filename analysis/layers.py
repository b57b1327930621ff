"""The sensitivity of each layer: what it does to distances, to bounds, and to the certificate."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from analysis.advice import Findings, sentences
from analysis.diagnosis import learned_shapes
from analysis.evaluation import Protocol, fit
from analysis.layer_records import LayerRow, Pixels, Sensitivity
from analysis.met import Met, meet
from analysis.neurons import neuron_costs
from analysis.pixels import pixel_map
from certify import CROWN, IBP, LpBall, NodeBlame, Spec, bounds, class_margins, explain
from certify.activations.piecewise import PiecewiseLinear
from certify.errors import InvalidInput, UnsupportedOperation
from certify.graph import Graph, Node, trace
from certify.lipschitz import lipschitz_constant
from certify.ops.base import Elementwise
from certify.ops.shape import Select
from certify.propagate.attribute import blame_neurons
from certify.rounding import resolve_arithmetic

#: Points of a learned function that are kept, and functions of a layer: enough for a picture.
POINTS, CURVES = 101, 16


def layer_sensitivity(
    model: nn.Module,
    x: Float[Tensor, "n *shape"],
    y: Int[Tensor, "n"],
    protocol: Protocol,
    *,
    radius: Fraction,
) -> Sensitivity:
    """Return a row per node of the network, in the order of computation, at one radius.

    Measured on the samples that the model gets right, with the protocol's perturbations, attack, arithmetic and
    seed; the bounds are IBP's and CROWN's. Raises ``InvalidInput`` if no sample is right, and what bounding the
    model raises.
    """
    x, y, classes = fit(model, x, y)
    spec = class_margins(y, classes, x.dtype)
    with torch.no_grad():
        right = (spec.rows(model(x)) > 0).all(1).nonzero()[:, 0]
    if len(right) == 0:
        raise InvalidInput(f"none of {len(x)} samples is classified right", "at least one", "more samples, or training")
    ball, spec = protocol.ball(x[right], radius), spec.take(right)
    graph = trace(model, ball.center)
    widths, blames, known = _bounding(graph, ball, spec, protocol.arithmetic)
    witness = protocol.attack(model, ball, spec, generator=protocol.seeds(right.cpu())).witness
    upper, remark = _certified_factors(model, graph)
    met = meet(model, ball.center, witness, spec)
    rows = tuple(_row(node, blames[name], widths[name], upper.get(name), met) for name, node in graph.nodes.items())
    shapes = learned_shapes(model, points=POINTS, curves=CURVES)
    findings = Findings(rows, {shape.layer: shape for shape in shapes}, radius, protocol.norm)
    pixels = pixel_map(model, ball, known, spec=spec, arithmetic=protocol.arithmetic)
    neurons = blame_neurons(model, ball, known, spec=spec, arithmetic=protocol.arithmetic)
    return Sensitivity(
        radius=radius,
        norm=protocol.norm,
        method="crown",
        arithmetic=resolve_arithmetic(protocol.arithmetic, x.dtype).name,
        count=len(right),
        rows=rows,
        sentences=(*sentences(findings), *remark),
        ranking=tuple(row.name for row in findings.ranked),
        neurons=neuron_costs(graph, neurons),
        histograms=met.histograms,
        shapes=shapes,
        pixels=Pixels(tuple(pixels.shape), tuple(pixels.flatten().tolist())),
    )


@dataclass(frozen=True)
class _Widths:
    """Mean widths of a node's output."""

    ibp: float
    crown: float


def _bounding(
    graph: Graph, ball: LpBall, spec: Spec, arithmetic: str
) -> tuple[dict[str, _Widths], dict[str, NodeBlame], CROWN]:
    """What IBP and CROWN know of every node; the CROWN intervals are computed once and given on."""
    semantics = resolve_arithmetic(arithmetic, graph.dtype)
    with torch.no_grad():
        ibp = IBP().learn(graph, ball, semantics).intervals
        crown = CROWN().learn(graph, ball, semantics).intervals
    known = CROWN(intermediate={name: crown[name] for name in graph.nodes})
    blames = explain(graph.model, ball, known, spec=spec, arithmetic=arithmetic)
    outputs = bounds(graph.model, ball, known, arithmetic=arithmetic)
    crown[graph.output] = crown[graph.output] & outputs
    mean = {name: _Widths(_mean(ibp[name].width), _mean(crown[name].width)) for name in graph.nodes}
    return mean, blames, known


def _certified_factors(model: nn.Module, graph: Graph) -> tuple[dict[str, float], tuple[str, ...]]:
    """Upper bounds of the nodes' own l2 Lipschitz constants; a remark instead where an operation has none."""
    try:
        return lipschitz_constant(model, p=2, method="product", input_shape=graph.input_shape).layers, ()
    except UnsupportedOperation as error:
        return {}, (f"No certified Lipschitz factors: {error.got}.",)


def _row(node: Node, blame: NodeBlame, widths: _Widths, factor: float | None, met: Met) -> LayerRow:
    moved, relaxed = met.moved[node.name], not node.rule.affine
    smooth = isinstance(node.rule, Elementwise) and not isinstance(node.rule.facts, PiecewiseLinear)
    return LayerRow(
        name=node.name,
        kind=node.kind,
        shape=node.shape,
        parameters=node.parameters,
        lipschitz_upper=factor,
        lipschitz_lower=met.ratios.get(node.name),
        width_ibp=widths.ibp,
        width_crown=widths.crown,
        growth=widths.crown / blame.width_in if blame.width_in > 0 and math.isfinite(blame.width_in) else None,
        unstable=blame.undecided if relaxed and not smooth else None,
        gap=blame.gap if smooth else None,
        share=blame.share,
        gain=blame.gain,
        distance_mean=_mean(moved),
        distance_p95=float(moved.quantile(0.95)),
        gradient=met.gradients[node.name],
        moves_only=isinstance(node.rule, Select),
    )


def _mean(x: Tensor) -> float:
    return float(x.double().mean())
