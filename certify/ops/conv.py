"""Convolutions and transposed convolutions in one, two and three dimensions; never a dense matrix."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from certify.errors import UnsupportedOperation
from certify.graph import Call
from certify.ops.base import Affine
from certify.ops.windows import per_axis, window_positions
from certify.registry import register_op

_CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_CONV_TRANSPOSE = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


class Conv(Affine):
    """Cross-correlation with zero padding, stride, dilation and groups."""

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        *,
        stride: tuple[int, ...],
        padding: tuple[int, ...],
        dilation: tuple[int, ...],
        groups: int,
        input_shape: tuple[int, ...],
    ) -> None:
        self.dims = weight.ndim - 2
        self.weight, self.magnitude = weight.detach(), weight.detach().abs()
        self.bias = None if bias is None else bias.detach().view(-1, *[1] * self.dims)
        self.stride, self.padding, self.dilation, self.groups = stride, padding, dilation, groups
        self.input_shapes = (input_shape,)
        kernel = math.prod(weight.shape[2:])
        self.fan_in, self.fan_out = weight.shape[1] * kernel, weight.shape[0] // groups * kernel

    def _apply(self, x: Tensor, weight: Tensor) -> Tensor:
        return _CONV[self.dims](x, weight, None, self.stride, self.padding, self.dilation, self.groups)

    def linear(self, *xs: Tensor) -> Tensor:
        return self._apply(xs[0], self.weight)

    def absolute(self, *xs: Tensor) -> Tensor:
        return self._apply(xs[0], self.magnitude)

    def transpose(self, A: Tensor) -> tuple[Tensor, ...]:
        """The transposed convolution; output_padding restores what an inexact stride dropped."""
        spatial = zip(
            self.input_shapes[0][1:],
            A.shape[2:],
            self.weight.shape[2:],
            self.stride,
            self.padding,
            self.dilation,
            strict=True,
        )
        missing = [n - ((m - 1) * s - 2 * p + d * (k - 1) + 1) for n, m, k, s, p, d in spatial]
        transposed = _CONV_TRANSPOSE[self.dims](
            A, self.weight, None, self.stride, self.padding, missing, self.groups, self.dilation
        )
        return (transposed,)

    def rows(self, neuron: Tensor, shape: tuple[int, ...]) -> tuple[Tensor, ...]:
        """The kernels themselves, each written into its window: no arithmetic."""
        channels, *spatial = self.input_shapes[0]
        output, inner = math.prod(shape[1:]), math.prod(spatial)
        taps = window_positions(
            tuple(spatial),
            shape[1:],
            kernel=tuple(self.weight.shape[2:]),
            stride=self.stride,
            padding=self.padding,
            dilation=self.dilation,
        ).to(neuron.device)[neuron % output]
        filters = neuron // output
        group = filters // (len(self.weight) // self.groups) * self.weight.shape[1]
        channel = group[:, None] + torch.arange(self.weight.shape[1], device=neuron.device)
        place = torch.where(taps[:, None] < 0, channels * inner, channel[..., None] * inner + taps[:, None])
        rows = self.weight.new_zeros(len(neuron), channels * inner + 1)  # the last place takes the padding
        rows.scatter_(1, place.flatten(1), self.weight[filters].flatten(1))
        return (rows[:, :-1].reshape(-1, channels, *spatial),)


class ConvTranspose(Affine):
    """The adjoint of a convolution, as a layer."""

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        *,
        stride: tuple[int, ...],
        padding: tuple[int, ...],
        output_padding: tuple[int, ...],
        dilation: tuple[int, ...],
        groups: int,
        input_shape: tuple[int, ...],
    ) -> None:
        self.dims = weight.ndim - 2
        self.weight, self.magnitude = weight.detach(), weight.detach().abs()
        self.bias = None if bias is None else bias.detach().view(-1, *[1] * self.dims)
        self.stride, self.padding, self.output_padding = stride, padding, output_padding
        self.dilation, self.groups = dilation, groups
        self.input_shapes = (input_shape,)
        kernel = math.prod(weight.shape[2:])
        self.fan_in, self.fan_out = weight.shape[0] // groups * kernel, weight.shape[1] * kernel

    def _apply(self, x: Tensor, weight: Tensor) -> Tensor:
        return _CONV_TRANSPOSE[self.dims](
            x, weight, None, self.stride, self.padding, self.output_padding, self.groups, self.dilation
        )

    def linear(self, *xs: Tensor) -> Tensor:
        return self._apply(xs[0], self.weight)

    def absolute(self, *xs: Tensor) -> Tensor:
        return self._apply(xs[0], self.magnitude)

    def transpose(self, A: Tensor) -> tuple[Tensor, ...]:
        """The convolution; an output_padding of a stride or more adds outputs that no input reaches."""
        pulled = _CONV[self.dims](A, self.weight, None, self.stride, self.padding, self.dilation, self.groups)
        for axis, size in enumerate(self.input_shapes[0][1:], 2):
            pulled = pulled.narrow(axis, 0, size)
        return (pulled,)


@register_op(nn.Conv1d, nn.Conv2d, nn.Conv3d, F.conv1d, F.conv2d, F.conv3d, torch.conv1d, torch.conv2d, torch.conv3d)
def convolution(call: Call) -> Conv:
    """Rule of convolutions with constant weights and zero padding."""
    weight = call.constant("weight", 1)
    assert weight is not None
    dims = weight.ndim - 2
    if call.module is not None and call.module.padding_mode != "zeros":
        raise UnsupportedOperation(
            f"padding_mode={call.module.padding_mode!r} at {call.name!r}",
            "zero padding",
            "F.pad(x, ..., mode=...) before a convolution without padding",
        )
    dilation = per_axis(call.option("dilation", 5, 1), dims)
    padding = call.option("padding", 4, 0)
    if padding == "valid":
        padding = 0
    if padding == "same":
        total = [d * (k - 1) for d, k in zip(dilation, weight.shape[2:], strict=True)]
        if any(t % 2 for t in total):
            raise UnsupportedOperation(f"uneven padding='same' at {call.name!r}", "an odd kernel", "F.pad first")
        padding = [t // 2 for t in total]
    return Conv(
        weight,
        call.constant("bias", 2),
        stride=per_axis(call.option("stride", 3, 1), dims),
        padding=per_axis(padding, dims),
        dilation=dilation,
        groups=int(call.option("groups", 6, 1)),
        input_shape=call.input_shape,
    )


@register_op(
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
    F.conv_transpose1d,
    F.conv_transpose2d,
    F.conv_transpose3d,
)
def transposed_convolution(call: Call) -> ConvTranspose:
    """Rule of transposed convolutions with constant weights."""
    weight = call.constant("weight", 1)
    assert weight is not None
    dims = weight.ndim - 2
    return ConvTranspose(
        weight,
        call.constant("bias", 2),
        stride=per_axis(call.option("stride", 3, 1), dims),
        padding=per_axis(call.option("padding", 4, 0), dims),
        output_padding=per_axis(call.option("output_padding", 5, 0), dims),
        groups=int(call.option("groups", 6, 1)),
        dilation=per_axis(call.option("dilation", 7, 1), dims),
        input_shape=call.input_shape,
    )
