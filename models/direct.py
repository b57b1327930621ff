"""The sum of Gaussians term by term, forward and backward, on elements x [n, c, s] with alpha [c, D] or [1, D].

For any dictionary and any gamma; models/recursion.py is faster where the dictionary is evenly spaced.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

#: Terms evaluated at once: two scratch blocks of this many numbers stay in a core's second-level cache.
BLOCK = {"cpu": 2**18, "cuda": 2**24}

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]


def values(x: Tensor, alpha: Tensor, dictionary: Tensor, gamma: Tensor) -> Tensor:
    """Return the sum, term by term and block by block."""
    out, scratch = torch.empty_like(x), _Scratch(x)
    weights = _by_term(alpha)
    for rows, columns in _blocks(x, len(dictionary)):
        _, kernel = scratch.terms(x[rows, columns], dictionary, gamma)
        kernel.mul_(weights if len(alpha) == 1 else weights[:, :, columns])
        torch.sum(kernel, 0, out=out[rows, columns])
    return out


def pull_back(
    grad: Tensor, x: Tensor, alpha: Tensor, dictionary: Tensor, gamma: Tensor, *, needed: tuple[bool, ...]
) -> Gradients:
    """Return the gradients in x, alpha, dictionary and gamma (None where not needed), block by block."""
    dx = torch.zeros_like(x) if needed[0] else None
    dalpha = alpha.new_zeros(len(dictionary), x.shape[1])
    dd, dgamma = torch.zeros_like(dictionary), torch.zeros_like(gamma)
    scratch, weights = _Scratch(x), _by_term(alpha)
    for rows, columns in _blocks(x, len(dictionary)):
        distance, kernel = scratch.terms(x[rows, columns], dictionary, gamma)
        kernel.mul_(grad[rows, columns])
        if needed[1]:
            dalpha[:, columns] += kernel.sum((1, 3))
        moment = kernel.mul_(distance).mul_(weights if len(alpha) == 1 else weights[:, :, columns])
        if dx is not None:
            torch.sum(moment, 0, out=dx[rows, columns])
        if needed[2]:
            dd += moment.sum((1, 2, 3))
        if needed[3]:
            dgamma -= moment.mul_(distance).sum()
    return (
        dx.mul_(-2 * gamma) if dx is not None else None,
        per_parameter(dalpha, alpha) if needed[1] else None,
        2 * gamma * dd if needed[2] else None,
        dgamma if needed[3] else None,
    )


def pull_back_graph(grad: Tensor, x: Tensor, alpha: Tensor, dictionary: Tensor, gamma: Tensor) -> Gradients:
    """Return the same four gradients from differentiable operations, for double backward."""
    distance = x - dictionary.view(-1, 1, 1, 1)
    kernel = grad * torch.exp(-gamma * distance.square())
    moment = kernel * distance * _by_term(alpha)
    return (
        -2 * gamma * moment.sum(0),
        per_parameter(kernel.sum((1, 3)), alpha),
        2 * gamma * moment.sum((1, 2, 3)),
        -(moment * distance).sum(),
    )


def values_pure(x: Tensor, alpha: Tensor, dictionary: Tensor, gamma: Tensor) -> Tensor:
    """``values`` as one expression, for a compiler to fuse."""
    weights = alpha.t()[:, :, None]
    y = torch.zeros_like(x)
    for i in range(len(dictionary)):
        y = y + weights[i] * torch.exp((x - dictionary[i]) * -gamma * (x - dictionary[i]))
    return y


def pull_back_pure(
    grad: Tensor, x: Tensor, alpha: Tensor, dictionary: Tensor, gamma: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``pull_back`` as one expression."""
    weights, dx, found = alpha.t()[:, :, None], torch.zeros_like(x), []
    for i in range(len(dictionary)):
        distance = x - dictionary[i]
        kernel = grad * torch.exp(distance * -gamma * distance)
        moment = kernel * distance * weights[i]
        dx = dx + moment
        found.append([part.sum((0, 2)) for part in (kernel, moment, moment * distance)])  # alike, for one loop
    sums, shifts, spreads = (torch.stack(part) for part in zip(*found, strict=True))
    return -2 * gamma * dx, per_parameter(sums, alpha), 2 * gamma * shifts.sum(1), -spreads.sum()


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


def per_parameter(sums: Tensor, alpha: Tensor) -> Tensor:
    """Return sums by term and channel as the gradient of alpha, which all channels may share."""
    return sums.t() if len(alpha) > 1 else sums.sum(1)[None]


def _blocks(x: Tensor, size: int) -> Iterator[tuple[slice, slice]]:
    """Cut x [n, c, s] in rows and columns so that a block of ``size`` terms fits the scratch."""
    n, c, s = x.shape
    terms = BLOCK.get(x.device.type, BLOCK["cpu"])
    columns = min(c, max(1, terms // (size * max(1, s))))
    rows = max(1, terms // (size * max(1, s) * columns)) if columns == c else 1
    for row in range(0, n, rows):
        for column in range(0, c, max(1, columns)):
            yield slice(row, row + rows), slice(column, column + columns)
