"""Random numbers per sample: what a sample is given depends on its own seed alone, never on its neighbours.

So batches, active sets, resumed runs and shards cannot change a sample's fate. The numbers come from integer
arithmetic on a counter, which gives the same bits on every device.
"""

from __future__ import annotations

import torch
from jaxtyping import Float64, Int
from torch import Tensor

#: Where randomness comes from: a generator (None is torch's global one), or one integer seed per sample.
Source = torch.Generator | Tensor | None

#: Weyl increment and multipliers of SplitMix64, as signed 64-bit integers.
_GOLDEN, _FIRST, _SECOND = (value - 2**64 for value in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


class Draws:
    """One stream of random numbers per sample; each call goes on where the sample's stream stood.

    ``seeds`` are integers [batch]. Reference: Steele, Lea, Flood, "Fast splittable pseudorandom number generators"
    (2014), SplitMix64.
    """

    def __init__(self, seeds: Int[Tensor, "batch"]) -> None:
        self._seeds = _mixed(_mixed(seeds.long()) + _GOLDEN)
        self._used = torch.zeros_like(self._seeds)

    @classmethod
    def of(cls, source: Source, batch: int, device: torch.device) -> Draws:
        """Return the streams of ``batch`` samples; a generator gives the same ones on every device."""
        if not isinstance(source, Tensor):
            where = "cpu" if source is None else source.device
            source = torch.randint(2**62, (batch,), generator=source, device=where)
        return cls(source.to(device).expand(batch))

    def take(self, index: Int[Tensor, "n"]) -> Draws:
        """Return the streams of the samples ``index``, each from where it stands."""
        taken = object.__new__(Draws)
        taken._seeds, taken._used = self._seeds[index], self._used[index]
        return taken

    def uniform(self, *shape: int) -> Float64[Tensor, "batch *shape"]:
        """Return numbers in [0, 1), ``shape`` of them per sample."""
        count = torch.Size(shape).numel()
        place = self._used[:, None] + torch.arange(1, count + 1, device=self._used.device)
        self._used = self._used + count
        bits = _mixed(self._seeds[:, None] + place * _GOLDEN)
        return (_shifted(bits, 11).double() * 2.0**-53).view(-1, *shape)

    def normal(self, *shape: int) -> Float64[Tensor, "batch *shape"]:
        """Return standard normal numbers, ``shape`` of them per sample."""
        middle = self.uniform(*shape) + 2.0**-54  # never 0, where the inverse is infinite
        return torch.special.ndtri(middle)

    def integers(self, below: int) -> Int[Tensor, "batch"]:
        """Return one integer in 0..below-1 per sample."""
        return (self.uniform() * below).long().clamp(max=below - 1)

    def signs(self, *shape: int) -> Float64[Tensor, "batch *shape"]:
        """Return -1 or 1, ``shape`` of them per sample."""
        return torch.where(self.uniform(*shape) < 0.5, -1.0, 1.0).double()


def _mixed(z: Tensor) -> Tensor:
    """SplitMix64's finaliser: every bit of the result depends on every bit of z. Products wrap around."""
    z = (z ^ _shifted(z, 30)) * _FIRST
    z = (z ^ _shifted(z, 27)) * _SECOND
    return z ^ _shifted(z, 31)


def _shifted(z: Tensor, by: int) -> Tensor:
    """Logical shift to the right: the sign bit moves in as a 0 behind it."""
    return (z >> by) & ((1 << (64 - by)) - 1)
