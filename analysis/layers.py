"""The sensitivity of each layer: what it does to distances, to bounds, and to the certificate."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from fractions import Fraction

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from analysis.evaluation import Protocol, fit
from analysis.records import LayerRow, Sensitivity
from certify import CROWN, IBP, LpBall, NodeBlame, Spec, bounds, class_margins, explain
from certify.activations.piecewise import PiecewiseLinear
from certify.errors import InvalidInput, UnsupportedOperation
from certify.graph import INPUT, Graph, Node, trace
from certify.lipschitz import lipschitz_constant
from certify.ops.base import Elementwise
from certify.ops.shape import Select
from certify.rounding import resolve_arithmetic


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
    widths, blames = _bounding(graph, ball, spec, protocol.arithmetic)
    witness = protocol.attack(model, ball, spec, generator=protocol.seeds(right.cpu())).witness
    upper, remark = _certified_factors(model, graph)
    lower, distances = _sampled(model, ball.center, witness)
    rows = [
        _row(node, blames[name], widths[name], (upper.get(name), lower.get(name)), distances[name])
        for name, node in graph.nodes.items()
    ]
    semantics = resolve_arithmetic(protocol.arithmetic, x.dtype).name
    words = (*_sentences(rows), *remark)
    return Sensitivity(radius, protocol.norm, "crown", semantics, len(right), tuple(rows), words)


@dataclass(frozen=True)
class _Widths:
    """Mean widths of a node's output."""

    ibp: float
    crown: float


def _bounding(
    graph: Graph, ball: LpBall, spec: Spec, arithmetic: str
) -> tuple[dict[str, _Widths], dict[str, NodeBlame]]:
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
    return mean, blames


def _certified_factors(model: nn.Module, graph: Graph) -> tuple[dict[str, float], tuple[str, ...]]:
    """Upper bounds of the nodes' own l2 Lipschitz constants; a remark instead where an operation has none."""
    try:
        return lipschitz_constant(model, p=2, method="product", input_shape=graph.input_shape).layers, ()
    except UnsupportedOperation as error:
        return {}, (f"No certified Lipschitz factors: {error.got}.",)


def _sampled(
    model: nn.Module, clean: Tensor, attacked: Tensor
) -> tuple[dict[str, float], dict[str, Float[Tensor, "n"]]]:
    """Per node: the largest ratio of distances met, and the distances of clean and attacked values (l2, float64).

    The ratios come from the pairs (clean, attacked) and from pairs of neighbouring clean samples.
    """
    twin = copy.deepcopy(model).double()
    graph = trace(twin, clean.double())
    with torch.no_grad():
        at_clean, at_attacked = graph.forward(clean.double()), graph.forward(attacked.double())
    near = {name: _norm(at_clean[name] - at_attacked[name]) for name in at_clean}
    far = {name: _norm(value - value.roll(1, 0)) for name, value in at_clean.items()}
    ratios = {}
    for name, node in graph.nodes.items():
        if len(node.inputs) == 1:
            below, above = (torch.cat([pairs[place] for pairs in (near, far)]) for place in (node.inputs[0], name))
            met = above[below > 0] / below[below > 0]
            if len(met):
                ratios[name] = float(met.max())
    near.pop(INPUT)
    return ratios, near


def _row(
    node: Node, blame: NodeBlame, widths: _Widths, factors: tuple[float | None, float | None], moved: Tensor
) -> LayerRow:
    relaxed = not node.rule.affine
    smooth = isinstance(node.rule, Elementwise) and not isinstance(node.rule.facts, PiecewiseLinear)
    return LayerRow(
        name=node.name,
        kind=node.kind,
        shape=node.shape,
        parameters=node.parameters,
        lipschitz_upper=factors[0],
        lipschitz_lower=factors[1],
        width_ibp=widths.ibp,
        width_crown=widths.crown,
        growth=widths.crown / blame.width_in if blame.width_in > 0 and math.isfinite(blame.width_in) else None,
        unstable=blame.undecided if relaxed and not smooth else None,
        gap=blame.gap if smooth else None,
        share=blame.share,
        gain=blame.gain,
        distance_mean=_mean(moved),
        distance_p95=float(moved.quantile(0.95)),
        moves_only=isinstance(node.rule, Select),
    )


def _sentences(rows: list[LayerRow]) -> list[str]:
    """Which layer costs most and why, in plain words."""
    ranked = sorted((row for row in rows if row.share > 0), key=lambda row: (-row.gain, -row.share))
    if not ranked:
        return ["No layer loosens the bounds: all of them are exact here."]
    worst = ranked[0]
    words = (
        f"{worst.name} ({worst.kind}) costs most: with exact bounds for it alone the margins' bounds would rise by up "
        f"to {worst.gain:.2g} on average"
    )
    if len(ranked) > 1:
        words += f", for {ranked[1].name} ({ranked[1].kind}) by {ranked[1].gain:.2g}"
    found = [f"{words}. {_reason(worst)}"]
    growing = max((row for row in rows if row.growth is not None), key=lambda row: row.growth or 0, default=None)
    if growing is not None and growing.growth is not None and growing.growth > 1:
        found.append(
            f"Bounds grow most in {growing.name} ({growing.kind}): its output's bounds are {growing.growth:.1f} times "
            f"as wide as its input's."
        )
    return found


def _reason(row: LayerRow) -> str:
    """Why a relaxed layer loosens the bounds."""
    size = math.prod(row.shape)
    if row.unstable is not None:
        return (
            f"On average {_percent(row.unstable)} of its {size} neurons are unstable: their bounds contain a kink, "
            "and one straight line must stand for both sides of it."
        )
    width = row.width_crown / row.growth if row.growth else 0.0
    return (
        f"Each of its {size} functions lies between two straight lines, and these are {row.gap:.2g} apart on "
        f"average, for inputs known up to {width:.2g}."
    )


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _norm(x: Tensor) -> Float[Tensor, "n"]:
    return torch.linalg.vector_norm(x.flatten(1), dim=1)


def _mean(x: Tensor) -> float:
    return float(x.double().mean())
