"""Operator norms that are certificates: every number here is an upper bound, rounding included.

Power iteration, svds and LOBPCG approach a spectral norm from below; they serve as guesses only. What is returned
has passed a Cholesky factorisation of t I - B B^H with Rump's shift.
Reference: S. Rump, "Verification of positive definiteness" (2006), theorem 2.3; facts of convolutions: the zero-padded
convolution is a part of the circular one on the torus of size n + k - 1, whose norm is that of its Fourier blocks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import singledispatch

import torch
from jaxtyping import Complex128, Float64, Inexact
from torch import Tensor

from certify.errors import UnsupportedOperation
from certify.ops.base import Affine, Rule
from certify.ops.conv import Conv, ConvTranspose
from certify.ops.linear import Linear
from certify.rounding import gamma, unit_roundoff

#: Entries of Fourier blocks held at once.
_CHUNK = 2**21


def operator_norm(rule: Rule, scale: Float64[Tensor, "*out"], inputs: tuple[int, ...], p: float) -> float:
    """Return an upper bound of ||diag(scale) W||_p for an affine rule of one input; scale >= 0, p = 2 or inf.

    ``inputs`` is the shape of one sample of the input. Raises ``UnsupportedOperation`` for other rules.
    """
    if not bool(torch.isfinite(scale).all()):
        return math.inf
    if p == 2:
        return spectral_norm(rule, scale, inputs)
    if not isinstance(rule, Affine):
        raise _unknown(rule)
    rows = rule.absolute(torch.ones((1, *inputs), dtype=torch.float64, device=scale.device))[0]
    return float((rows * scale).max()) * (1 + gamma(math.prod(inputs) + 8, torch.float64))


@singledispatch
def spectral_norm(rule: Rule, _scale: Float64[Tensor, "*out"], _inputs: tuple[int, ...]) -> float:
    """Return an upper bound of ||diag(scale) W||_2; dense layers and convolutions have rules of their own."""
    raise _unknown(rule)


@spectral_norm.register
def _(rule: Linear, scale: Tensor, _inputs: tuple[int, ...]) -> float:
    rows = scale.view(-1, scale.shape[-1]).amax(0)  # the layer repeats over the leading dimensions
    return singular_bound((rows[:, None] * rule.weight)[None])


@spectral_norm.register
def _(rule: Conv, scale: Tensor, inputs: tuple[int, ...]) -> float:
    rows = scale.flatten(1).amax(1).view(-1, *[1] * (rule.weight.ndim - 1))
    return convolution_norm(rows * rule.weight, inputs[1:], rule.dilation, rule.groups)


@spectral_norm.register
def _(rule: ConvTranspose, scale: Tensor, inputs: tuple[int, ...]) -> float:
    columns = scale.flatten(1).amax(1).view(rule.groups, 1, -1, *[1] * rule.dims)
    weight = rule.weight.unflatten(0, (rule.groups, inputs[0] // rule.groups))
    return convolution_norm((weight * columns).flatten(0, 1), scale.shape[1:], rule.dilation, rule.groups)


@spectral_norm.register
def _(rule: Affine, scale: Tensor, inputs: tuple[int, ...]) -> float:
    """|| |W| ||, exact for averages: the iterates of Collatz and Wielandt bound it for every positive v.

    ||M||^2 <= max_i (M^T M v)_i / v_i. Reference: Horn and Johnson, Matrix Analysis, theorem 8.1.26.
    """
    v = torch.ones((1, *inputs), dtype=torch.float64, device=scale.device)
    best = math.inf
    for _step in range(30):
        with torch.enable_grad():
            x = v.clone().requires_grad_()
            y = rule.absolute(x) * scale.square()
            (w,) = torch.autograd.grad(rule.absolute(x), x, y.detach())
        used = v > 0  # a column that got weight 0 is 0
        if not bool(w[used].max() > 0):
            return 0.0
        best = min(best, float((w[used] / v[used]).max()))
        v = torch.where(w > 0, (w / w.max()).clamp(min=1e-100), 0)
    return math.sqrt(best) * (1 + gamma(2 * (math.prod(inputs) + scale.numel()) + 32, torch.float64))


def singular_bound(blocks: Inexact[Tensor, "n rows columns"], floor: float = 0.0) -> float:
    """Return an upper bound of the largest singular value of all blocks (real or complex), at least ``floor``.

    The blocks' entries may have been rounded up to four times.
    """
    if not bool(torch.isfinite(blocks.abs()).all()):
        return math.inf
    size = float(blocks.abs().max())
    if size == 0:
        return floor
    unit = 2.0 ** math.frexp(size)[1]
    blocks = blocks / unit  # exact: keeps squares away from overflow
    blocks = blocks.mH if blocks.shape[1] > blocks.shape[2] else blocks
    weight = blocks.abs().square().sum((1, 2))
    gram = blocks @ blocks.mH
    noise = weight * (1.01 * gamma(4 * blocks.shape[2] + 16, torch.float64))
    level = _eigenvalue_bound(gram, noise, (floor / unit) ** 2)
    entries = 8 * unit_roundoff(torch.float64) * math.sqrt(float(weight.max()))
    return max(floor, (math.sqrt(level) * (1 + 1e-15) + entries) * unit)


def _eigenvalue_bound(gram: Tensor, noise: Float64[Tensor, "n"], level: float) -> float:
    """Return t >= ``level`` with t I - G positive semidefinite for every true G within ``noise`` of a block."""
    k = gram.shape[-1]
    shift = 1.01 * gamma(4 * k + 16, torch.float64) * k  # Rump: relative to the trace, which is at most k t
    slack, eye = 2 * shift, torch.eye(k, dtype=gram.dtype, device=gram.device)
    while True:
        room = level * (1 - shift) - noise
        failed = torch.linalg.cholesky_ex(room.view(-1, 1, 1) * eye - gram).info != 0
        failed |= room <= 0
        if not bool(failed.any()):
            return level
        gram, noise = gram[failed], noise[failed]
        guess = _rayleigh(gram).topk(min(8, len(gram))).indices
        top = float(torch.linalg.eigvalsh(gram[guess]).max())
        level = max(level, top * (1 + slack) + 2 * float(noise.max()))
        slack *= 2  # a guess that rounding spoils is raised until it passes


def _rayleigh(gram: Tensor) -> Float64[Tensor, "n"]:
    """A guess of each block's largest eigenvalue, from below: squaring shows the direction."""
    power = gram
    for _ in range(4):
        power = power @ power
        power = power / torch.linalg.matrix_norm(power)[:, None, None].clamp(min=1e-300)
    v = power.sum(2)
    v = v / torch.linalg.vector_norm(v, dim=1, keepdim=True).clamp(min=1e-300)
    return torch.einsum("ni,nij,nj->n", v.conj(), gram, v).real


