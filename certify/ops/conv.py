"""Convolutions and transposed convolutions in one, two and three dimensions; never a dense matrix."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from certify.enclosures import Relaxation
from certify.errors import UnsupportedOperation
from certify.frames import Frame
from certify.graph import Call
from certify.ops.base import Affine, Pulled
from certify.ops.windows import per_axis
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
        self.weight, self.magnitude = weight, weight.abs()
        self.bias = None if bias is None else bias.view(-1, *[1] * self.dims)
        self.stride, self.padding, self.dilation, self.groups = stride, padding, dilation, groups
        self.input_shapes = (input_shape,)
        kernel = math.prod(weight.shape[2:])
        self.fan_in, self.fan_out = weight.shape[1] * kernel, weight.shape[0] // groups * kernel
        self.phases = _phases(self.weight, stride) if self._has_phases() else None

    def _has_phases(self) -> bool:
        """Transposed strided convolutions onto few channels are two to three times faster phase by phase."""
        plain = self.dims == 2 and self.groups == 1 and self.dilation == (1, 1)
        return plain and self.stride[0] == self.stride[1] > 1 and self.weight.shape[1] <= 8

    def _by_phases(self, A: Tensor, padding: Sequence[int], size: Sequence[int]) -> Tensor:
        """The transposed convolution as a plain one that computes the phases of its stride as channels."""
        assert self.phases is not None
        taps = [n - 1 for n in self.phases.shape[2:]]
        full = F.pixel_shuffle(F.conv2d(A, self.phases, padding=taps), self.stride[0])
        missing = [p + n - m for m, p, n in zip(full.shape[2:], padding, size, strict=True)]
        return F.pad(full, [-padding[1], missing[1], -padding[0], missing[0]])

    def _apply(self, x: Tensor, weight: Tensor) -> Tensor:
        return _CONV[self.dims](x, weight, None, self.stride, self.padding, self.dilation, self.groups)

    def linear(self, *xs: Tensor) -> Tensor:
        return self._apply(xs[0], self.weight)

    def absolute(self, *xs: Tensor) -> Tensor:
        return self._apply(xs[0], self.magnitude)

    def transpose(self, A: Tensor) -> tuple[Tensor, ...]:
        """The transposed convolution; output_padding restores what an inexact stride dropped."""
        if self.phases is not None:
            return (self._by_phases(A, self.padding, self.input_shapes[0][1:]),)
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

    def reach(self, frame: Frame) -> Frame:
        taps = [d * (k - 1) for d, k in zip(self.dilation, self.weight.shape[2:], strict=True)]
        return frame.through(self.stride, self.padding, taps)

    def pull_window(self, A: Tensor, relaxation: Relaxation | None) -> Pulled:
        """The transposed convolution without padding: every tap, also those that hang over the map's edge."""
        if self.phases is not None:
            size = [(m - 1) * s + k for m, s, k in zip(A.shape[3:], self.stride, self.weight.shape[2:], strict=True)]
            return (self._by_phases(A.flatten(0, 1), (0, 0), size).unflatten(0, A.shape[:2]),), None
        transposed = _CONV_TRANSPOSE[self.dims](
            A.flatten(0, 1), self.weight, None, self.stride, groups=self.groups, dilation=self.dilation
        )
        return (transposed.unflatten(0, A.shape[:2]),), None

    def push_window(self, *xs: Tensor) -> Tensor:
        return _CONV[self.dims](xs[0], self.weight, None, self.stride, 0, self.dilation, self.groups)


def _phases(weight: Tensor, stride: tuple[int, ...]) -> Tensor:
    """Return the kernel [channels * stride^2, filters, *taps] of ``Conv._by_phases``.

    Position stride q + phase of the result sums W[.., stride j + phase] A[q - j] over j.
    """
    s = stride[0]
    taps = [-(-k // s) for k in weight.shape[2:]]
    padded = F.pad(weight, [0, taps[1] * s - weight.shape[3], 0, taps[0] * s - weight.shape[2]])
    split = padded.unflatten(3, (taps[1], s)).unflatten(2, (taps[0], s))  # filters, channels, j, phase, i, phase
    return split.flip(2, 4).permute(1, 3, 5, 0, 2, 4).flatten(0, 2).contiguous()


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
        self.weight, self.magnitude = weight, weight.abs()
        self.bias = None if bias is None else bias.view(-1, *[1] * self.dims)
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
