"""Kernels of kernel activation functions, and their sums in memory of the size of the input.

The Gaussian is the one that the bound engine knows; the others can be trained and attacked, and certification refuses
them. Reference: Scardapane et al., "Kafnets" (2019), section 3, and the thesis that compares them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

#: k(s, d) with a bandwidth gamma, elementwise.
Kernel = Callable[[Tensor, Tensor, Tensor], Tensor]

KERNELS: dict[str, Kernel] = {
    "gaussian": lambda s, d, gamma: torch.exp(-gamma * (s - d).square()),
    "laplacian": lambda s, d, gamma: torch.exp(-gamma * (s - d).abs()),
    "softplus": lambda s, d, gamma: F.softplus(s - d),  # noqa: ARG005 - all kernels are called alike
    "relu": lambda s, d, gamma: F.relu(s - d),  # noqa: ARG005
    "polynomial": lambda s, d, gamma: (1 + s * d).square(),  # noqa: ARG005
}


def kernel_sum(
    kernel: Kernel,
    x: Float[Tensor, "batch channels *space"],
    alpha: Float[Tensor, "parameters size"],
    dictionary: Float[Tensor, "size"],
    gamma: Float[Tensor, ""],
) -> Float[Tensor, "batch channels *space"]:
    """Return f(x) = sum_i alpha[c, i] k(x, d_i) for every element of channel c.

    Differentiable as often as the kernel. Terms are computed anew in the backward pass, one at a time: memory is that
    of a few tensors of the size of x. For Gaussians ``gaussian_sum`` is quicker.
    """

    def term(x: Tensor, weight: Tensor, d: Tensor, gamma: Tensor) -> Tensor:
        return weight * kernel(x, d, gamma)

    total = torch.zeros_like(x)
    weights = alpha.t().reshape(len(dictionary), -1, *[1] * (x.ndim - 2))
    for weight, d in zip(weights, dictionary, strict=True):
        total = total + checkpoint(term, x, weight, d, gamma, use_reentrant=False)
    return total