def convolution_norm(
    weight: Float64[Tensor, "out in *kernel"],
    sizes: tuple[int, ...],
    dilation: tuple[int, ...],
    groups: int = 1,
) -> float:
    """Return an upper bound of the l2 norm of a zero-padded convolution on inputs of the given sizes, any stride.

    A stride keeps a part of the outputs, so it is dropped. Blocks [out, in] per frequency of the torus with
    n + d (k - 1) points per axis; half of the frequencies suffice, as the others are conjugates.
    """
    kernel = weight.shape[2:]
    torus = [n + d * (k - 1) for n, d, k in zip(sizes, dilation, kernel, strict=True)]
    taps = weight.unflatten(0, (groups, -1)).flatten(3)  # [groups, out, in, taps]
    chunk = max(1, _CHUNK // taps[..., 0].numel())
    found = 0.0
    for phases in torus_phases(torus, dilation, kernel, chunk):
        found = singular_bound(fourier_blocks(taps, phases), found)
    return found + block_error(taps)


def fourier_blocks(
    taps: Float64[Tensor, "groups out in taps"], phases: Complex128[Tensor, "frequencies taps"]
) -> Complex128[Tensor, "blocks out in"]:
    """Return the blocks of a circular convolution, those of one frequency together."""
    return torch.einsum("goit,ft->fgoi", taps.to(torch.complex128), phases.to(taps.device)).flatten(0, 1)


def block_error(taps: Float64[Tensor, "groups out in taps"]) -> float:
    """Return a bound of the spectral norm of what ``fourier_blocks`` rounds.

    Each phase is off by less than 64 u, each sum of products by gamma of its length.
    """
    entry = gamma(4 * taps.shape[3] + 80, torch.float64) * taps.abs().sum(3)
    return float(entry.square().sum((1, 2)).max().sqrt()) * 1.01


def torus_phases(torus: list[int], dilation: tuple[int, ...], kernel: tuple[int, ...], chunk: int) -> Iterator[Tensor]:
    """Yield exp(-2 pi i sum_a f_a d_a t_a / N_a) [frequencies, taps], a chunk of frequencies at a time."""
    half = [*torus[:-1], torus[-1] // 2 + 1]
    frequencies = torch.cartesian_prod(*(torch.arange(n) for n in half)).view(-1, len(torus))
    taps = torch.cartesian_prod(*(torch.arange(k) for k in kernel)).view(-1, len(kernel))
    for part in frequencies.split(chunk):
        turns = torch.zeros(len(part), len(taps), dtype=torch.float64)
        for axis, (n, d) in enumerate(zip(torus, dilation, strict=True)):
            turns += (part[:, axis, None] * taps[:, axis] * d % n).double() / n
        yield torch.polar(torch.ones_like(turns), -2 * math.pi * turns)


def _unknown(rule: object) -> UnsupportedOperation:
    return UnsupportedOperation(
        f"no operator norm for the rule {type(rule).__name__}",
        "an affine rule of one input (linear and absolute)",
        "derive it from certify.ops.base.Affine (see certify/ops/linear.py)",
    )
