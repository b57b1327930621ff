"""Penalties to train KAFs with: the certified largest |f'| and |f''|, differentiable by the envelope theorem.

The largest value of g(s; theta) over s has the gradient of g in theta at the point that attains it, that point held
fixed: it is a stationary point of g, or an end of the window, and does not move to first order.
"""

from __future__ import annotations

import torch
from jaxtyping import Float64
from torch import Tensor, nn

from certify.enclosures import Interval
from certify.errors import InvalidInput
from certify.graph import trace
from certify.ops.base import Elementwise
from certify.training import evaluating
from models.kaf import KAF
from models.kaf_facts import KAFFacts
from models.kaf_tails import TailedFacts


def slope_penalty(model: nn.Module) -> Float64[Tensor, ""]:
    """Return the mean over all KAF neurons of the certified max |f'| on the whole line.

    For ``loss + 1e-2 * models.slope_penalty(model)``: float64, differentiable in alpha, and in the dictionary and the
    bandwidth where these are trained. A base adds its slope range, as a constant. Raises ``InvalidInput`` for a model
    without KAFs.
    """
    found = []
    for facts, line in _kafs(model, (-torch.inf, torch.inf)):
        largest = _largest(facts, 1, *line)
        if facts.base is not None:
            whole = facts.slope_range(_row(*line)).magnitude[0]
            largest = largest + (whole - largest).detach()
        found.append(largest)
    return torch.cat(found).mean()


def curvature_penalty(model: nn.Module, window: tuple[float, float] = (-3.0, 3.0)) -> Float64[Tensor, ""]:
    """Return the mean over all KAF neurons of the certified max |f''| on the window; as ``slope_penalty`` otherwise.

    Raises ``UnsupportedOperation`` for KAFs with a base, whose curvature is not known.
    """
    if not window[0] <= window[1]:
        raise InvalidInput(f"the window {window}", "(lower, upper) with lower <= upper", "window=(-3.0, 3.0)")
    found = []
    for facts, ends in _kafs(model, window):
        if facts.base is not None:
            facts.curvature(_row(*ends))  # refuses
        found.append(_largest(facts, 2, *ends))
    return torch.cat(found).mean()


_Ends = tuple[Tensor, Tensor]


def _largest(facts: KAFFacts, order: int, lower: Tensor, upper: Tensor) -> Float64[Tensor, "channels"]:
    """The certified largest |f^(order)| on the intervals, with the gradient of |f^(order)| where it is attained."""
    found = facts.extremes(order, lower, upper)
    rising = found.up >= -found.low
    live = facts.derivative(order, torch.where(rising, found.most, found.least)) * torch.where(rising, 1.0, -1.0)
    return live + (torch.where(rising, found.up, -found.low) - live).detach()


def _kafs(model: nn.Module, window: tuple[float, float]) -> list[tuple[KAFFacts, _Ends]]:
    """The facts of all KAFs, with live parameters where gradients are wanted, and the window for every channel."""
    found = []
    for kaf in model.modules():
        if not isinstance(kaf, KAF):
            continue
        example = kaf.alpha.detach().new_zeros((1, len(kaf.alpha)))
        with evaluating(kaf):
            graph = trace(kaf, example, live=torch.is_grad_enabled())
        rule = graph.nodes[graph.output].rule
        assert isinstance(rule, Elementwise)
        facts, ends = rule.facts, window
        if isinstance(facts, TailedFacts):  # outside its slopes are those of the ends, and nothing bends
            ends = max(window[0], -facts.bound), min(window[1], facts.bound)
            ends = min(ends[0], facts.bound), max(ends[1], -facts.bound)
            facts = facts.inner
        assert isinstance(facts, KAFFacts)
        lower, upper = (torch.full_like(example[0], end, dtype=torch.float64) for end in ends)
        found.append((facts, (lower, upper)))
    if not found:
        raise InvalidInput("a model without KAFs", "one with a KAF to penalise", "models.KAF(channels) as activation")
    return found


def _row(lower: Tensor, upper: Tensor) -> Interval:
    return Interval(lower[None], upper[None])
