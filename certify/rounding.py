"""Floating-point error, in one place.

The contract of ``FloatAnyOrder(dtype)``: a bound holds for the network as IEEE arithmetic of ``dtype`` computes it,
when every affine output is a sum of its own products in ANY order, fused multiply-add allowed. It does not cover
Winograd or FFT convolution, TF32, autocast, quantisation, or layers fused by a compiler.

Notation: u is the unit roundoff, gamma_n = n u / (1 - n u) bounds the relative error of n roundings.
Reference: N. Higham, Accuracy and Stability of Numerical Algorithms (2002), lemma 3.1 and section 4.2.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from certify.errors import InvalidInput, unknown_name

#: What no certificate of ours covers; printed with every certificate made for float arithmetic.
EXCLUSIONS = (
    "Winograd or FFT convolution",
    "TF32",
    "float16 or bfloat16 autocast",
    "quantisation",
    "layers fused by a compiler",
)


def unit_roundoff(dtype: torch.dtype) -> float:
    """Return u: |fl(a op b) - (a op b)| <= u |a op b| for normal results in ``dtype``."""
    return torch.finfo(dtype).eps / 2


def gamma(n: int, dtype: torch.dtype) -> float:
    """Return gamma_n, which bounds the relative error of a sum of n products (n roundings) in any order."""
    nu = n * unit_roundoff(dtype)
    return nu / (1 - nu) if nu < 1 else float("inf")


def tiny(dtype: torch.dtype) -> float:
    """Return the smallest normal number: one product that underflows, or is flushed to zero, errs by less."""
    return torch.finfo(dtype).tiny


class _NextBelow(torch.autograd.Function):
    """The neighbouring float; rounding has no derivative, so gradients pass straight through."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # noqa: ARG004 - nothing is saved
        return torch.nextafter(x, torch.full_like(x, -torch.inf))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:  # noqa: ARG004
        return grads[0]


def next_below(x: Tensor) -> Tensor:
    """Return the largest float below x, in its dtype; the derivative is 1."""
    return _NextBelow.apply(x) if x.requires_grad else torch.nextafter(x, torch.full_like(x, -torch.inf))


def round_down(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the largest convenient y <= x in ``dtype``. ``x`` is float64; NaN and infinities pass through."""
    if x.dtype == dtype:
        return x
    y = x.to(dtype)
    below = next_below(y)
    return torch.where(y.double() > x, below, y)


def round_up(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the smallest convenient y >= x in ``dtype``. ``x`` is float64; NaN and infinities pass through."""
    return -round_down(-x, dtype)


def step_down(x: Tensor, steps: int = 1) -> Tensor:
    """Return x moved ``steps`` units in the last place towards -inf: undoes that many roundings to nearest."""
    for _ in range(steps):
        x = next_below(x)
    return x


def step_up(x: Tensor, steps: int = 1) -> Tensor:
    """Return x moved ``steps`` units in the last place towards +inf."""
    return -step_down(-x, steps)


@dataclass(frozen=True)
class Real:
    """Real-number semantics: rounding is ignored. For comparison with peers and for training."""

    name: str = "real"


@dataclass(frozen=True)
class FloatAnyOrder:
    """The float contract for networks that run in ``dtype`` (see the head of this module)."""

    dtype: torch.dtype

    @property
    def name(self) -> str:
        """The contract's name as certificates print it, such as ``float32-any-order``."""
        return f"{str(self.dtype).removeprefix('torch.')}-any-order"


Arithmetic = Real | FloatAnyOrder


def resolve_arithmetic(name: str, dtype: torch.dtype) -> Arithmetic:
    """Return the arithmetic for a public name: "float" (the contract for ``dtype``) or "real"."""
    if dtype not in (torch.float32, torch.float64):
        raise InvalidInput(f"dtype {dtype}", "float32 or float64", "model.float(), inputs.float() and no autocast")
    if name == "real":
        return Real()
    if name == "float":
        return FloatAnyOrder(dtype)
    raise unknown_name("arithmetic", name, ("float", "real"))


@contextlib.contextmanager
def ieee() -> Iterator[None]:
    """Run matrix products and convolutions in full precision, whatever the caller allowed; restored afterwards.

    ``torch.set_float32_matmul_precision("medium")`` lets products on the CPU use bfloat16 (errors of .2 in a product
    of two 512 x 512 normal matrices), and convolutions on CUDA use TF32 by default: the contract covers neither.
    """
    every: Any = torch.backends  # torch's stubs do not know the operators below
    backends = (every.mkldnn.matmul, every.mkldnn.conv, every.cuda.matmul, every.cudnn.conv)
    before = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        yield
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision
