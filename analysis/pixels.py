"""Which input elements the smallest margin's bound depends on."""

from __future__ import annotations

import torch
from jaxtyping import Float64
from torch import Tensor, nn

from certify import PerturbationSet, Spec
from certify.propagate.inputs import input_rows
from certify.propagate.methods import BoundMethod


def pixel_map(
    model: nn.Module,
    domain: PerturbationSet,
    method: str | BoundMethod = "crown",
    *,
    spec: Spec,
    arithmetic: str = "float",
) -> Float64[Tensor, "*shape"]:
    """Return, per input element, |A| times half its width, averaged over samples; A of the row with the least bound.

    A row's linear lower bound <A, x> + b loses sum |A_i| (u_i - l_i) / 2 between the middle of a box [l, u] and its
    worst corner: this is each element's part of that. For balls of other norms the widths are those of the box
    around them, and the parts add up to more. ``pixel_maps`` has them sample by sample.
    """
    return pixel_maps(model, domain, method, spec=spec, arithmetic=arithmetic).mean(0)


def pixel_maps(
    model: nn.Module,
    domain: PerturbationSet,
    method: str | BoundMethod = "crown",
    *,
    spec: Spec,
    arithmetic: str = "float",
) -> Float64[Tensor, "batch *shape"]:
    """Return what ``pixel_map`` averages, per sample."""
    rows = input_rows(model, domain, method, spec=spec, arithmetic=arithmetic)
    least = rows.coefficients[torch.arange(len(rows.bound), device=rows.bound.device), rows.bound.argmin(1)]
    return least.double().abs() * domain.hull.width / 2
