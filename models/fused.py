"""The sum of Gaussians as two compiled loops, one forward and one backward, each reading its input once.

On a uniform dictionary the terms of a few neighbouring points follow from two exponentials:

    exp(-gamma (u - j step)^2) = exp(-gamma u^2) t^j exp(-gamma j^2 step^2)  with  t = exp(2 gamma step u),

u the distance from their centre and j = -2 .. 2, so that neither power nor rounding grows. Everywhere else every term
is an exponential. Both are compiled by torch.compile, whose first call takes seconds: nobody gets them unasked.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd import Function

from models.gaussian import gaussian_sum, pull_back_graph

#: Points of a group; the error of a term grows with the powers of t.
GROUP = 5
#: Where the recursion is as accurate as the contract wants (``uniform_grid``): gamma step^2, and the number of points.
SPREAD, FEWEST = (0.01, 0.2), 16
LOG2E = math.log2(math.e)
#: Inductor stores an expression that is read often, and never one that is large: here recomputing beats memory.
_KEEP_IN_REGISTERS: dict[str, Any] = {
    "realize_opcount_threshold": 100_000,
    "realize_reads_threshold": 100_000,
    "realize_acc_reads_threshold": 100_000,
    "max_fusion_size": 1000,
    "cpp.enable_floating_point_contract_flag": "fast",
}


@dataclass(frozen=True)
class Grid:
    """A uniform dictionary: what the recursion needs of it, in float64 numbers."""

    first: float
    step: float
    gamma: float
    size: int

    def constants(self, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the groups' centres, (gamma log2 e, 2 gamma step log2 e, step), and exp(-gamma j^2 step^2)."""
        rows = _groups(self.size)
        centres = [self.first + self.step * (start + (n - 1) / 2) for start, n in rows]
        scales = [self.gamma * LOG2E, 2 * self.gamma * self.step * LOG2E, self.step]
        spread = self.gamma * self.step**2
        factors = [math.exp(-spread * (j - (n - 1) / 2) ** 2) for _, n in rows for j in range(n)]
        return like.new_tensor(centres), like.new_tensor(scales), like.new_tensor(factors)


def uniform_grid(dictionary: Float[Tensor, "size"], gamma: Float[Tensor, ""]) -> Grid | None:
    """Return the grid on which the recursion's error stays below 62 + 0.7 D roundings of sum|alpha|, else None.

    That is within the gamma_{4D+10} sum|alpha| that certificates allow for any order of the sum (``KAFFacts``): with
    h = gamma step^2 <= 1/5 and |j| <= 2, the exponent and the power of t cost at most 33 roundings where a term is
    largest, Horner's rule and the sum of the groups 16, the rounding of the points at most 0.7 D.
    """
    d, size = dictionary.detach().double(), len(dictionary)
    first, last, bandwidth = float(d[0]), float(d[-1]), float(gamma.detach())
    step = (last - first) / (size - 1)
    unit = torch.finfo(dictionary.dtype).eps / 2
    even = first + step * torch.arange(size, dtype=d.dtype, device=d.device)
    close = float((d - even).abs().max()) <= 4 * unit * float(d.abs().max())
    centred = float(d.abs().max()) <= size * abs(step)
    if step > 0 and close and centred and size >= FEWEST and SPREAD[0] <= bandwidth * step**2 <= SPREAD[1]:
        return Grid(first, step, bandwidth, size)
    return None


def fused_sum(
    x: Float[Tensor, "batch channels *space"],
    alpha: Float[Tensor, "parameters size"],
    dictionary: Float[Tensor, "size"],
    gamma: Float[Tensor, ""],
    grid: Grid | None = None,
) -> Float[Tensor, "batch channels *space"]:
    """Return ``gaussian_sum`` of the same arguments up to rounding; ``grid`` is the dictionary's if it is uniform.

    Differentiable twice, as it is; a second derivative is computed by the uncompiled formulas, and so is everything in
    other dtypes than float32. Without a compiler it warns once and is ``gaussian_sum``.
    """
    if x.dtype != torch.float32 or not _compiler_works(x.device.type):
        return gaussian_sum(x, alpha, dictionary, gamma)
    shared = alpha.shape[0] == 1
    if shared:
        return _FusedSum.apply(x.reshape(x.shape[0], 1, -1), alpha, dictionary, gamma, grid, 2).view(x.shape)
    if x.ndim == 2:
        return _FusedSum.apply(x[None], alpha, dictionary, gamma, grid, 1)[0]
    if x.ndim == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last):
        last = x.permute(0, 2, 3, 1)
        flat = _FusedSum.apply(last.flatten(1, 2), alpha, dictionary, gamma, grid, 1)
        return flat.view(last.shape).permute(0, 3, 1, 2)
    return _FusedSum.apply(x.flatten(2), alpha, dictionary, gamma, grid, 2).view(x.shape)


