"""The sum of Gaussians behind every kernel activation function, in memory of the size of its input."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd import Function

#: Terms evaluated at once: two scratch blocks of this many numbers stay in a core's second-level cache.
BLOCK = {"cpu": 2**18, "cuda": 2**24}


def gaussian_sum(
    x: Float[Tensor, "batch channels *space"],
    alpha: Float[Tensor, "parameters size"],
    dictionary: Float[Tensor, "size"],
    gamma: Float[Tensor, ""],
) -> Float[Tensor, "batch channels *space"]:
    """Return f(x) = sum_i alpha[c, i] exp(-gamma (x - d_i)^2) for every element of channel c.

    ``parameters`` is the number of channels, or 1 for one function shared by all. Differentiable twice in all
    four arguments. Only they are saved for the backward pass, which recomputes the terms block by block, so
    that memory is that of x, not of x times D; a backward pass with ``create_graph`` keeps the terms.
    """
    shared = alpha.shape[0] == 1
    flat = x.reshape(-1, 1, 1) if shared else x.unsqueeze(-1).flatten(2)
    return _GaussianSum.apply(flat, alpha, dictionary, gamma).view(x.shape)


class _GaussianSum(Function):
    """``gaussian_sum`` on x [n, c, s] with alpha [c, D]."""

    @staticmethod
    def forward(x: Tensor, alpha: Tensor, dictionary: Tensor, gamma: Tensor) -> Tensor:
        out, scratch = torch.empty_like(x, memory_format=torch.contiguous_format), _Scratch(x)
        weights = _by_term(alpha)
        for rows, columns in _blocks(x, len(dictionary)):
            _, kernel = scratch.terms(x[rows, columns], dictionary, gamma)
            torch.sum(kernel.mul_(weights[:, :, columns]), 0, out=out[rows, columns])
        return out

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:  # noqa: ARG004
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            return pull_back_graph(grads[0], *ctx.saved_tensors)
        return _pull_back(grads[0], *ctx.saved_tensors, needed=ctx.needs_input_grad)


def _pull_back(
    grad: Tensor, x: Tensor, alpha: Tensor, dictionary: Tensor, gamma: Tensor, *, needed: tuple[bool, ...]
) -> tuple[Tensor | None, ...]:
    """Return the gradients in x, alpha, dictionary and gamma (None where not needed), block by block."""
    dx = torch.zeros_like(x, memory_format=torch.contiguous_format) if needed[0] else None
    dalpha, dd, dgamma = alpha.t().new_zeros(alpha.t().shape), *map(torch.zeros_like, (dictionary, gamma))
    scratch, weights = _Scratch(x), _by_term(alpha)
    for rows, columns in _blocks(x, len(dictionary)):
        distance, kernel = scratch.terms(x[rows, columns], dictionary, gamma)
        kernel.mul_(grad[rows, columns])
        if needed[1]:
            dalpha[:, columns] += kernel.sum((1, 3))
        moment = kernel.mul_(distance).mul_(weights[:, :, columns])
        if dx is not None:
            torch.sum(moment, 0, out=dx[rows, columns])
        if needed[2]:
            dd += moment.sum((1, 2, 3))
        if needed[3]:
            dgamma -= moment.mul_(distance).sum()
    return (
        dx.mul_(-2 * gamma) if dx is not None else None,
        dalpha.t() if needed[1] else None,
        2 * gamma * dd if needed[2] else None,
        dgamma if needed[3] else None,
    )


def pull_back_graph(grad: Tensor, x: Tensor, alpha: Tensor, dictionary: Tensor, gamma: Tensor) -> tuple[Tensor, ...]:
    """Return the same four gradients from differentiable operations, for double backward."""
    distance = x - dictionary.view(-1, 1, 1, 1)
    kernel = grad * torch.exp(-gamma * distance.square())
    moment = kernel * distance * _by_term(alpha)
    return (
        -2 * gamma * moment.sum(0),
        kernel.sum((1, 3)).t(),
        2 * gamma * moment.sum((1, 2, 3)),
        -(moment * distance).sum(),
    )


class _Scratch:
    """Two buffers [D, block] that every block of one pass reuses."""

    def __init__(self, like: Tensor) -> None:
        self.distance, self.kernel = like.new_empty(0), like.new_empty(0)

    def terms(self, x: Tensor, dictionary: Tensor, gamma: Tensor) -> tuple[Tensor, Tensor]:
        """Return x - d_i and exp(-gamma (x - d_i)^2), [D, *block]; both are overwritten by the next call.

        The exponent is -gamma (x - d) (x - d) with the true distance of each term: four roundings, no
        cancellation between terms, and exactly 0 far from the dictionary.
        """
        shape = (len(dictionary), *x.shape)
        distance = torch.sub(x, dictionary.view(-1, 1, 1, 1), out=self.distance.resize_(shape))
        kernel = torch.mul(distance, -gamma, out=self.kernel.resize_(shape)).mul_(distance).exp_()
        return distance, kernel


def _by_term(alpha: Tensor) -> Tensor:
    """Return alpha [c, D] as [D, 1, c, 1]."""
    return alpha.t()[:, None, :, None]


def _blocks(x: Tensor, size: int) -> Iterator[tuple[slice, slice]]:
    """Cut x [n, c, s] in rows and columns so that a block of ``size`` terms fits the scratch."""
    n, c, s = x.shape
    terms = BLOCK.get(x.device.type, BLOCK["cpu"])
    columns = min(c, max(1, terms // (size * max(1, s))))
    rows = max(1, terms // (size * max(1, s) * columns)) if columns == c else 1
    for row in range(0, n, rows):
        for column in range(0, c, max(1, columns)):
            yield slice(row, row + rows), slice(column, column + columns)
