"""Into the layers: which of their neurons, or channels of their maps, cost the bounds most."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from analysis.layer_records import Neuron, Neurons
from certify.activations.piecewise import PiecewiseLinear
from certify.graph import Graph, Node
from certify.ops.base import Elementwise
from certify.propagate.attribute import NeuronBlame

#: Neurons listed of a layer.
SHOWN = 10


def neuron_costs(graph: Graph, found: Mapping[str, NeuronBlame]) -> tuple[Neurons, ...]:
    """Return, per layer, the neurons that cost the margins' bounds most; of a layer with maps, its channels.

    The most costly ones have the largest share of the layer's looseness; in a layer without any, the widest bounds
    times the largest weight.
    """
    return tuple(_of_layer(graph.nodes[name], blame) for name, blame in found.items())


def _of_layer(node: Node, found: NeuronBlame) -> Neurons:
    part, share = _by_channel(found.share).sum(1), float(found.share.sum())
    cost = part if share > 0 else _by_channel(found.weight * found.outputs.width.double()).sum(1)
    part = part / share if share > 0 else part
    most = cost.argsort(descending=True, stable=True)[:SHOWN].tolist()
    return Neurons(
        layer=node.name,
        kind=node.kind,
        unit="channel" if found.share.ndim > 1 else "neuron",
        total=len(part),
        share=share,
        rows=tuple(_row(node, found, place, float(part[place])) for place in most),
    )


def _row(node: Node, found: NeuronBlame, place: int, share: float) -> Neuron:
    """What is known of one neuron or channel."""
    smooth = isinstance(node.rule, Elementwise) and not isinstance(node.rule.facts, PiecewiseLinear)
    kinked = isinstance(node.rule, Elementwise) and not smooth

    def mean(values: Tensor) -> float:
        return float(_by_channel(values)[place].double().mean())

    return Neuron(
        place=place,
        low_in=None if found.inputs is None else mean(found.inputs.lower),
        high_in=None if found.inputs is None else mean(found.inputs.upper),
        low_out=mean(found.outputs.lower),
        high_out=mean(found.outputs.upper),
        unstable=mean(found.undecided) if kinked else None,
        gap=None if node.rule.affine or kinked else mean(found.gap),
        share=share,
        weight=float(_by_channel(found.weight)[place].sum()),
    )


def _by_channel(values: Tensor) -> Tensor:
    """[neurons, 1], or [channels, places] of maps."""
    return values.flatten(1) if values.ndim > 1 else values.reshape(-1, 1)
