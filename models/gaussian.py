"""The sum of Gaussians behind every kernel activation function, in memory of the size of its input."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd import Function

from models import direct, fusion, recursion
from models.plan import Plan, coefficients


def gaussian_sum(
    x: Float[Tensor, "batch channels *space"],
    alpha: Float[Tensor, "parameters size"],
    dictionary: Float[Tensor, "size"],
    gamma: Float[Tensor, ""],
    plan: Plan | None = None,
    *,
    fused: bool = False,
) -> Float[Tensor, "batch channels *space"]:
    """Return f(x) = sum_i alpha[c, i] exp(-gamma (x - d_i)^2) for every element of channel c.

    ``parameters`` is the number of channels, or 1 for one function shared by all. Differentiable twice in all
    four arguments. Only they are saved for the backward pass, which recomputes the terms block by block, so
    that memory is that of x, not of x times D; a backward pass with ``create_graph`` keeps the terms.

    A ``plan`` made for these values sums by powers (models/plan.py); without one, or where the dictionary or gamma
    want gradients, the sum is term by term. ``fused`` runs compiled code (models/fusion.py). Every form errs by at
    most gamma_{4D+10} sum|alpha|. The memory format of x is kept.
    """
    free = dictionary.requires_grad or gamma.requires_grad
    used = None if plan is None or free or not plan.groups or plan.dtype != x.dtype else plan
    flat, restore = _flatten(x)
    return restore(_GaussianSum.apply(flat, alpha, dictionary, gamma, used, fused))


def _flatten(x: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """View x as [n, c, s] (channels last: [n s, c, 1]), and return what views a result of that shape as x."""
    last = x.movedim(1, -1)
    if x.ndim > 2 and (x.is_contiguous() or not last.is_contiguous()):
        return x.contiguous().flatten(2), lambda y: y.view(x.shape)
    return last.reshape(-1, x.shape[1], 1), lambda y: y.view(last.shape).movedim(-1, 1)


class _GaussianSum(Function):
    """``gaussian_sum`` on x [n, c, s] with alpha [c, D]; by powers with a plan."""

    @staticmethod
    def forward(x: Tensor, alpha: Tensor, dictionary: Tensor, gamma: Tensor, plan: Plan | None, fused: bool) -> Tensor:
        pure = torch.compiler.is_compiling()
        if plan is None:
            values = direct.values_pure if pure else fusion.direct_values if fused else direct.values
            return values(x, alpha, dictionary, gamma)
        terms = coefficients(alpha, dictionary, gamma, plan)[:, :, None]
        if pure:
            return recursion.values_pure(x, terms, plan.numbers, plan.groups)
        return (fusion if fused else recursion).values(x, terms, plan)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG004
        ctx.save_for_backward(*inputs[:4])
        ctx.plan, ctx.fused = inputs[4:]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,), saved, pure = grads, ctx.saved_tensors, torch.compiler.is_compiling()
        if not pure and torch.is_grad_enabled():  # a derivative of this derivative is wanted
            found: direct.Gradients = direct.pull_back_graph(grad, *saved)
        elif ctx.plan is not None:
            found = (*_pull_back_powers((grad, *saved), ctx.plan, fused=ctx.fused, pure=pure), None, None)
        elif pure:
            found = direct.pull_back_pure(grad, *saved)
        else:
            pull_back = fusion.direct_pull_back if ctx.fused else direct.pull_back
            found = pull_back(grad, *saved, needed=ctx.needs_input_grad)
        return *found, None, None


def _pull_back_powers(values: tuple[Tensor, ...], plan: Plan, *, fused: bool, pure: bool) -> tuple[Tensor, Tensor]:
    """Return the gradients in x and alpha by powers; ``values`` are that of f, x, alpha, the dictionary and gamma."""
    grad, x, alpha, dictionary, gamma = values
    terms = coefficients(alpha, dictionary, gamma, plan)[:, :, None]
    if pure:
        slopes = terms * plan.lean[:, None, None]
        dx, sums = recursion.pull_back_pure(grad, x, terms, slopes, plan.numbers, plan.groups)
    else:
        dx, sums = (fusion if fused else recursion).pull_back(grad, x, terms, plan)
    return dx, direct.per_parameter(sums * plan.scale[:, None], alpha)
