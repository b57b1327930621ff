"""Into one layer: which of its neurons, or channels of its maps, cost the bounds most."""

from __future__ import annotations

from fractions import Fraction

from jaxtyping import Float, Int
from torch import Tensor, nn

from analysis.evaluation import Protocol, fit
from analysis.layer_records import Neuron, Neurons
from certify import class_margins
from certify.activations.piecewise import PiecewiseLinear
from certify.graph import Node, trace
from certify.ops.base import Elementwise
from certify.propagate.attribute import NeuronBlame, blame_neurons, unknown_layer

#: Neurons listed of a layer.
SHOWN = 10


def layer_names(model: nn.Module, x: Float[Tensor, "n *shape"]) -> tuple[str, ...]:
    """Return the names of the model's layers, in the order of computation."""
    return tuple(trace(model, x[:1]).nodes)


def neuron_costs(
    model: nn.Module,
    x: Float[Tensor, "n *shape"],
    y: Int[Tensor, "n"],
    protocol: Protocol,
    *,
    radius: Fraction,
    layer: str,
) -> Neurons:
    """Return the neurons of a layer that cost the margins' bounds most; of a layer with maps, its channels.

    The most costly ones have the largest share of the layer's looseness; in a layer without any, the widest bounds
    times the largest weight. Raises ``InvalidInput`` for a layer that the model does not have.
    """
    x, y, classes = fit(model, x, y)
    nodes, spec = trace(model, x[:1]).nodes, class_margins(y, classes, x.dtype)
    if layer not in nodes:
        raise unknown_layer(layer, nodes)
    found = blame_neurons(model, protocol.ball(x, radius), layer, spec=spec, arithmetic=protocol.arithmetic)
    part, share = _by_channel(found.share).sum(1), float(found.share.sum())
    cost = part if share > 0 else _by_channel(found.weight * found.outputs.width.double()).sum(1)
    part = part / share if share > 0 else part
    most = cost.argsort(descending=True, stable=True)[:SHOWN].tolist()
    return Neurons(
        layer=layer,
        kind=found.kind,
        unit="channel" if found.share.ndim > 1 else "neuron",
        total=len(part),
        radius=radius,
        count=len(x),
        share=share,
        rows=tuple(_row(nodes[layer], found, place, float(part[place])) for place in most),
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
