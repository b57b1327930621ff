"""The start of a kernel activation function as a given function: kernel ridge regression, with what it costs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from certify.errors import InvalidInput
from models.kernels import Kernel

#: A function that a KAF can start as.
Target = Callable[[Tensor], Tensor]

#: A system with a larger condition number is refused: its solution is rounding error.
SINGULAR = 1e12
#: Largest error of a fit that the automatic ridge term accepts, and the terms that it tries.
ACCEPTED, TERMS = 0.06, tuple(10.0**power for power in range(0, -7, -1))


@dataclass(frozen=True, eq=False)
class RidgeFit:
    """alpha = (K + ridge I)^-1 target(d), K_ij = k(d_i, d_j), in float64.

    ``condition`` is that of K + ridge I, ``error`` the largest |f - target| on an even grid over the dictionary's
    range, ``mass`` sum|alpha|: float rounding of the activation, and global bounds of its slopes, grow with it.
    """

    alpha: Float64[Tensor, "size"]
    ridge: float
    condition: float
    error: float
    mass: float


def ridge_fit(
    target: Target, dictionary: Float[Tensor, "size"], gamma: Float[Tensor, ""], ridge: float | str, kernel: Kernel
) -> RidgeFit:
    """Return the fit of ``target`` on the dictionary.

    ``ridge`` "auto" takes the largest power of ten from 1 to 1e-6 whose fit errs by at most .06, or by at most twice
    the least error of all where none does: the larger the term, the smaller sum|alpha|. With the published terms, 1e-6
    and 1e-4, K is nearly singular (condition 4e5 for the paper's dictionary), so alpha is large and alternates in sign.

    Reference: Scardapane et al. (2019), equation 16. Raises ``InvalidInput`` where K + ridge I is singular, or the
    target is no elementwise function.
    """
    if ridge == "auto":
        fits = [_fit(target, dictionary, gamma, term, kernel) for term in TERMS]
        limit = max(ACCEPTED, 2 * min(fit.error for fit in fits))
        return next(fit for fit in fits if fit.error <= limit)
    if isinstance(ridge, str) or not 0 <= ridge < torch.inf:
        raise InvalidInput(f"ridge = {ridge!r}", "a number >= 0, or 'auto'", "ridge='auto'")
    return _fit(target, dictionary, gamma, ridge, kernel)


def _fit(target: Target, dictionary: Tensor, gamma: Tensor, ridge: float, kernel: Kernel) -> RidgeFit:
    d, rate = dictionary.detach().double(), gamma.detach().double()
    values = _values(target, d)
    system = kernel(d[:, None], d[None, :], rate) + ridge * torch.eye(len(d), dtype=d.dtype, device=d.device)
    condition = float(torch.linalg.cond(system))
    if not condition <= SINGULAR:
        raise InvalidInput(
            f"a kernel matrix of condition {condition:.1e} (ridge {ridge:g})",
            "one that can be inverted: the relu kernel's cannot",
            "a larger ridge, another kernel, or init='random'",
        )
    alpha = torch.linalg.solve(system, values)
    grid = torch.linspace(float(d.min()), float(d.max()), 2001, dtype=d.dtype, device=d.device)
    fitted = kernel(grid[:, None], d, rate) @ alpha
    error = float((fitted - _values(target, grid)).abs().max())
    return RidgeFit(alpha, ridge, condition, error, float(alpha.abs().sum()))


def _values(target: Target, points: Tensor) -> Tensor:
    values = torch.as_tensor(target(points), dtype=torch.float64, device=points.device)
    if values.shape != points.shape or not bool(torch.isfinite(values).all()):
        raise InvalidInput(
            f"a start function with values of shape {tuple(values.shape)} on {len(points)} points",
            "one finite number for each point",
            "an elementwise function such as torch.tanh",
        )
    return values
