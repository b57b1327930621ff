"""Random numbers per sample: what a sample is given depends on its own seed alone, never on its neighbours.

So batches, active sets, resumed runs and shards cannot change a sample's fate. The numbers come from integer
arithmetic on a counter, which gives the same bits on every device.
"""

from __future__ import annotations

import torch
from jaxtyping import Float64, Int
from torch import Tensor

from certify.errors import InvalidInput

#: Where randomness comes from: a generator (None is torch's global one), or one integer seed per sample.
Source = torch.Generator | Tensor | None

#: Weyl increment and multipliers of SplitMix64, as signed 64-bit integers.
_GOLDEN, _FIRST, _SECOND = (value - 2**64 for value in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


class Draws:
    """One stream of random numbers per sample; each call goes on where the sample's stream stood.

    ``source`` are integers [batch], or a generator that draws them when the first number is asked for: the same on
    every device. Reference: Steele, Lea, Flood, "Fast splittable pseudorandom number generators" (2014), SplitMix64.
    """

    def __init__(self, source: Source, batch: int, device: torch.device | str = "cpu") -> None:
        self._source, self._batch, self._device = source, batch, torch.device(device)
        self._streams: tuple[Tensor, Tensor] | None = None

    def take(self, index: Int[Tensor, "n"]) -> Draws:
        """Return the streams of the samples ``index``, each from where it stands."""
        seeds, used = self._stand()
        taken = Draws(seeds, len(index), self._device)
        taken._streams = seeds[index], used[index]
        return taken

    def split(self, key: int) -> Draws:
        """Return streams of their own for the same samples, other ones for every key."""
        seeds, used = self._stand()
        return Draws(_mixed(seeds + used * _GOLDEN + _mixed(torch.full_like(seeds, key + 1))), len(seeds), self._device)

    def uniform(self, *shape: int) -> Float64[Tensor, "batch *shape"]:
        """Return numbers in [0, 1), ``shape`` of them per sample."""
        count, (seeds, used) = torch.Size(shape).numel(), self._stand()
        place = used[:, None] + torch.arange(1, count + 1, device=self._device)
        self._streams = seeds, used + count
        bits = _mixed(seeds[:, None] + place * _GOLDEN)
        return (_shifted(bits, 11).double() * 2.0**-53).view(-1, *shape)

    def normal(self, *shape: int) -> Float64[Tensor, "batch *shape"]:
        """Return standard normal numbers, ``shape`` of them per sample."""
        middle = self.uniform(*shape).clamp(2.0**-54, 1 - 2.0**-53)  # neither end, where the inverse is infinite
        return torch.special.ndtri(middle)

    def integers(self, below: int) -> Int[Tensor, "batch"]:
        """Return one integer in 0..below-1 per sample."""
        return (self.uniform() * below).long().clamp(max=below - 1)

    def signs(self, *shape: int) -> Float64[Tensor, "batch *shape"]:
        """Return -1 or 1, ``shape`` of them per sample."""
        return torch.where(self.uniform(*shape) < 0.5, -1.0, 1.0).double()

    def _stand(self) -> tuple[Tensor, Tensor]:
        """Mixed seeds, and how many numbers of each stream are used up."""
        if self._streams is None:
            source = self._source
            if not isinstance(source, Tensor):
                where = "cpu" if source is None else source.device
                source = torch.randint(2**62, (self._batch,), generator=source, device=where)
            if source.is_floating_point() or source.ndim > 1 or source.numel() not in (1, self._batch):
                raise InvalidInput(
                    f"seeds {source.dtype} of shape {tuple(source.shape)}",
                    f"one integer per sample: [{self._batch}]",
                    "torch.arange(len(x)), or a torch.Generator",
                )
            seeds = _mixed(_mixed(source.to(self._device, torch.long).expand(self._batch)) + _GOLDEN)
            self._streams = seeds, torch.zeros_like(seeds)
        return self._streams


def sample_seeds(seed: int, index: Int[Tensor, "n"]) -> Int[Tensor, "n"]:
    """Return one seed per sample of a run with that seed; ``index`` are the samples' places in their data set."""
    high = int(_mixed(torch.tensor(seed >> 32)))  # 0 for seeds below 2^32: theirs lie 2^32 apart
    return index.long() + ((high + (seed << 32) + 2**63) % 2**64 - 2**63)


def _mixed(z: Tensor) -> Tensor:
    """SplitMix64's finaliser: every bit of the result depends on every bit of z. Products wrap around."""
    z = (z ^ _shifted(z, 30)) * _FIRST
    z = (z ^ _shifted(z, 27)) * _SECOND
    return z ^ _shifted(z, 31)


def _shifted(z: Tensor, by: int) -> Tensor:
    """Logical shift to the right: the sign bit moves in as a 0 behind it."""
    return (z >> by) & ((1 << (64 - by)) - 1)
