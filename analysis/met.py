"""What layers do at the samples themselves, clean and attacked: distances, ratios, gradients, histograms."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from analysis.diagnosis import histogram
from analysis.layer_records import Histogram
from certify import Spec
from certify.graph import INPUT, Graph, trace


@dataclass(frozen=True, eq=False)
class Met:
    """By node: l2 distances of its clean and attacked values, the largest ratio of distances, the mean gradient norm.

    ``histograms`` are those of what goes into the nodes that are not affine.
    """

    moved: dict[str, Float[Tensor, "n"]]
    ratios: dict[str, float]
    gradients: dict[str, float]
    histograms: tuple[Histogram, ...]


def meet(model: nn.Module, clean: Float[Tensor, "n *shape"], attacked: Tensor, spec: Spec) -> Met:
    """Run clean and attacked samples through the model, in float64, and return what its nodes do to them.

    Ratios of distances come from the pairs (clean, attacked) and from pairs of neighbouring clean samples; a node with
    several inputs has none. Gradients are those of the smallest row of ``spec`` in the node's output, at the clean
    samples: the mean over samples of their l2 norms.
    """
    graph = trace(copy.deepcopy(model).double(), clean.double())
    gradients = _gradients(graph, clean.double(), spec)
    with torch.no_grad():
        at_clean, at_attacked = graph.forward(clean.double()), graph.forward(attacked.double())
    near = {name: _norm(at_clean[name] - at_attacked[name]) for name in at_clean}
    far = {name: _norm(value - value.roll(1, 0)) for name, value in at_clean.items()}
    ratios, drawn = {}, []
    for name, node in graph.nodes.items():
        source = node.inputs[0]
        if len(node.inputs) == 1:
            below, above = (torch.cat([pairs[place] for pairs in (near, far)]) for place in (source, name))
            met = above[below > 0] / below[below > 0]
            if len(met):
                ratios[name] = float(met.max())
        if not node.rule.affine:
            drawn.append(histogram(name, at_clean[source], at_attacked[source]))
    near.pop(INPUT)
    return Met(near, ratios, gradients, tuple(drawn))


def _gradients(graph: Graph, x: Tensor, spec: Spec) -> dict[str, float]:
    """The mean l2 norm of the smallest row's gradient in every node's output."""
    with torch.enable_grad():
        values = graph.forward(x.detach().clone().requires_grad_())
        margin = spec.rows(values[graph.output]).amin(1).sum()
        names = list(graph.nodes)
        found = torch.autograd.grad(margin, [values[name] for name in names], allow_unused=True)
    return {name: 0.0 if g is None else float(_norm(g).mean()) for name, g in zip(names, found, strict=True)}


def _norm(x: Tensor) -> Float[Tensor, "n"]:
    return torch.linalg.vector_norm(x.flatten(1), dim=1)
