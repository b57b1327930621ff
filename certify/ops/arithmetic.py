"""Elementwise affine maps: arithmetic with constants, batch normalisation, sums of nodes."""

from __future__ import annotations

import operator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from certify.enclosures import Interval
from certify.errors import InvalidModel, UnsupportedOperation
from certify.frames import Frame
from certify.graph import Call, Input
from certify.ops.base import Affine
from certify.registry import register_op
from certify.rounding import gamma, tiny


class Scale(Affine):
    """y = (x - center) scale + shift with constants that broadcast against one sample.

    ``roundings`` is the number of operations in which the network computes it (8 for a batch normalisation).
    """

    elementwise = carries = True

    def __init__(
        self, scale: Tensor, center: Tensor | None = None, shift: Tensor | None = None, *, roundings: int = 2
    ) -> None:
        self.scale, self.center, self.shift, self.roundings = scale, center, shift, roundings

    def reach(self, frame: Frame) -> Frame | None:
        """Windows pass where the constants are the same over the map."""
        same = all(size == 1 for size in self.scale.shape[-len(frame.size) :])
        return frame if same and self.scale.ndim <= len(frame.size) + 1 else None

    def linear(self, *xs: Tensor) -> Tensor:
        return xs[0] * self.scale

    def absolute(self, *xs: Tensor) -> Tensor:
        return xs[0] * self.scale.abs()

    def transpose(self, A: Tensor) -> tuple[Tensor, ...]:
        return (A * self.scale,)

    def forward(self, *xs: Tensor) -> Tensor:
        y = (xs[0] if self.center is None else xs[0] - self.center) * self.scale
        return y if self.shift is None else y + self.shift

    def rounding_error(self, *zs: Interval) -> Tensor:
        """gamma (|scale| (|x| + |center|) + |shift|): large centres cost, whatever y is."""
        dtype = zs[0].lower.dtype
        size = zs[0].magnitude if self.center is None else zs[0].magnitude + self.center.abs()
        size = size * self.scale.abs()
        if self.shift is not None:
            size = size + self.shift.abs()
        error = size * (gamma(self.roundings, dtype) + gamma(10, dtype))
        return error * (1 + gamma(8, dtype)) + 4 * tiny(dtype)


class Sum(Affine):
    """y = x_1 + x_2 or x_1 - x_2 of two nodes of one shape."""

    fan_in = 2
    carries = True

    def reach(self, frame: Frame) -> Frame:
        return frame

    def __init__(self, sign: float) -> None:
        self.sign = sign

    def linear(self, *xs: Tensor) -> Tensor:
        return xs[0] + xs[1] if self.sign > 0 else xs[0] - xs[1]

    def absolute(self, *xs: Tensor) -> Tensor:
        return xs[0] + xs[1]

    def transpose(self, A: Tensor) -> tuple[Tensor, ...]:
        return A, self.sign * A


def _sum(call: Call, sign: float) -> Affine:
    left, right = call.option("input", 0, None), call.option("other", 1, None)
    if float(call.kwargs.get("alpha", 1)) != 1:
        raise UnsupportedOperation(f"alpha in a sum at {call.name!r}", "plain + and -")
    if isinstance(left, Input) and isinstance(right, Input):
        if left.shape != right.shape:
            raise UnsupportedOperation(
                f"sum of shapes {left.shape} and {right.shape} at {call.name!r}",
                "equal shapes",
                "expand first",
            )
        return Sum(sign)
    if isinstance(left, Input):
        return Scale(call.per_sample(1.0), shift=sign * call.per_sample(right))
    return Scale(call.per_sample(sign), shift=call.per_sample(left))


@register_op(operator.add, operator.iadd, torch.add, "add", "add_")
def add(call: Call) -> Affine:
    """Rule of x + y and x + constant."""
    return _sum(call, 1.0)


@register_op(operator.sub, operator.isub, torch.sub, "sub", "sub_")
def subtract(call: Call) -> Affine:
    """Rule of x - y, x - constant and constant - x."""
    return _sum(call, -1.0)


@register_op(operator.mul, operator.imul, torch.mul, "mul", "mul_")
def multiply(call: Call) -> Affine:
    """Rule of x * constant."""
    return Scale(call.per_sample(_only_constant(call)))


@register_op(operator.truediv, operator.itruediv, torch.div, "div", "div_")
def divide(call: Call) -> Affine:
    """Rule of x / constant."""
    divisor = call.per_sample(_only_constant(call))
    if not isinstance(call.args[0], Input) or call.kwargs.get("rounding_mode") or not bool((divisor != 0).all()):
        raise UnsupportedOperation(f"division at {call.name!r}", "x / constant with no zero in it")
    return Scale((1 / divisor.double()).to(divisor.dtype))


@register_op(operator.neg, torch.neg, "neg")
def negate(call: Call) -> Affine:
    """Rule of -x."""
    return Scale(call.per_sample(-1.0))


def _only_constant(call: Call) -> Tensor | float:
    constants = [arg for arg in call.args if not isinstance(arg, Input)]
    if len(call.inputs) != 1 or len(constants) != 1:
        raise UnsupportedOperation(
            f"{call.kind} of two values that both depend on the input, at {call.name!r}",
            "one constant operand",
        )
    return constants[0]


@register_op(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, F.batch_norm)
def batch_norm(call: Call) -> Scale:
    """Rule of batch normalisation in eval mode, folded in float64."""
    mean, var = call.constant("running_mean", 1), call.constant("running_var", 2)
    if mean is None or var is None or (call.module is None and call.option("training", 5, False)):
        raise InvalidModel(
            f"batch normalisation with batch statistics at {call.name!r}",
            "running statistics",
            "model.eval()",
        )
    weight, bias = call.constant("weight", 3), call.constant("bias", 4)
    scale = (var.double() + float(call.option("eps", 7, 1e-5))).rsqrt()
    scale = scale if weight is None else scale * weight.double()
    tail = [1] * (len(call.input_shape) - 1)
    center, scale = mean.view(-1, *tail), scale.to(mean.dtype).view(-1, *tail)
    return Scale(scale, center, None if bias is None else bias.view(-1, *tail), roundings=8)
