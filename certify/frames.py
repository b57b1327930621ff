"""Windows of rows that start inside convolutions: only the part of a map that a neuron depends on is kept.

A row that starts at position q of a node's map needs, in every map before it, the window with the origin
scale q + shift per axis, of one size for all rows. Windows may hang over the edge of a map; there is nothing there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Int
from torch import Tensor


@dataclass(frozen=True)
class Frame:
    """The windows of all rows in one map: origin = scale * position + shift, and ``size``, per axis."""

    scale: tuple[int, ...]
    shift: tuple[int, ...]
    size: tuple[int, ...]

    @classmethod
    def start(cls, dims: int) -> Frame:
        """The frame of single positions in a map of ``dims`` axes."""
        return cls((1,) * dims, (0,) * dims, (1,) * dims)

    def through(self, stride: Sequence[int], padding: Sequence[int], taps: Sequence[int]) -> Frame:
        """Return the windows before a convolution whose kernel spans ``taps`` + 1 positions."""
        axes = list(zip(self.scale, self.shift, self.size, stride, padding, taps, strict=True))
        return Frame(
            tuple(scale * s for scale, _, _, s, _, _ in axes),
            tuple(shift * s - p for _, shift, _, s, p, _ in axes),
            tuple((size - 1) * s + t + 1 for _, _, size, s, _, t in axes),
        )

    def __or__(self, other: Frame) -> Frame | None:
        """Return the smallest windows around both; None where they move differently."""
        if self.scale != other.scale:
            return None
        low = tuple(min(a, b) for a, b in zip(self.shift, other.shift, strict=True))
        ends = zip(self.shift, self.size, other.shift, other.size, low, strict=True)
        return Frame(self.scale, low, tuple(max(a + m, b + n) - o for a, m, b, n, o in ends))

    def pad_from(self, A: Tensor, inner: Frame) -> Tensor:
        """Return coefficients on the windows ``inner``, which lie inside these, on these windows."""
        return A if inner == self else F.pad(A, self._margins(inner))

    def crop_to(self, A: Tensor, inner: Frame) -> Tensor:
        """Return the part of these windows that the windows ``inner`` cover."""
        return A if inner == self else F.pad(A, [-margin for margin in self._margins(inner)])

    def _margins(self, inner: Frame) -> list[int]:
        """What these windows have before and after ``inner``, last axis first."""
        margins: list[int] = []
        for a, m, b, n in zip(self.shift, self.size, inner.shift, inner.size, strict=True):
            margins = [b - a, (a + m) - (b + n), *margins]
        return margins

    def cut(self, values: Tensor, sample: Int[Tensor, "rows"], position: Int[Tensor, "rows dims"]) -> Tensor:
        """Return the windows of ``values`` [batch, ..., *map]: [rows, ..., *size], zero outside the map.

        ``sample`` picks from the batch; a batch of one serves every row.
        """
        dims = len(self.size)
        space = values.shape[-dims:]
        pads: list[int] = []
        index = []
        for axis in range(dims):
            origin = position[:, axis] * self.scale[axis] + self.shift[axis]
            before = max(0, -int(origin.min()))
            after = max(0, int(origin.max()) + self.size[axis] - space[axis])
            pads = [before, after, *pads]
            index.append(origin + before)
        padded = F.pad(values, pads)
        for size in self.size:  # appends an axis of that size, so the next one to unfold stands at the same distance
            padded = padded.unfold(padded.ndim - dims, size, 1)
        lead = padded.movedim(tuple(range(padded.ndim - 2 * dims, padded.ndim - dims)), tuple(range(1, dims + 1)))
        which = sample if len(values) > 1 else torch.zeros_like(sample)
        return lead[(which, *index)]

    def spread(self, A: Tensor, position: Int[Tensor, "rows dims"], space: tuple[int, ...]) -> Tensor:
        """Return coefficients [rows, k, channels, *size] on whole maps [rows, k, channels, *space]."""
        place = torch.zeros(len(A), 1, dtype=torch.long, device=A.device)
        for axis, (n, size) in enumerate(zip(space, self.size, strict=True)):
            along = (position[:, axis] * self.scale[axis] + self.shift[axis])[:, None]
            along = along + torch.arange(size, device=A.device)
            along = along.masked_fill((along < 0) | (along >= n), -(1 << 40))  # whatever is added stays negative
            place = (place[:, :, None] * n + along[:, None, :]).flatten(1)
        total = torch.Size(space).numel()
        place = place.masked_fill(place < 0, total)  # the last place takes what hangs over the edge
        whole = A.new_zeros(*A.shape[:3], total + 1)
        index = place[:, None, None].expand(*A.shape[:3], -1)
        return whole.scatter(3, index, A.flatten(3))[..., :-1].unflatten(3, space)