class _FusedSum(Function):
    """The sum on x [a, channels, space] or [a, space, channels], whose space is dimension ``dim``."""

    @staticmethod
    def forward(x: Tensor, alpha: Tensor, dictionary: Tensor, gamma: Tensor, grid: Grid | None, dim: int) -> Tensor:
        x = x.contiguous()
        weights = _spread(alpha, dim)
        if grid is None:
            return _compiled(_value)(x, weights, dictionary, gamma * LOG2E)
        centres, scales, factors = grid.constants(x)
        return _compiled(_value_on_grid)(x, weights * factors.view(-1, 1, 1, 1), centres, scales)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG004
        ctx.save_for_backward(*inputs[:4])
        ctx.grid, ctx.dim = inputs[4:]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, alpha, dictionary, gamma = ctx.saved_tensors
        grad, dim, grid = grads[0], ctx.dim, ctx.grid
        if torch.is_grad_enabled():
            turned = (grad, x) if dim == 2 else (grad.mT, x.mT)
            dx, *rest = pull_back_graph(*turned, alpha, dictionary, gamma)
            return (dx if dim == 2 else dx.mT, *rest, None, None)
        x, grad, weights = x.contiguous(), grad.contiguous(), _spread(alpha, dim)
        if grid is not None and not any(ctx.needs_input_grad[2:4]):
            centres, scales, factors = grid.constants(x)
            factors = factors.view(-1, 1, 1, 1)
            dx, parts = _compiled(_pull_back_on_grid)(grad, x, weights * factors, centres, scales, dim)
            return dx, (parts.sum(1) * factors[:, :, 0, 0]).t(), None, None, None, None
        dx, parts, first, second = _compiled(_pull_back)(grad, x, weights, dictionary, gamma * LOG2E, dim)
        moments = (alpha.t() * first.sum(1)).sum(1), (alpha.t() * second.sum(1)).sum()
        return dx * (-2 * gamma), parts.sum(1).t(), 2 * gamma * moments[0], -moments[1], None, None


def _spread(alpha: Tensor, dim: int) -> Tensor:
    """Return alpha [channels, size] as [size, 1, channels, 1], or [size, 1, 1, channels]."""
    return alpha.t()[:, None, :, None] if dim == 2 else alpha.t()[:, None, None, :]


# What is compiled. exp2, not exp: inductor stores results of exp to memory instead of using them where they are.


def _value(x: Tensor, weights: Tensor, dictionary: Tensor, rate: Tensor) -> Tensor:
    total = torch.zeros_like(x)
    for i in range(len(weights)):
        u = x - dictionary[i]
        total = total + weights[i] * torch.exp2(u * -rate * u)
    return total


def _pull_back(
    grad: Tensor, x: Tensor, weights: Tensor, dictionary: Tensor, rate: Tensor, dim: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The derivative over -2 gamma, and the sums of grad k_i, grad k_i u_i and grad k_i u_i^2 along ``dim``."""
    dx, sums = torch.zeros_like(x), ([], [], [])  # type: ignore[var-annotated]
    for i in range(len(weights)):
        u = x - dictionary[i]
        kernel = grad * torch.exp2(u * -rate * u)
        moment = kernel * u
        dx = dx + weights[i] * moment
        for found, value in zip(sums, (kernel, moment, moment * u), strict=True):
            found.append(value.sum(dim))
    return dx, torch.stack(sums[0]), torch.stack(sums[1]), torch.stack(sums[2])


def _value_on_grid(x: Tensor, weights: Tensor, centres: Tensor, scales: Tensor) -> Tensor:
    total = torch.zeros_like(x)
    for group, (start, n) in enumerate(_groups(len(weights))):
        _, e, t = _shape(x, centres[group], scales, n)
        power = weights[start + n - 1]
        for i in reversed(range(start, start + n - 1)):
            power = power * t + weights[i]
        total = total + e * power
    return total


def _pull_back_on_grid(
    grad: Tensor, x: Tensor, weights: Tensor, centres: Tensor, scales: Tensor, dim: int
) -> tuple[Tensor, Tensor]:
    """The gradient in x, and the sums of grad e t^j along ``dim``."""
    slope, sums = torch.zeros_like(x), []
    for group, (start, n) in enumerate(_groups(len(weights))):
        u, e, t = _shape(x, centres[group], scales, n)
        middle = (n - 1) / 2
        value, moment = weights[start + n - 1], weights[start + n - 1] * middle
        for j in reversed(range(n - 1)):
            value = value * t + weights[start + j]
            moment = moment * t + weights[start + j] * (j - middle)
        slope = slope + e * (u * value - scales[2] * moment)
        term = grad * e
        for _ in range(n):
            sums.append(term.sum(dim))
            term = term * t
    return slope * grad * (-2 / LOG2E * scales[0]), torch.stack(sums)


def _shape(x: Tensor, centre: Tensor, scales: Tensor, n: int) -> tuple[Tensor, Tensor, Tensor]:
    """The distance u from the centre of n points, exp(-gamma u^2) t^(-(n - 1)/2), and t.

    u is cut off where every term has underflowed, before a product could be 0 times infinity.
    """
    middle = (n - 1) / 2
    limit = middle * scales[2] + torch.sqrt(87 * LOG2E / scales[0])
    u = torch.clamp(x - centre, -limit, limit)
    e = torch.exp2((-scales[0] * u - scales[1] * middle) * u)
    return u, e, torch.exp2(scales[1] * u)


def _groups(size: int) -> list[tuple[int, int]]:
    """First index and number of points of every group."""
    return [(start, min(GROUP, size - start)) for start in range(0, size, GROUP)]


@cache
def _compiled(loop: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(loop, dynamic=True, options=_KEEP_IN_REGISTERS)


@cache
def _compiler_works(device: str) -> bool:
    """Whether torch.compile produces something that runs there; warns once where it does not."""
    try:
        probe = torch.ones(2, device=device)
        return bool(torch.compile(lambda x: x + 1, dynamic=False)(probe).sum() == 4)
    except Exception as error:  # inductor, dynamo, triton and the C++ compiler each raise their own
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        warnings.warn(
            f"no working compiler for {device}: KAFs stay unfused, with the same results ({reason})", stacklevel=3
        )
        return False
