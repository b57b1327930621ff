"""Dense layers."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from certify.graph import Call
from certify.ops.base import Affine
from certify.registry import register_op


class Linear(Affine):
    """y = W x + b on the last dimension."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.weight, self.bias = weight, bias
        self.magnitude = self.weight.abs()
        self.fan_out, self.fan_in = weight.shape

    def linear(self, *xs: Tensor) -> Tensor:
        return F.linear(xs[0], self.weight)

    def absolute(self, *xs: Tensor) -> Tensor:
        return F.linear(xs[0], self.magnitude)

    def transpose(self, A: Tensor) -> tuple[Tensor, ...]:
        return (A @ self.weight,)


@register_op(nn.Linear, F.linear)
def dense(call: Call) -> Linear:
    """Rule of nn.Linear and F.linear with constant weights."""
    weight = call.constant("weight", 1)
    assert weight is not None
    return Linear(weight, call.constant("bias", 2))
