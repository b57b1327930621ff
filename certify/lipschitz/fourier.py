"""Convolutions by frequency: zero-padded maps as parts of a torus.

A map on the grid is a function on a torus that is zero elsewhere. A zero-padded convolution is the circular one,
followed by the restriction to its grid, if no tap reaches around the torus into the grid: N >= n + overhang. The
restriction joins the activation behind it: with slopes in [a, b], a <= 0 <= b, "u = f(v) on the grid and 0 elsewhere"
keeps |u - c v| <= r |v| at every place, so one sector per channel serves all of the torus, and the blocks of the
covariance stay apart by frequency. Strides fold aliases together (``steps.Fold``).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float64, Int, Num
from torch import Tensor

from certify.rounding import gamma

#: |error| of a computed phase exp(i t), in units of 2^-53: reduction, multiplication by 2 pi, sine and cosine.
PHASE = 64


@dataclass(frozen=True)
class Torus:
    """A grid inside a torus: both have sizes per axis. Functions are real, so half of the frequencies say all."""

    grid: tuple[int, ...]
    size: tuple[int, ...]

    @property
    def places(self) -> int:
        """The number of points of the grid."""
        return math.prod(self.grid)

    @cached_property
    def frequencies(self) -> Int[Tensor, "half axes"]:
        """Frequencies with a last coordinate up to N/2; the others are their mirror images."""
        axes = [torch.arange(n) for n in (*self.size[:-1], self.size[-1] // 2 + 1)]
        return torch.cartesian_prod(*axes).view(-1, len(axes))

    @cached_property
    def weights(self) -> Float64[Tensor, "half"]:
        """How many of all frequencies each one stands for: 2, or 1 where its mirror image is listed too."""
        last = self.frequencies[:, -1]
        return torch.where((last == 0) | (2 * last == self.size[-1]), 1.0, 2.0).double()

    def aliases(self, stride: tuple[int, ...]) -> tuple[Int[Tensor, "coarse parts"], Tensor]:
        """Return, for every frequency of the torus that a stride leaves, the places of those that it makes one.

        The second tensor says where the place holds the mirror image.
        """
        coarse = Torus(self.grid, tuple(n // s for n, s in zip(self.size, stride, strict=True)))
        steps = torch.cartesian_prod(*(torch.arange(s) for s in stride)).view(-1, len(stride))
        sizes = torch.tensor(self.size)
        fine = coarse.frequencies[:, None] + steps * torch.tensor(coarse.size)
        mirrored = fine[..., -1] > self.size[-1] // 2
        fine = torch.where(mirrored[..., None], -fine, fine) % sizes
        place = torch.zeros(fine.shape[:-1], dtype=torch.long)
        for axis, n in enumerate((*self.size[:-1], self.size[-1] // 2 + 1)):
            place = place * n + fine[..., axis]
        return place, mirrored

    def transfer(
        self,
        weight: Float64[Tensor, "out in *kernel"],
        frequencies: Int[Tensor, "f axes"],
        shift: tuple[int, ...],
        dilation: tuple[int, ...],
    ) -> tuple[Num[Tensor, "f out in"], Float64[Tensor, "1 out in"]]:
        """Return the blocks of y[i] = sum_t w[t] x[i + d t - shift], and the error of their entries.

        The weights may have been rounded once.
        """
        phases = torch.ones(len(frequencies), 1, dtype=torch.complex128)
        for axis, (n, k, d, p) in enumerate(zip(self.size, weight.shape[2:], dilation, shift, strict=True)):
            position = torch.arange(k) * d - p
            phases = (phases[:, :, None] * _phases(frequencies[:, axis], position, n)[:, None]).flatten(1)
        taps = weight.flatten(2)
        blocks = torch.einsum("oit,ft->foi", taps.to(torch.complex128), phases.to(weight.device))
        error = taps.abs().sum(2) * gamma(4 * taps.shape[2] + 2 * PHASE * len(self.size) + 4, torch.float64)
        return blocks, error[None]

    def rows(
        self, rows: Float64[Tensor, "m channels *grid"], frequencies: Int[Tensor, "f axes"]
    ) -> tuple[Num[Tensor, "f m channels"], Float64[Tensor, "1 m channels"]]:
        """Return the blocks of y = sum over the grid of <rows, x>, and the error of their entries."""
        found = rows.to(torch.complex128)
        m, channels = rows.shape[:2]
        sizes = torch.tensor(self.size)
        axes = [torch.arange(n) for n in self.size]
        for axis, n in enumerate(self.size):  # each pass turns one axis of the grid into frequencies, moved to the end
            phases = _phases(axes[axis], torch.arange(self.grid[axis]), n).to(rows.device)
            found = torch.tensordot(found, phases, ([2], [1]))
        place = torch.zeros(len(frequencies), dtype=torch.long)
        for axis in range(len(self.size)):
            place = place * self.size[axis] + frequencies[:, axis] % sizes[axis]
        root = math.sqrt(math.prod(self.size))
        blocks = found.reshape(m, channels, -1)[:, :, place].permute(2, 0, 1) / root
        terms = sum(4 * n + PHASE for n in self.grid) + 16
        error = rows.abs().flatten(2).sum(2) / root * gamma(2 * terms, torch.float64)
        return blocks.contiguous(), error[None]


def _phases(frequency: Int[Tensor, "f"], position: Int[Tensor, "k"], n: int) -> Num[Tensor, "f k"]:
    """exp(2 pi i f x / n), the turn reduced exactly before it is rounded."""
    turns = (frequency[:, None] * position % n).double() / n
    return torch.polar(torch.ones_like(turns), 2 * math.pi * turns)
