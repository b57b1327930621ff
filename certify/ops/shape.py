"""Data movement: anything that picks, repeats, permutes or pads elements is one rule, ``Select``.

The index map of such an operation is read off by running it on a tensor that holds its own positions.
"""

from __future__ import annotations

import operator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from certify.enclosures import Interval
from certify.errors import UnsupportedOperation
from certify.frames import Frame
from certify.graph import Call
from certify.ops.base import Affine
from certify.registry import register_op
from certify.rounding import gamma


class Select(Affine):
    """y[j] = x[index[j]], or ``fill`` where index[j] is -1. ``index`` is None for a pure reshape.

    Exact in floats, but for the engine's sum where one element is picked more than once.
    """

    elementwise = carries = True

    def __init__(
        self,
        input_shape: tuple[int, ...],
        output_shape: tuple[int, ...],
        index: Tensor | None,
        fill: float = 0.0,
    ) -> None:
        self.input_shapes, self.output_shape, self.fill = (input_shape,), output_shape, fill
        self.index = index
        if index is not None:
            self.padded = index < 0
            self.source = index.clamp(min=0)
            counts = self.source[~self.padded].bincount()
            self.fan_out = int(counts.max()) if counts.numel() else 1
            self.elementwise = self.carries = self.fan_out <= 1

    def linear(self, *xs: Tensor) -> Tensor:
        return self._pick(xs[0], 0.0)

    def forward(self, *xs: Tensor) -> Tensor:
        return self._pick(xs[0], self.fill)

    def interval(self, *zs: Interval) -> Interval:
        return Interval(self.forward(zs[0].lower), self.forward(zs[0].upper))

    def transpose(self, A: Tensor) -> tuple[Tensor, ...]:
        flat = A.flatten(1)
        if self.index is not None:
            size = Tensor.new_zeros(A, (len(A), torch.Size(self.input_shapes[0]).numel()))
            flat = size.index_add(1, self.source, flat.masked_fill(self.padded, 0.0))
        return (flat.view(len(A), *self.input_shapes[0]),)

    def rounding_error(self, *zs: Interval) -> Tensor | None:
        """None when no element is repeated; else the engine's own sum over the repetitions."""
        if self.fan_out <= 1:
            return None
        dtype = zs[0].lower.dtype
        size = self.interval(*zs).magnitude
        return size * (gamma(self.fan_out + 2, dtype) + gamma(size[0].numel() + 8, torch.float64))

    def _pick(self, x: Tensor, fill: float) -> Tensor:
        flat = x.flatten(1)
        if self.index is not None:
            flat = flat[:, self.source].masked_fill(self.padded, fill)
        return flat.view(len(x), *self.output_shape)


class Concat(Affine):
    """Concatenation along one dimension of the sample."""

    elementwise = carries = True

    def __init__(self, input_shapes: tuple[tuple[int, ...], ...], dim: int) -> None:
        self.input_shapes, self.dim = input_shapes, dim

    def linear(self, *xs: Tensor) -> Tensor:
        return torch.cat(xs, self.dim)

    def interval(self, *zs: Interval) -> Interval:
        return Interval(self.linear(*(z.lower for z in zs)), self.linear(*(z.upper for z in zs)))

    def reach(self, frame: Frame) -> Frame | None:
        """Windows pass where channels are joined."""
        return frame if self.dim == 1 else None

    def transpose(self, A: Tensor) -> tuple[Tensor, ...]:
        return torch.split(A, [shape[self.dim - 1] for shape in self.input_shapes], self.dim)

    def rounding_error(self, *zs: Interval) -> Tensor | None:
        return None


@register_op(
    nn.Flatten, nn.Unflatten, nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.ChannelShuffle,
    nn.PixelShuffle, nn.PixelUnshuffle, nn.ReflectionPad1d, nn.ReflectionPad2d, nn.ReplicationPad1d,
    nn.ReplicationPad2d, nn.CircularPad1d, nn.CircularPad2d,
    torch.flatten, torch.reshape, torch.permute, torch.transpose, torch.squeeze, torch.unsqueeze, torch.flip,
    torch.roll, operator.getitem, F.pixel_shuffle,
    "flatten", "reshape", "view", "permute", "transpose", "squeeze", "unsqueeze", "contiguous", "clone", "flip",
    "expand", "repeat", "unflatten",
)  # fmt: skip
def movement(call: Call) -> Select:
    """Rule of every operation that only moves elements of a sample."""
    return _select(call, 0.0)


@register_op(F.dropout, F.dropout2d)
def dropout(call: Call) -> Select:
    """Rule of functional dropout that is switched off."""
    if call.option("training", 2, True):
        raise UnsupportedOperation(
            f"dropout with training=True at {call.name!r}", "F.dropout(x, p, self.training) in eval mode"
        )
    return _select(call, 0.0)


@register_op(F.pad, nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d, nn.ConstantPad1d, nn.ConstantPad2d, nn.ConstantPad3d)
def pad(call: Call) -> Select:
    """Rule of constant, reflection, replication and circular padding."""
    value = call.option("value", 3, None)
    return _select(call, 0.0 if value is None else float(value))


@register_op(torch.cat, torch.concat)
def concatenate(call: Call) -> Concat:
    """Rule of concatenation of nodes along a dimension of the sample."""
    dim = int(call.kwargs.get("dim", call.args[1] if len(call.args) > 1 else 0))
    parts = call.args[0] if call.args else call.kwargs["tensors"]
    dim = dim % (len(call.output_shape) + 1)
    if dim == 0 or len(call.inputs) != len(parts):
        raise UnsupportedOperation(
            f"concatenation at {call.name!r}", "nodes joined along a dimension other than the batch"
        )
    return Concat(tuple(part.shape for part in call.inputs), dim)


def _select(call: Call, fill: float) -> Select:
    """Run the operation on positions 1, 2, ... and read the map; what is no position must be the fill."""
    size = torch.Size(call.input_shape).numel()
    positions = torch.arange(1, 2 * size + 1, dtype=torch.float64, device=call.device).view(2, *call.input_shape)
    moved = call.run(positions)
    if moved.shape != (2, *call.output_shape):
        raise UnsupportedOperation(f"{call.kind} at {call.name!r} mixes the batch", "the batch stays dimension 0")
    first, second = (sample.flatten() for sample in moved)
    # A position of the first sample reappears in the second one, size further; a fill is equal in both.
    picked = second == first + size
    index = torch.where(picked, first.round().long() - 1, -1)
    if not bool((picked | ((first == second) & (first == fill))).all()):
        raise UnsupportedOperation(
            f"{call.kind} at {call.name!r} does more than move elements of a sample",
            "a reshape, slice or padding",
        )
    plain = bool(picked.all()) and torch.equal(index, torch.arange(size, device=call.device))
    return Select(call.input_shape, call.output_shape, None if plain else index, fill)
