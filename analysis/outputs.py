"""Bounds of single samples: what each output can become, and whether the class can change."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from analysis.evaluation import Protocol, fit
from analysis.records import OutputBounds
from certify import bounds, class_margins, prove
from certify.propagate.methods import resolve_method


def output_bounds(
    model: nn.Module,
    x: Float[Tensor, "n *shape"],
    y: Int[Tensor, "n"],
    protocol: Protocol,
    *,
    index: Int[Tensor, "n"] | None = None,
) -> tuple[OutputBounds, ...]:
    """Return the bounds of every sample at every radius by every method of the protocol; nothing is attacked.

    A verdict is that of ``certify.prove``: a misclassified sample is violated. Raises what ``certify.bounds`` raises.
    """
    x, y, classes = fit(model, x, y)
    index = torch.arange(len(x)) if index is None else index
    with torch.no_grad():
        outputs = model(x)
    spec = class_margins(y, classes, x.dtype)

    def found(radius: Fraction, name: str) -> Iterator[OutputBounds]:
        ball, method = protocol.ball(x, radius), resolve_method(name)
        box = bounds(model, ball, method, arithmetic=protocol.arithmetic)
        proof = prove(model, ball, spec, method, arithmetic=protocol.arithmetic)
        margins = proof.margin.lower.amin(1).tolist()
        for i, place in enumerate(index.tolist()):
            yield OutputBounds(
                index=place,
                label=int(y[i]),
                predicted=int(outputs[i].argmax()),
                radius=radius,
                method=name,
                verdict=proof.verdicts[i].value,
                margin=margins[i] if proof.verdicts[i].value != "violated" else None,
                value=tuple(outputs[i].tolist()),
                lower=tuple(box.lower[i].tolist()),
                upper=tuple(box.upper[i].tolist()),
            )

    return tuple(row for radius in protocol.radii for name in protocol.methods for row in found(radius, name))
