"""Which inputs a sliding window covers: shared by convolutions and max-pooling."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Int
from torch import Tensor


def per_axis(value: int | Sequence[int], dims: int) -> tuple[int, ...]:
    """Return an option such as a stride as one number per axis."""
    return (value,) * dims if isinstance(value, int) else tuple(int(v) for v in value)


def window_positions(
    spatial: tuple[int, ...],
    output: tuple[int, ...],
    *,
    kernel: tuple[int, ...],
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
) -> Int[Tensor, "outputs taps"]:
    """Return the flat input position of every tap of every window, -1 where it lies in the padding.

    Outputs and taps are in row-major order.
    """
    index = torch.zeros(1, 1, dtype=torch.long)
    for n, m, k, s, p, d in zip(spatial, output, kernel, stride, padding, dilation, strict=True):
        axis = torch.arange(m)[:, None] * s - p + torch.arange(k) * d
        outside = (axis < 0) | (axis >= n)
        joint = index[:, None, :, None] * n + axis[None, :, None, :]
        joint = joint.masked_fill((index < 0)[:, None, :, None] | outside[None, :, None, :], -1)
        index = joint.flatten(2).flatten(0, 1)
    assert index.shape == (math.prod(output), math.prod(kernel))
    return index
