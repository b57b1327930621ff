"""Pooling: averages and other non-negative linear maps, and max-pooling."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from certify.activations.base import outward
from certify.enclosures import Interval, Relaxation
from certify.errors import UnsupportedOperation
from certify.graph import Call
from certify.ops.base import Affine, Pulled, Rule, inner, inner_error
from certify.ops.windows import per_axis, window_positions
from certify.registry import register_op
from certify.rounding import gamma, tiny

#: Kernel, stride and padding of a pooling, per axis.
Window = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]


class Average(Affine):
    """A linear map with non-negative weights, run as the model runs it: mean, sum, average pooling.

    ``window`` (kernel, stride, padding) says that it is the same average around every output; None says nothing.
    """

    def __init__(
        self, run: Callable[[Tensor], Tensor], input_shape: tuple[int, ...], terms: int, window: Window | None = None
    ) -> None:
        self.run, self.input_shapes, self.window = run, (input_shape,), window
        self.fan_in = self.fan_out = terms + 1  # the division is one more rounding

    def linear(self, *xs: Tensor) -> Tensor:
        return self.run(xs[0])


@register_op(
    nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d,
    F.avg_pool1d, F.avg_pool2d, F.avg_pool3d, F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d,
    torch.mean, torch.sum, "mean", "sum",
)  # fmt: skip
def average(call: Call) -> Average:
    """Rule of averages over positions of a sample."""
    probe = torch.zeros((2, *call.input_shape), dtype=torch.float64, device=call.device)
    probe[1] = 1
    first, second = call.run(probe)
    if first.shape != call.output_shape or bool((first != 0).any() | (second < 0).any()):
        raise UnsupportedOperation(
            f"{call.kind} at {call.name!r} mixes the batch, or has negative weights", "averages over one sample"
        )
    terms = max(math.prod(call.input_shape), math.prod(call.output_shape))
    window = None
    if "avg" in call.kind.lower() and "daptive" not in call.kind:
        window, same = _window(call)
        terms = math.prod(window[0])
        window = window if same else None
    return Average(call.run, call.input_shape, terms, window)


def _window(call: Call) -> tuple[Window, bool]:
    """The window of an average pooling, and whether every output is the mean over a whole one, padding included."""
    dims = _spatial(call)
    kernel = per_axis(call.option("kernel_size", 1, None), dims)
    stride: Any = call.option("stride", 2, None)
    padding = per_axis(call.option("padding", 3, 0), dims)
    whole = max(padding) == 0 or bool(call.option("count_include_pad", 5, True))
    same = whole and not call.option("ceil_mode", 4, False) and call.option("divisor_override", 6, None) is None
    return (kernel, per_axis(stride, dims) if stride else kernel, padding), same


def _spatial(call: Call) -> int:
    """The number of spatial dimensions that a pooling slides over: those of the sample, after its channels."""
    dims = int(call.kind[-2])
    if len(call.input_shape) != dims + 1:
        raise UnsupportedOperation(
            f"{call.kind} at {call.name!r} of samples of shape {call.input_shape}",
            f"[batch, channels, and {dims} more]",
            "x.unsqueeze(1)",
        )
    return dims


class MaxPool(Rule):
    """The maximum over windows.

    Lower line: the input with the largest lower end. Upper line: that input alone if it dominates its window; else
    the better at the middle of the box of the constant max u and of L + sum_j s_j (x_j - l_j) over the inputs with
    u_j > L, s_j = (u_j - L)/(u_j - max(l_j, L)) clipped, where L is the largest lower end.
    """

    def __init__(self, kernel: tuple[int, ...], stride: tuple[int, ...], padding: tuple[int, ...], *,
                 dilation: tuple[int, ...], ceil_mode: bool, input_shape: tuple[int, ...]) -> None:  # fmt: skip
        self.input_shape = input_shape
        pool = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}[len(kernel)]
        self.run = lambda x: pool(x, kernel, stride, padding, dilation, ceil_mode)
        self.windows = self._positions(kernel, stride, padding, dilation)

    def _positions(
        self, kernel: tuple[int, ...], stride: tuple[int, ...], padding: tuple[int, ...], dilation: tuple[int, ...]
    ) -> Tensor:
        """Flat input positions of every window [outputs, k], -1 for padding, in the order of the outputs."""
        channels, *spatial = self.input_shape
        output = tuple(self.run(torch.zeros(1, 1, *spatial)).shape[2:])
        index = window_positions(
            tuple(spatial), output, kernel=kernel, stride=stride, padding=padding, dilation=dilation
        )
        shift = torch.arange(channels)[:, None, None] * math.prod(spatial)
        return torch.where(index < 0, -1, index + shift).flatten(0, 1)

    def _gather(self, x: Tensor, fill: float) -> Tensor:
        flat = F.pad(x.flatten(1), (0, 1), value=fill)  # position -1 is the last one, the fill
        return flat[:, self.windows.to(x.device)]

    def forward(self, *xs: Tensor) -> Tensor:
        return self.run(xs[0])

    def interval(self, *zs: Interval) -> Interval:
        return Interval(self.run(zs[0].lower), self.run(zs[0].upper))

    def undecided(self, z: Interval) -> Tensor:
        return z.lower < z.upper

    def relax(self, *zs: Interval) -> Relaxation:
        """Slopes are [batch, outputs, k] over the windows, offsets [batch, outputs]."""
        z, dtype = zs[0].double(), zs[0].lower.dtype
        low, up = self._gather(z.lower, -torch.inf), self._gather(z.upper, -torch.inf)
        floor, best = low.max(-1)
        lower_slope = F.one_hot(best, low.shape[-1]).double()
        rival = up.masked_fill(lower_slope.bool(), -torch.inf).amax(-1)
        dominated = floor >= rival
        # L + sum of chords of max(x_j - L, 0): each chord is that of a ReLU on [l_j - L, u_j - L].
        reach = (up - floor[..., None]).clamp(min=0)
        run = (up - torch.maximum(low, torch.full_like(low, -1e300))).clamp(min=1e-300)
        chord = torch.where(reach > 0, (reach / run).clamp(max=1), 0).to(dtype).double()
        below, above = ((end - floor[..., None]).clamp(min=-1e300) for end in (low, up))  # 0 times inf is NaN
        base = torch.where(reach > 0, torch.maximum(-chord * below, reach - chord * above), 0)
        chord_offset = floor + base.sum(-1) - (chord * floor[..., None]).sum(-1)
        middle = torch.where(reach > 0, (low + up) / 2, 0)
        at_middle = (chord * middle).sum(-1) + chord_offset
        ceiling = up.amax(-1)
        use_chord = torch.isfinite(at_middle) & (at_middle < ceiling) & ~dominated
        upper_slope = torch.where(use_chord[..., None], chord, 0)
        upper_slope = torch.where(dominated[..., None], lower_slope, upper_slope)
        offset = torch.where(use_chord, chord_offset, torch.where(dominated, 0, ceiling))
        noise = torch.where(use_chord, 2.0**-44 * (ceiling.abs() + floor.abs() + base.sum(-1)), 0)
        zero = torch.zeros_like(floor)
        return outward(dtype, (lower_slope, zero), (upper_slope, offset + noise))

    def pull_back(self, A: Tensor, relaxation: Relaxation | None) -> Pulled:
        """Scatter the coefficients to the windows' inputs; overlapping windows add up."""
        assert relaxation is not None
        flat = A.flatten(2)
        positive, negative = flat.clamp(min=0), flat.clamp(max=0)
        parts = positive[..., None] * relaxation.lower_slope + negative[..., None] * relaxation.upper_slope
        pulled = A.new_zeros(*A.shape[:2], math.prod(self.input_shape) + 1)
        index = self.windows.to(A.device).remainder(pulled.shape[2]).flatten()
        pulled = pulled.index_add(2, index, parts.flatten(2))
        offset = inner(positive, relaxation.lower_offset) + inner(negative, relaxation.upper_offset)
        return (pulled[..., :-1].unflatten(2, self.input_shape),), offset

    def rounding_error(self, *zs: Interval) -> Tensor:
        """The maximum is exact; the engine multiplies by slopes in [0, 1] and adds where windows overlap."""
        dtype, k = zs[0].lower.dtype, self.windows.shape[1]
        size = self.run(zs[0].magnitude)
        sums = 2 * (1 + 3 * k) * inner_error(size[0].numel(), dtype)
        return size * (k * gamma(2 * k + 4, dtype) + sums) + k * tiny(dtype)


@register_op(nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, F.max_pool1d, F.max_pool2d, F.max_pool3d,
             torch.max_pool1d, torch.max_pool2d)  # fmt: skip
def max_pool(call: Call) -> MaxPool:
    """Rule of max-pooling."""
    if call.option("return_indices", 6, False):
        raise UnsupportedOperation(f"max-pool with indices at {call.name!r}", "return_indices=False")
    dims = _spatial(call)
    kernel = per_axis(call.option("kernel_size", 1, None), dims)
    stride: Any = call.option("stride", 2, None)
    return MaxPool(
        kernel,
        per_axis(stride, dims) if stride else kernel,
        per_axis(call.option("padding", 3, 0), dims),
        dilation=per_axis(call.option("dilation", 4, 1), dims),
        ceil_mode=bool(call.option("ceil_mode", 5, False)),
        input_shape=call.input_shape,
    )
